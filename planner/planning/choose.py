"""The plan that `ampd plan` answers with: the program's best ones, simulated, and what more GPUs would bring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from planner.planning.plans import SolvedPlan, solve_plan
from planner.planning.program import Objective, PlanProblem
from planner.planning.simulated import Simulated

FURTHER = (1, 2, 4, 8)
MARGINS = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5)  # of the rate: what the program did not foresee
CURVE = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)

Simulate = Callable[[Sequence[SolvedPlan]], list[Simulated]]  # the best first


@dataclass(frozen=True, slots=True)
class Choice:
    """`plan` is the first of `simulated`, or the program's own best where nothing was simulated."""

    plan: SolvedPlan
    simulated: list[Simulated]


def choose_plan(problem: PlanProblem, objective: Objective, num_plans: int, simulate: Simulate) -> Choice | None:
    """None when no plan is feasible. The fewest GPUs are planned for a higher rate where the simulation misses the
    target at the one that is asked for."""
    best: Choice | None = None
    for margin in MARGINS if objective == "min-gpus" else MARGINS[:1]:
        plans = list_plans(replace(problem, rate=margin * problem.rate), objective, num_plans)
        if not plans:
            break
        simulated = simulate(plans) if num_plans else []
        if not simulated:
            return Choice(plans[0], [])
        attainment = simulated[0].outcome.attainment
        if best is None or attainment > best.simulated[0].outcome.attainment:
            best = Choice(simulated[0].plan, simulated)
        if attainment >= problem.target:
            break
    return best


def list_plans(problem: PlanProblem, objective: Objective, num_plans: int) -> list[SolvedPlan]:
    """The best first, those after it at least a sixteenth of the GPUs away from each before; at least one, if any."""
    distance = max(1, sum(problem.gpus.values()) // 16)
    plans: list[SolvedPlan] = []
    for _ in range(max(1, num_plans)):
        plan = solve_plan(problem, objective, apart_from=tuple(plans), distance=distance)
        if plan is None:
            break
        plans.append(plan)
    return plans


def measure_gains(problem: PlanProblem) -> dict[str, dict[int, float]]:
    """What the program's capacity gains by further GPUs of each type. It never loses: what is below is the gap at which
    the solver stops."""
    now = _capacity(problem)
    return {
        gpu_type: {
            n: max(0.0, _capacity(replace(problem, gpus={**problem.gpus, gpu_type: problem.gpus[gpu_type] + n})) - now)
            for n in FURTHER
        }
        for gpu_type in problem.gpus
    }


def measure_curve(problem: PlanProblem) -> list[tuple[int, float]]:
    """(GPUs, sessions per second), all types together scaled."""
    curve: dict[int, float] = {}
    for factor in CURVE:
        gpus = {gpu_type: max(1, round(factor * n)) for gpu_type, n in problem.gpus.items()}
        curve[sum(gpus.values())] = _capacity(replace(problem, gpus=gpus))
    return sorted(curve.items())


def _capacity(problem: PlanProblem) -> float:
    plan = solve_plan(problem, "goodput")
    return 0.0 if plan is None else -plan.objective  # its rate may give up a little for fewer GPUs
