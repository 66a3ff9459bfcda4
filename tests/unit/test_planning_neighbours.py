"""Plans one change away from another."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning_samples import make_profile, make_toy_problem

from planner.planning.neighbours import list_neighbours
from planner.planning.plans import SolvedPlan, WorkerCount, fix_plan, solve_plan
from planner.planning.solve import Solution, solve


def plan_of(*workers: WorkerCount) -> SolvedPlan:
    solution = Solution(status="optimal", objective=-1.0, gap=0.0, seconds=0.0, values=())
    return SolvedPlan(workers=workers, rate=1.0, objective=-1.0, solution=solution)


def changes_of(plan: SolvedPlan, num_gpus: int = 8) -> set[frozenset[WorkerCount]]:
    return {frozenset(one.workers) for one in list_neighbours(make_toy_problem(num_gpus), plan)}


def test_one_role_changes_or_two_workers_become_one_or_one_becomes_two() -> None:
    few, many = WorkerCount("prefill", "toy", 1, 1), WorkerCount("both", "toy", 1, 3)
    large = WorkerCount("both", "toy", 2, 1)
    plan = plan_of(few, many, large)
    assert changes_of(plan) == {
        frozenset({replace(many, replicas=4), large}),
        frozenset({replace(few, replicas=2), replace(many, replicas=2), large}),
        frozenset({few, many, replace(large, role="prefill")}),
        frozenset({few, replace(many, replicas=1), replace(large, replicas=2)}),
        frozenset({few, replace(many, replicas=5)}),
    }
    found = list_neighbours(make_toy_problem(8), plan)
    assert [one.rate for one in found] == sorted((one.rate for one in found), reverse=True)
    assert all(one.num_changes == 1 and one.num_gpus == plan.num_gpus for one in found)
    assert all(two.num_changes == 2 for one in found for two in list_neighbours(make_toy_problem(8), one))


def test_what_does_not_fit_the_nodes_is_no_neighbour() -> None:
    """Nodes of six GPUs hold one worker of four each."""
    pair = plan_of(WorkerCount("both", "toy", 2, 2), WorkerCount("both", "toy", 4, 2))
    merged = frozenset({WorkerCount("both", "toy", 4, 3)})
    for node_size, fits in ((4, True), (6, False)):
        found = list_neighbours(make_toy_problem(12, profile=make_profile(devices_per_node=node_size)), pair)
        assert found
        assert (merged in {frozenset(one.workers) for one in found}) == fits


def test_its_rate_is_what_its_workers_sustain() -> None:
    problem = make_toy_problem(8)
    plan = solve_plan(problem, "goodput")
    assert plan is not None
    for one in list_neighbours(problem, plan):
        program, lp = fix_plan(problem, one)
        assert one.rate == pytest.approx(solve(lp).values[program.rate])
        assert one.rate <= -plan.objective * (1 + 1e-3), "the program's own is the best for the program"


def test_somebody_must_decode() -> None:
    assert list_neighbours(make_toy_problem(8), plan_of(WorkerCount("both", "toy", 1, 1))) == []


def test_who_cannot_decode_stays_a_prefill_worker() -> None:
    problem = make_toy_problem(8)
    kinds = tuple(replace(kind, can_decode=kind.parallel_degree > 1) for kind in problem.kinds)
    plan = plan_of(WorkerCount("prefill", "toy", 1, 2), WorkerCount("both", "toy", 2, 2))
    found = list_neighbours(replace(problem, kinds=kinds), plan)
    assert found
    assert all(one.parallel_degree > 1 for neighbour in found for one in neighbour.workers if one.role == "both")
