"""Plans one role away from another."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning_samples import make_toy_problem

from planner.planning.flips import flip_roles
from planner.planning.plans import SolvedPlan, WorkerCount, fix_plan, solve_plan
from planner.planning.solve import Solution, solve


def plan_of(*workers: WorkerCount) -> SolvedPlan:
    solution = Solution(status="optimal", objective=-1.0, gap=0.0, seconds=0.0, values=())
    return SolvedPlan(workers=workers, rate=1.0, objective=-1.0, solution=solution)


def test_one_worker_of_each_kind_changes_its_role() -> None:
    few, many = WorkerCount("prefill", "toy", 1, 2), WorkerCount("both", "toy", 1, 3)
    large = WorkerCount("both", "toy", 2, 1)
    plan = plan_of(few, many, large)
    flipped = flip_roles(make_toy_problem(8), plan)
    assert {frozenset(one.workers) for one in flipped} == {
        frozenset({replace(few, replicas=1), replace(many, replicas=4), large}),
        frozenset({replace(few, replicas=3), replace(many, replicas=2), large}),
        frozenset({few, many, replace(large, role="prefill")}),
    }
    assert [one.rate for one in flipped] == sorted((one.rate for one in flipped), reverse=True)
    assert all(one.num_flips == 1 and one.num_gpus == plan.num_gpus for one in flipped)
    assert all(two.num_flips == 2 for one in flipped for two in flip_roles(make_toy_problem(8), one))


def test_its_rate_is_what_its_workers_sustain() -> None:
    problem = make_toy_problem(8)
    plan = solve_plan(problem, "goodput")
    assert plan is not None
    for one in flip_roles(problem, plan):
        program, lp = fix_plan(problem, one)
        assert one.rate == pytest.approx(solve(lp).values[program.rate])
        assert one.rate <= -plan.objective * (1 + 1e-3), "the program's own is the best for the program"


def test_somebody_must_decode() -> None:
    assert flip_roles(make_toy_problem(8), plan_of(WorkerCount("both", "toy", 1, 1))) == []


def test_who_cannot_decode_stays_a_prefill_worker() -> None:
    problem = make_toy_problem(8)
    kinds = tuple(replace(kind, can_decode=kind.parallel_degree > 1) for kind in problem.kinds)
    plan = plan_of(WorkerCount("prefill", "toy", 1, 2), WorkerCount("both", "toy", 2, 2))
    (only,) = flip_roles(replace(problem, kinds=kinds), plan)
    assert only.workers == (
        WorkerCount("prefill", "toy", 1, 2),
        WorkerCount("prefill", "toy", 2, 1),
        WorkerCount("both", "toy", 2, 1),
    )
