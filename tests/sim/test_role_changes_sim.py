"""Workers take other roles while sessions play, in virtual time: no round is lost, and with every bus fault, too."""

from __future__ import annotations

import pytest
from moving_policy import MIXED, MOVING, configure
from sim_cluster import Faults, SimCluster
from test_coordinator_sim import finished_rounds, plan_rounds

from shared.core.policies import POLICIES, SchedulingPolicy
from shared.messages import RoleChanged

CHANGES = (
    ("prefill-0", "decode"),
    ("decode-0", "prefill"),
    ("decode-1", "prefill"),
    ("decode-0", "decode"),
    ("decode-1", "both"),
)


def build(policy: SchedulingPolicy, seed: int = 1) -> SimCluster:
    cluster = SimCluster(seed=seed, config=configure(policy, min_staged_tokens=1))
    for number in range(2):
        cluster.add_worker(f"decode-{number}", "decode")
        cluster.add_worker(f"prefill-{number}", "prefill")
    cluster.run_for(0.1)
    return cluster


def play_with_changes(cluster: SimCluster, num_rounds: int = 30, every_s: float = 4.0) -> None:
    plan_rounds(cluster, num_sessions=6, num_rounds=num_rounds)
    for worker_id, role in CHANGES:
        cluster.run_for(every_s)
        assert any(client.is_busy for client in cluster.clients.values())
        cluster.change_role(worker_id, role)
    cluster.run_until(lambda: not any(client.is_busy for client in cluster.clients.values()), 900.0)
    assert len(finished_rounds(cluster)) == 6 * num_rounds


@pytest.mark.parametrize("policy", [*POLICIES.values(), MOVING, MIXED], ids=lambda policy: policy.name)
def test_no_round_fails_or_starts_again(policy: SchedulingPolicy) -> None:
    cluster = build(policy)
    play_with_changes(cluster)
    assert {planned.outcome.finished.attempt for planned in finished_rounds(cluster)} == {1}
    assert [type(answer) for answer in cluster.role_answers] == [RoleChanged] * len(CHANGES)
    assert {w.worker_id: w.role for w in cluster.workers.values()} == {
        "decode-0": "decode",
        "decode-1": "both",
        "prefill-0": "decode",
        "prefill-1": "prefill",
    }
    decoded = {observed.usage.decode_worker for observed in cluster.observed}
    assert "prefill-0" in decoded, "who was a prefill worker gets sessions"
    cluster.finish()


def test_the_kv_of_every_session_comes_along() -> None:
    """Where the policy moves sessions: only new tokens are computed, whoever decodes."""
    cluster = build(POLICIES["adaptive"])
    plan_rounds(cluster, num_sessions=6, num_rounds=1)
    cluster.run_until(lambda: not any(client.is_busy for client in cluster.clients.values()), 60.0)
    num_there = len(cluster.workers["decode-0"].sessions)
    assert num_there > 0
    cluster.change_role("decode-0", "prefill")
    cluster.run_for(1.0)
    assert len(cluster.workers["decode-0"].sessions) == num_there, "nothing moves before it is needed"
    for client in cluster.clients.values():
        for planned in client.done[:1]:
            client.plan(type(planned)([1, 2], 5, 60.0, as_chat=False))
    cluster.run_until(lambda: not any(client.is_busy for client in cluster.clients.values()), 60.0)
    usages = [observed.usage for observed in cluster.observed if observed.round == 1]
    moved = [usage for usage in usages if usage.moved_from]
    assert {usage.moved_from for usage in moved} == {"decode-0"}
    assert len(moved) == num_there
    assert all(usage.num_cached_tokens == usage.num_history_tokens - 1 for usage in moved)
    cluster.run_for(1.0)
    assert not cluster.workers["decode-0"].sessions
    cluster.finish()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("policy", [POLICIES["adaptive"], POLICIES["ampd"], MIXED], ids=lambda policy: policy.name)
def test_messages_that_are_lost_repeated_and_late_cost_no_round(policy: SchedulingPolicy, seed: int) -> None:
    cluster = build(policy, seed)
    cluster.faults = Faults(drop=0.05, duplicate=0.1, slow=0.1)
    play_with_changes(cluster)
    cluster.finish()


@pytest.mark.parametrize("kill_after_s", [0.0005, 0.002, 0.01, 0.5])
def test_a_coordinator_that_dies_meanwhile_learns_the_roles_from_the_heartbeats(kill_after_s: float) -> None:
    cluster = build(POLICIES["adaptive"], seed=int(kill_after_s * 1e4))
    plan_rounds(cluster, num_sessions=6, num_rounds=12)
    cluster.run_for(0.5)
    cluster.change_role("decode-0", "prefill")
    cluster.run_for(kill_after_s)
    cluster.kill_coordinator()
    cluster.run_for(0.3)
    cluster.start_coordinator()
    cluster.run_until(lambda: not any(client.is_busy for client in cluster.clients.values()), 900.0)
    assert len(finished_rounds(cluster)) == 72
    cluster.run_for(2.0)
    assert cluster.coordinator is not None
    for worker in cluster.workers.values():
        assert cluster.coordinator.state.fleet.workers[worker.worker_id].load.role == worker.role
    cluster.finish()
