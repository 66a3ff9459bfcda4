"""Plans one change away from a plan: one worker has the other role, two become one of twice the parallel degree, or one
becomes two. The program may think less of them than the simulation does: it divides work as is best for it, where the
policy decides round by round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from planner.planning.plans import NO_RATE, PlanRole, SolvedPlan, WorkerCount, fix_plan
from planner.planning.program import PlanProblem
from planner.planning.solve import solve

OTHER_ROLE: dict[PlanRole, PlanRole] = {"prefill": "both", "both": "prefill"}


def list_neighbours(problem: PlanProblem, plan: SolvedPlan) -> list[SolvedPlan]:
    """Those that fit the nodes and serve anything, the one the program thinks most of first. Solution and objective
    stay those of `plan`."""
    allowed = {("prefill", kind.gpu_type, kind.parallel_degree) for kind in problem.kinds if kind.can_prefill}
    allowed |= {("both", kind.gpu_type, kind.parallel_degree) for kind in problem.kinds if kind.can_decode}
    found = []
    for changed in _change_one(plan):
        if any((one.role, one.gpu_type, one.parallel_degree) not in allowed for one in changed.workers):
            continue
        program, lp = fix_plan(problem, changed)
        solution = solve(lp)
        if solution.values and solution.values[program.rate] > NO_RATE:
            found.append(replace(changed, rate=solution.values[program.rate]))
    return sorted(found, key=lambda one: -one.rate)


def _change_one(plan: SolvedPlan) -> Iterator[SolvedPlan]:
    for one in plan.workers:
        single = replace(one, replicas=1)
        yield _swap(plan, {single: 1}, {replace(single, role=OTHER_ROLE[one.role]): 1})
        if one.replicas >= 2:
            yield _swap(plan, {single: 2}, {replace(single, parallel_degree=2 * one.parallel_degree): 1})
        if one.parallel_degree % 2 == 0:
            yield _swap(plan, {single: 1}, {replace(single, parallel_degree=one.parallel_degree // 2): 2})


def _swap(plan: SolvedPlan, gone: dict[WorkerCount, int], new: dict[WorkerCount, int]) -> SolvedPlan:
    counts = Counter({replace(one, replicas=1): one.replicas for one in plan.workers})
    counts.subtract(gone)
    counts.update(new)
    left = (replace(one, replicas=number) for one, number in counts.items() if number)
    workers = tuple(sorted(left, key=lambda one: (one.role == "both", one)))  # as the program lists them
    return replace(plan, workers=workers, num_changes=plan.num_changes + 1)
