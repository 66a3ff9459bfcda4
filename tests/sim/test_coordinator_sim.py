"""The coordinator's core against simulated workers: no faults, and each kind of fault on its own."""

from __future__ import annotations

import pytest
from sim_client import PlannedRound
from sim_cluster import Faults, SimCluster

from shared.core.coordinator import Coordinator
from shared.core.coordinator_config import CoordinatorConfig
from shared.core.policies import POLICIES
from shared.errors import ErrorCode


def plan_rounds(cluster: SimCluster, num_sessions: int = 4, num_rounds: int = 4, **options: object) -> None:
    for number in range(num_sessions):
        client = cluster.add_client(f"s{number}")
        for _ in range(num_rounds):
            tokens = [cluster.random.randrange(1, 1000) for _ in range(cluster.random.randint(1, 40))]
            client.plan(
                PlannedRound(
                    tokens,
                    max_output_tokens=cluster.random.randint(1, 20),
                    deadline_s=float(options.get("deadline_s", 60.0)),
                    as_chat=cluster.random.random() < 0.3,
                )
            )


def build(policy: str = "ampd", num_prefill: int = 2, num_decode: int = 2, seed: int = 1) -> SimCluster:
    cluster = SimCluster(seed=seed, config=CoordinatorConfig(policy=policy, min_staged_tokens=1))
    for number in range(num_decode):
        cluster.add_worker(f"decode-{number}", "decode")
    for number in range(num_prefill):
        cluster.add_worker(f"prefill-{number}", "prefill")
    return cluster


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("num_prefill", [0, 2])
def test_without_faults_every_round_finishes_in_its_first_attempt(policy: str, num_prefill: int) -> None:
    cluster = build(policy, num_prefill)
    plan_rounds(cluster)
    cluster.finish()
    assert len(cluster.observed) == 16
    for client in cluster.clients.values():
        for planned in client.done:
            assert planned.outcome.finished is not None
            assert planned.outcome.finished.attempt == 1
            assert len(planned.stream_terminals) == 1
    placements = {observed.usage.prefill for observed in cluster.observed}
    assert cluster.num_mismatches == 0, "kept KV is what the coordinator believes"
    assert cluster.num_behind == 0 or POLICIES[policy].stages, "only a staging can end unheard of"
    if num_prefill == 0 or policy in ("colocated", "continuum"):
        assert placements == {"local"}
    elif policy == "remote":
        assert placements == {"remote"}
    elif policy == "local":
        assert {o.usage.prefill for o in cluster.observed if o.round == 0} == {"remote"}
        assert {o.usage.prefill for o in cluster.observed if o.round > 0} == {"local"}


def finished_rounds(cluster: SimCluster) -> list[PlannedRound]:
    return [planned for client in cluster.clients.values() for planned in client.done if planned.outcome.finished]


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("kill_after_s", [0.005, 0.02, 0.06, 0.15, 0.4])
def test_a_killed_worker_costs_no_round(victim: str, kill_after_s: float) -> None:
    cluster = build("remote")
    cluster.run_for(1.0)
    plan_rounds(cluster, num_rounds=8)
    cluster.run_for(kill_after_s)
    cluster.kill_worker(victim)
    cluster.finish()
    assert len(finished_rounds(cluster)) == 32
    assert cluster.coordinator.state.counters["workers_lost"] >= 1


def test_a_worker_that_comes_back_with_another_incarnation_is_a_new_worker() -> None:
    cluster = build("remote", num_prefill=1, num_decode=1)
    cluster.run_for(1.0)
    plan_rounds(cluster)
    cluster.run_for(0.1)
    cluster.kill_worker("decode-0")
    cluster.run_for(0.2)
    cluster.add_worker("decode-0", "decode")  # before the heartbeat time-out
    cluster.finish()
    assert len(finished_rounds(cluster)) == 16


@pytest.mark.parametrize("kill_after_s", [0.001, 0.004, 0.01, 0.03, 0.08, 0.3])
@pytest.mark.parametrize("down_s", [0.05, 5.0])
@pytest.mark.parametrize("policy", ["ampd", "adaptive"])
def test_a_killed_coordinator_loses_nothing(kill_after_s: float, down_s: float, policy: str) -> None:
    cluster = build(policy, seed=int(kill_after_s * 1e4))
    cluster.run_for(1.0)
    plan_rounds(cluster, num_sessions=6)
    cluster.run_for(kill_after_s)
    cluster.kill_coordinator()
    cluster.run_for(down_s)
    cluster.start_coordinator()
    cluster.finish()
    assert len(finished_rounds(cluster)) == 24
    attempts = [planned.outcome.finished.attempt for planned in finished_rounds(cluster)]
    assert set(attempts) == {1}, "the workers lived: nothing ran twice"


@pytest.mark.parametrize("policy", ["ampd", "adaptive"])
def test_coordinator_and_decode_worker_die_together(policy: str) -> None:
    cluster = build(policy, num_decode=2)
    cluster.run_for(1.0)
    plan_rounds(cluster)
    cluster.run_for(0.1)
    cluster.kill_coordinator()
    cluster.kill_worker("decode-0")
    cluster.run_for(1.0)
    cluster.start_coordinator()
    cluster.finish()
    assert len(finished_rounds(cluster)) == 16


@pytest.mark.parametrize("policy", ["ampd", "adaptive"])
def test_lost_and_repeated_messages_change_no_token(policy: str) -> None:
    cluster = build(policy, seed=7)
    cluster.faults.drop = cluster.faults.duplicate = cluster.faults.slow = 0.05
    plan_rounds(cluster, num_sessions=6)
    cluster.run_until(lambda: not any(client.is_busy for client in cluster.clients.values()), 600.0)
    cluster.finish()
    assert len(finished_rounds(cluster)) == 24


def test_a_cut_data_plane_falls_back_to_local_prefills() -> None:
    cluster = build("remote")
    cluster.faults.cut = True
    plan_rounds(cluster)
    cluster.run_until(lambda: not any(client.is_busy for client in cluster.clients.values()), 200.0)
    assert len(finished_rounds(cluster)) == 16
    assert {planned.outcome.finished.usage.prefill for planned in finished_rounds(cluster)} == {"local"}
    cluster.finish()


def test_without_workers_rounds_in_flight_fail_by_their_deadline() -> None:
    cluster = build("ampd", num_prefill=0, num_decode=1)
    cluster.run_for(1.0)
    plan_rounds(cluster, num_sessions=3, num_rounds=1, deadline_s=4.0)
    cluster.run_for(0.03)
    cluster.kill_worker("decode-0")
    cluster.run_for(10.0)
    failures = [planned.outcome.failed for client in cluster.clients.values() for planned in client.done]
    assert [failed.error.code for failed in failures] == ["deadline_exceeded"] * 3
    assert len(cluster.published_failures) == 3, "each round has one terminal message"
    cluster.finish()


def test_a_cancelled_round_leaves_the_history_as_it_was() -> None:
    cluster = build("ampd", num_prefill=1, num_decode=1)
    cluster.run_for(1.0)
    client = cluster.add_client("s")
    for _ in range(2):
        client.plan(PlannedRound([1, 2, 3], max_output_tokens=20, deadline_s=60.0, as_chat=False))
    cluster.run_until(lambda: client.current is not None and client.current.index == 1, 10.0)
    client.cancel()
    client.plan(PlannedRound([4, 5], max_output_tokens=20, deadline_s=60.0, as_chat=False))
    cluster.finish()  # the client checks num_history_tokens of the third round
    assert client.done[1].outcome.failed.error.code == "cancelled"
    assert [type(message).__name__ for message in client.done[1].stream_terminals] == ["RoundFailed"]
    assert client.done[2].outcome.finished is not None


@pytest.mark.parametrize("policy", ["ampd", "adaptive", "remote"])
def test_a_replayed_log_gives_the_same_commands(policy: str) -> None:
    cluster = build(policy, seed=3)
    cluster.coordinator = None
    cluster.record_events = True
    cluster.start_coordinator()
    cluster.faults.drop = cluster.faults.duplicate = 0.03
    plan_rounds(cluster)
    cluster.run_for(0.3)
    cluster.kill_worker("decode-1")
    cluster.run_until(lambda: not any(client.is_busy for client in cluster.clients.values()), 600.0)
    assert len(cluster.event_log) > 300
    fresh = Coordinator(cluster.config)
    for now, event, commands in cluster.event_log:
        assert fresh.on_event(event, now) == commands


def inject_fault(cluster: SimCluster) -> None:
    draw = cluster.random
    workers = list(cluster.workers.values())
    victim = draw.choice(workers)
    match draw.randrange(8):
        case 0:
            cluster.kill_worker(victim.worker_id)
            cluster.add_worker(victim.worker_id, victim.role)
        case 1:
            cluster.kill_worker(victim.worker_id)
            cluster.add_worker(f"{victim.role}-{cluster.take_number()}", victim.role)
        case 2:
            cluster.kill_coordinator()
            cluster.run_for(draw.choice([0.0, 0.01, 1.0]))
            cluster.start_coordinator()
        case 3:
            draw.choice(list(cluster.clients.values())).cancel()
        case 4:
            for key in list(victim.sessions):
                victim.fail_run(key, draw.choice([ErrorCode.OUT_OF_BLOCKS, ErrorCode.KV_TRANSFER_FAILED]))
        case 5:
            victim.forget_kv()
        case 6:
            cluster.faults = Faults(
                drop=draw.choice([0.0, 0.05]),
                duplicate=draw.choice([0.0, 0.1]),
                slow=draw.choice([0.0, 0.05]),
                append_fails=draw.choice([0.0, 0.05]),
                cut=draw.random() < 0.2,
            )
        case 7:
            victim.draining = not victim.draining


def test_kept_kv_is_used_and_what_is_new_is_staged_ahead() -> None:
    """Remote prefills by choice: what the prefill worker kept and what was staged it need not compute or pull again."""
    cluster = SimCluster(
        seed=5,
        config=CoordinatorConfig(
            policy="remote", policy_options={"stages": True, "routing.reads_history": True}, min_staged_tokens=1
        ),
    )
    cluster.add_worker("decode-0", "decode")
    prefill = cluster.add_worker("prefill-0", "prefill")
    client = cluster.add_client("s")
    num_prompt = 0
    for index in range(5):
        client.plan(PlannedRound([1, 2, 3], max_output_tokens=8, deadline_s=60.0, as_chat=False))
        cluster.run_until(lambda: not client.is_busy, 10.0)
        cluster.run_for(1.0)  # its tool runs
        num_prompt = len(client.history)
        assert prefill.resident[client.key].num_tokens == num_prompt - 1, f"after round {index}"
    assert prefill.num_reused_tokens > 0
    assert cluster.coordinator.state.counters["stagings_done"] == 5
    assert cluster.num_mismatches == 0
    cluster.finish()


@pytest.mark.parametrize("seed", range(14))
def test_everything_goes_wrong_again_and_again(seed: int) -> None:
    cluster = build(sorted(POLICIES)[seed % len(POLICIES)], seed=seed)
    plan_rounds(cluster, num_sessions=6, num_rounds=15)
    for _ in range(60):
        cluster.run_for(cluster.random.choice([0.003, 0.02, 0.1, 0.5]))
        inject_fault(cluster)
    for worker in cluster.workers.values():
        worker.draining = False
    cluster.finish()
    ended = [planned for client in cluster.clients.values() for planned in client.done]
    assert len(ended) == 90, f"seed {seed}"
    assert len(finished_rounds(cluster)) > 45, f"seed {seed}"
