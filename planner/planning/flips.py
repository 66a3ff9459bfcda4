"""Plans one role away from a plan. The program may think less of them than the simulation does: it divides work as is
best for it, where the policy decides round by round."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from planner.planning.plans import NO_RATE, PlanRole, SolvedPlan, WorkerCount, fix_plan
from planner.planning.program import PlanProblem
from planner.planning.solve import solve

OTHER_ROLE: dict[PlanRole, PlanRole] = {"prefill": "both", "both": "prefill"}


def flip_roles(problem: PlanProblem, plan: SolvedPlan) -> list[SolvedPlan]:
    """One worker of a kind has the other role: every way there is, the one the program thinks most of first. Solution
    and objective stay those of `plan`."""
    found = []
    decoding = {(kind.gpu_type, kind.parallel_degree) for kind in problem.kinds if kind.can_decode}
    for one in plan.workers:
        if (one.gpu_type, one.parallel_degree) not in decoding:  # who can decode can prefill
            continue
        flipped = _flip(plan, one)
        program, lp = fix_plan(problem, flipped)
        solution = solve(lp)
        if solution.values and solution.values[program.rate] > NO_RATE:
            found.append(replace(flipped, rate=solution.values[program.rate]))
    return sorted(found, key=lambda one: -one.rate)


def _flip(plan: SolvedPlan, worker: WorkerCount) -> SolvedPlan:
    counts = Counter({replace(one, replicas=1): one.replicas for one in plan.workers})
    counts[replace(worker, replicas=1)] -= 1
    counts[replace(worker, replicas=1, role=OTHER_ROLE[worker.role])] += 1
    left = (replace(one, replicas=number) for one, number in counts.items() if number)
    workers = tuple(sorted(left, key=lambda one: (one.role == "both", one)))  # as the program lists them
    return replace(plan, workers=workers, num_flips=plan.num_flips + 1)
