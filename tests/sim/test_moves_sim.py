"""Sessions that move from one decode worker to another, with their KV, in virtual time: no fault, each kind of fault,
and all of them at once. SimWorker asserts that what is read is the conversation's KV, SimCluster.finish that nothing is
left at any worker that a session has been at."""

from __future__ import annotations

from itertools import pairwise

import pytest
from moving_policy import MIXED, MOVING, configure
from sim_client import PlannedRound
from sim_cluster import SimCluster
from test_coordinator_sim import finished_rounds, inject_fault, plan_rounds

from shared.core.policies import SchedulingPolicy
from shared.core.routing import route_colocated


def build(policy: SchedulingPolicy = MOVING, *, num_decode: int = 3, num_prefill: int = 0, seed: int = 1) -> SimCluster:
    cluster = SimCluster(seed=seed, config=configure(policy, min_staged_tokens=1))
    for number in range(num_decode):
        cluster.add_worker(f"decode-{number}", "both" if number == 0 and num_prefill else "decode")
    for number in range(num_prefill):
        cluster.add_worker(f"prefill-{number}", "prefill")
    return cluster


def play_all(cluster: SimCluster, limit_s: float = 600.0) -> None:
    cluster.run_until(lambda: not any(client.is_busy for client in cluster.clients.values()), limit_s)


def counters(cluster: SimCluster) -> dict[str, int]:
    assert cluster.coordinator is not None
    return cluster.coordinator.state.counters


def test_every_later_round_runs_elsewhere_and_computes_only_what_is_new() -> None:
    cluster = build()
    plan_rounds(cluster, num_sessions=4, num_rounds=5)
    play_all(cluster)
    assert counters(cluster)["moves"] == 4 * 4
    assert cluster.num_failed_moves == 0
    for client in cluster.clients.values():
        usages = [planned.outcome.finished.usage for planned in client.done]
        for before, usage in pairwise(usages):
            assert (usage.moved_from, usage.decode_worker) == (before.decode_worker, usage.prefill_worker)
            assert usage.moved_from != usage.decode_worker
            assert usage.num_cached_tokens == usage.num_moved_tokens == usage.num_history_tokens - 1
    held = [key for worker in cluster.workers.values() for key in worker.sessions]
    cluster.run_for(1.0)
    assert sorted(held) == sorted(cluster.clients), "each session is at one worker"
    cluster.finish()


def test_moves_beside_remote_prefills_and_staging() -> None:
    cluster = build(MIXED, num_prefill=2)
    plan_rounds(cluster, num_sessions=6, num_rounds=8)
    play_all(cluster)
    assert len(finished_rounds(cluster)) == 48
    assert cluster.num_moved_tokens > 0
    assert {planned.outcome.finished.attempt for planned in finished_rounds(cluster)} == {1}
    assert {observed.usage.prefill for observed in cluster.observed} == {"local", "remote"}
    cluster.finish()


@pytest.mark.parametrize("kill_after_s", [0.0005, 0.002, 0.004, 0.008, 0.02])
@pytest.mark.parametrize("victim", ["decode-0", "decode-1"])
def test_a_worker_that_dies_while_sessions_move(victim: str, kill_after_s: float) -> None:
    """As source or as destination, before, while and after the KV is read."""
    cluster = build(num_decode=2, seed=int(kill_after_s * 1e4))
    cluster.run_for(1.0)
    plan_rounds(cluster, num_sessions=4, num_rounds=4)
    cluster.run_until(lambda: len(finished_rounds(cluster)) >= 4, 10.0)
    cluster.run_for(kill_after_s)
    cluster.kill_worker(victim)
    cluster.run_for(0.3)
    cluster.add_worker("decode-2", "decode")
    play_all(cluster)
    assert len(finished_rounds(cluster)) == 16
    cluster.finish()


@pytest.mark.parametrize("kill_after_s", [0.0005, 0.001, 0.002, 0.004, 0.01, 0.03])
@pytest.mark.parametrize("down_s", [0.05, 5.0])
def test_a_coordinator_that_dies_while_sessions_move(kill_after_s: float, down_s: float) -> None:
    cluster = build(seed=int(kill_after_s * 1e4))
    cluster.run_for(1.0)
    plan_rounds(cluster, num_sessions=6)
    cluster.run_until(lambda: len(finished_rounds(cluster)) >= 6, 10.0)
    cluster.run_for(kill_after_s)
    cluster.kill_coordinator()
    cluster.run_for(down_s)
    cluster.start_coordinator()
    play_all(cluster)
    attempts = [planned.outcome.finished.attempt for planned in finished_rounds(cluster)]
    assert attempts == [1] * 24, "the workers lived: nothing ran twice"
    cluster.finish()


def test_a_cut_data_plane_costs_the_kv_and_no_round() -> None:
    cluster = build()
    cluster.faults.cut = True
    plan_rounds(cluster)
    play_all(cluster)
    assert [planned.outcome.finished.attempt for planned in finished_rounds(cluster)] == [1] * 16
    assert (cluster.num_moved_tokens, cluster.num_failed_moves) == (0, 12)
    assert {observed.usage.num_moved_tokens for observed in cluster.observed if observed.usage.moved_from} == {0}
    cluster.finish()


def test_a_session_leaves_a_worker_that_drains_with_its_kv() -> None:
    cluster = SimCluster(
        seed=2, config=configure(SchedulingPolicy(name="stay", route=route_colocated, moves_sessions=True))
    )
    first = cluster.add_worker("decode-0", "decode")
    client = cluster.add_client("s")
    client.plan(PlannedRound([1, 2, 3], max_output_tokens=8, deadline_s=60.0, as_chat=False))
    play_all(cluster)
    first.draining = True
    cluster.add_worker("decode-1", "decode")
    cluster.run_for(2.0)
    client.plan(PlannedRound([4, 5], max_output_tokens=8, deadline_s=60.0, as_chat=False))
    play_all(cluster)
    usage = client.done[1].outcome.finished.usage
    assert (usage.moved_from, usage.decode_worker) == ("decode-0", "decode-1")
    assert usage.num_moved_tokens == usage.num_history_tokens - 1
    cluster.finish()


@pytest.mark.parametrize("policy", [MOVING, MIXED], ids=lambda policy: policy.name)
@pytest.mark.parametrize("seed", range(5))
def test_everything_goes_wrong_while_sessions_move(policy: SchedulingPolicy, seed: int) -> None:
    cluster = build(policy, num_prefill=2 if policy is MIXED else 0, seed=seed)
    plan_rounds(cluster, num_sessions=6, num_rounds=12)
    for _ in range(60):
        cluster.run_for(cluster.random.choice([0.002, 0.01, 0.03, 0.1]))
        inject_fault(cluster)
    for worker in cluster.workers.values():
        worker.draining = False
    cluster.finish()
    ended = [planned for client in cluster.clients.values() for planned in client.done]
    assert len(ended) == 72, f"seed {seed}"
    assert cluster.num_moved_tokens > 0, f"seed {seed}"
