"""Simulated workers take other roles: no round is lost, sessions leave as they do live, the same input gives the same
run. A case depends on its seed alone; a failure names it."""

from __future__ import annotations

import random

import pytest
from test_simulator import cluster, draw_cluster, draw_policy, draw_sessions, session, simulate

from planner.simulator.failures import Failure
from planner.simulator.role_changes import RoleChange
from planner.simulator.simulation import Result, Simulation
from shared.core.policies import POLICIES, find_policy, with_options
from shared.errors import AmpdError, ErrorCode
from shared.messages import Slo

SLO = Slo(ttft_s=2.0, itl_s=0.05)
STAYS_OPEN = {"admission": False}


def run_random_case(name: str, seed: int, *, with_failures: bool) -> Result:
    draws = random.Random(f"roles/{name}/{seed}/{with_failures}")
    where, policy = draw_cluster(draws), draw_policy(draws, name)
    assert where.kv_tokens is not None
    num_workers = sum(group.count for group in where.groups)
    max_tokens = int(where.kv_tokens * draws.choice((0.3, 0.6, 1.0)))
    sessions = draw_sessions(draws, draws.randint(1, 30), max_tokens, draws.choice((0.5, 5.0, 50.0, 1_000.0)))
    span_s = 1.5 * sessions[-1].arrival_s
    changes = [
        RoleChange(
            draws.randrange(num_workers), draws.choice(("prefill", "decode", "both")), draws.uniform(0.0, span_s)
        )
        for _ in range(draws.randint(1, 12))
    ]
    failures = [
        Failure(draws.randrange(num_workers), draws.uniform(0.001, span_s), draws.choice((0.5, 5.0)))
        for _ in range(draws.randint(1, 2) if with_failures else 0)
    ]
    slo = Slo(ttft_s=draws.choice((0.2, 2.0)), itl_s=draws.choice((0.02, 0.1)))
    result, _ = simulate(where, policy, sessions, slo, check_every=5, failures=failures, role_changes=changes)
    if not with_failures and not policy.admission:
        assert all(not r.error for r in result.rounds), "only failures and admission make a round fail here"
    return result


@pytest.mark.parametrize("with_failures", [False, True])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_seed_hangs_or_loses_anything(policy: str, with_failures: bool) -> None:
    num_changes = 0
    for seed in range(60):
        print(f"policy {policy} seed {seed}")
        num_changes += run_random_case(policy, seed, with_failures=with_failures).counters.role_changes
    assert num_changes > 30


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("at", [0.005, 0.05, 0.2, 0.5, 1.0])
def test_whatever_the_rounds_are_doing_they_go_on(policy: str, at: float) -> None:
    sessions = [session(i, 0.001 * i, (4_000, 60), (300, 20, 0.05), (300, 20, 0.05)) for i in range(6)]
    where = cluster(prefill=2, decode=2)
    changes = [RoleChange("decode-000", "prefill", at), RoleChange("prefill-000", "decode", at)]
    options = {"role_changes": changes, "slo": SLO}
    result, sim = simulate(where, with_options(find_policy(policy), STAYS_OPEN), sessions, **options)
    assert all(not r.error and r.attempt == 1 for r in result.rounds)
    assert (sim.counters.role_changes, sim.counters.role_changes_refused) == (2, 0)
    later = [r for r in result.rounds if r.sent_at > at]
    assert later
    assert all(r.decode.load.worker_id != "decode-000" for r in later)


def test_sessions_leave_with_their_kv_where_the_policy_moves_them_and_without_it_elsewhere() -> None:
    sessions = [session(0, 0.0, (4_000, 60), (100, 10, 5.0))]
    changes = [RoleChange(0, "prefill", 4.0)]
    played = {}
    for policy in ("adaptive", "colocated"):
        result, sim = simulate(cluster(decode=2), policy, sessions, role_changes=changes)
        played[policy] = result.rounds[1]
        assert (sim.counters.moves, sim.counters.rebinds) == ((1, 0) if policy == "adaptive" else (0, 1))
        assert [r.decode.load.worker_id for r in result.rounds] == ["decode-000", "decode-001"]
        assert not sim.workers[0].memory.entries, "nothing stays behind"
    assert played["adaptive"].kv_bytes_read > 0
    assert played["adaptive"].ttft_s < played["colocated"].ttft_s / 2
    assert (played["adaptive"].num_cached, played["colocated"].num_cached) == (4_059, 0)


def test_a_change_that_would_leave_nobody_to_decode_is_refused() -> None:
    sessions = [session(0, 0.0, (100, 100))]
    changes = [RoleChange("decode-000", "prefill", 0.1), RoleChange(0, "both", 0.2)]
    result, sim = simulate(cluster(prefill=1, decode=1), "ampd", sessions, role_changes=changes)
    assert (sim.counters.role_changes, sim.counters.role_changes_refused) == (1, 1)
    assert not result.rounds[0].error


def test_a_change_can_be_planned_on_the_simulation_by_index_or_id() -> None:
    sim = Simulation(cluster(prefill=1, decode=1), find_policy("ampd"), [session(0, 0.0, (100, 200))], SLO)
    sim.change_role(0, "both", 0.1)
    sim.change_role("decode-000", "prefill", 0.2)
    sim.run()
    assert [worker.load.role for worker in sim.workers] == ["both", "prefill"]
    for wrong in (2, -1, "decode-001"):
        with pytest.raises(AmpdError, match=r"0 \(prefill-000\), 1 \(decode-000\)") as refused:
            sim.change_role(wrong, "both", 0.1)
        assert refused.value.code == ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_same_input_gives_the_same_run(policy: str) -> None:
    def tell(result: Result) -> list[object]:
        return [(r.session.index, r.index, r.sent_at, r.finished_at, r.decode.index, r.gaps) for r in result.rounds]

    assert tell(run_random_case(policy, 7, with_failures=True)) == tell(run_random_case(policy, 7, with_failures=True))
