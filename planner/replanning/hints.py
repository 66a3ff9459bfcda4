"""For an outer autoscaler: how many workers of each kind and role the workload wants, with room to spare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.planning.plans import PlanRole, solve_plan
from planner.planning.program import PlanProblem
from planner.replanning.roles import COMFORT
from planner.replanning.running import RunningWorker

MOST_TIMES = 64  # as many GPUs as there are of a type, at most


@dataclass(frozen=True, slots=True)
class ScalingHint:
    role: PlanRole
    gpu_type: str
    parallel_degree: int
    running: int
    wanted: int


def hint_replicas(problem: PlanProblem, workers: Sequence[RunningWorker]) -> list[ScalingHint]:
    """Of the kinds that run: the fewest GPUs that serve the rate at COMFORT of their capacity. None when no number of
    such workers would."""
    kinds = {worker.kind for worker in workers}
    wanted = solve_plan(
        replace(
            problem,
            kinds=tuple(kind for kind in problem.kinds if (kind.gpu_type, kind.parallel_degree) in kinds),
            gpus={gpu_type: MOST_TIMES * num for gpu_type, num in problem.gpus.items()},
            rate=problem.rate / COMFORT,
        ),
        "min-gpus",
    )
    if wanted is None:
        return []
    table = {(one.role, (one.gpu_type, one.parallel_degree)): one.replicas for one in wanted.workers}
    roles: tuple[PlanRole, ...] = ("prefill", "both")
    hints = []
    for role in roles:
        for kind in sorted(kinds):
            running = sum(worker.kind == kind and worker.decodes == (role == "both") for worker in workers)
            replicas = table.get((role, kind), 0)
            if running or replicas:
                hints.append(ScalingHint(role, *kind, running, replicas))
    return hints
