"""Plans: which workers there are, as the program's answer and as what the simulator and a deployment need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from planner.planning.linear_program import LinearProgram
from planner.planning.program import Objective, PlanProblem, PlanProgram, build_program
from planner.planning.solve import TIME_LIMIT_S, Solution, solve
from shared.errors import AmpdError, ErrorCode

PlanRole = Literal["prefill", "both"]  # who decodes may prefill too
NO_RATE = 1e-9  # sessions per second: nothing can be served
WORTH = 0.01  # of the objective: what is given up at most for fewer GPUs and fewer kinds of workers
KIND_COST = 0.25  # GPUs: for every kind of worker that a plan has


@dataclass(frozen=True, slots=True, order=True)
class WorkerCount:
    role: PlanRole
    gpu_type: str
    parallel_degree: int
    replicas: int

    @property
    def num_gpus(self) -> int:
        return self.parallel_degree * self.replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvedPlan:
    """rate: sessions per second that its workers sustain; for min-p95 those that were asked for. objective: what was
    minimised, before fewer GPUs were looked for: minus the highest rate, GPUs, or seconds. num_changes: steps of
    `list_neighbours` from the program's plan that this one comes from, which objective and solution are of."""

    workers: tuple[WorkerCount, ...]
    rate: float
    objective: float
    solution: Solution
    num_changes: int = 0

    @property
    def num_gpus(self) -> int:
        return sum(one.num_gpus for one in self.workers)

    def describe(self) -> str:
        return " + ".join(f"{w.replicas} {w.role} {w.gpu_type} x {w.parallel_degree}" for w in self.workers)


def solve_plan(
    problem: PlanProblem,
    objective: Objective,
    *,
    apart_from: tuple[SolvedPlan, ...] = (),
    distance: int = 1,
    time_limit_s: float = TIME_LIMIT_S,
) -> SolvedPlan | None:
    """The best plan that differs from each of `apart_from` by at least `distance` GPUs, as `keep_apart` counts them;
    None when none is feasible. Raises AmpdError DEADLINE_EXCEEDED when the solver has found none in time.

    Solved twice: for the objective, then, giving up no more than WORTH of it, for the fewest GPUs (for the most rate
    with the fewest GPUs, where they are the objective).
    """
    program = build_program(problem, objective)
    for number, other in enumerate(apart_from):
        keep_apart(program, other, distance, number)
    first = solve(program.lp, time_limit_s=time_limit_s)
    if first.status == "time limit" and not first.values:
        raise AmpdError(
            ErrorCode.DEADLINE_EXCEEDED,
            f"the solver has found no plan within {time_limit_s:g} s: give fewer GPU types, or a profile with fewer "
            "parallel degrees",
        )
    if not first.values or first.values[program.rate] <= NO_RATE:
        return None
    _refine(program, objective, first)
    second = solve(program.lp, time_limit_s=time_limit_s)
    values = second.values or first.values
    seconds = first.seconds + second.seconds
    return SolvedPlan(
        workers=tuple(_read_workers(program, values)),
        rate=values[program.rate],
        objective=first.objective,
        solution=replace(first, seconds=seconds, values=values),
    )


def _refine(program: PlanProgram, objective: Objective, first: Solution) -> None:
    lp = program.lp
    worst = first.objective + (0.5 if objective == "min-gpus" else WORTH * abs(first.objective))  # GPUs are whole
    achieved = {index: variable.cost for index, variable in enumerate(lp.variables) if variable.cost}
    lp.require("as good", achieved, high=worst)
    if objective == "min-gpus":
        lp.variables[program.rate].high = float("inf")
        lp.minimise({program.rate: -1.0})
    else:
        lp.minimise({**program.gpu_costs(), **_count_kinds(program)})


def _count_kinds(program: PlanProgram) -> dict[int, float]:
    """Costs of binaries that are 1 where there are workers: their number is at most the most there can be, times it."""
    lp, costs = program.lp, {}
    for variable in program.counts:
        name = lp.variables[variable].name
        is_there = lp.add(f"any {name}", high=1.0, is_integer=True)
        lp.require(f"any {name}", {variable: 1.0, is_there: -lp.variables[variable].high}, high=0.0)
        costs[is_there] = KIND_COST
    return costs


def _read_workers(program: PlanProgram, values: tuple[float, ...]) -> Iterator[WorkerCount]:
    roles: tuple[tuple[PlanRole, dict[int, int]], ...] = (
        ("prefill", program.num_prefill),
        ("both", program.num_decode),
    )
    for role, counts in roles:
        for place, variable in counts.items():
            kind, replicas = program.problem.kinds[place], round(values[variable])
            if replicas:
                yield WorkerCount(role, kind.gpu_type, kind.parallel_degree, replicas)


def _list_roles(program: PlanProgram) -> tuple[tuple[PlanRole, dict[int, int]], ...]:
    return ("prefill", program.num_prefill), ("both", program.num_decode)


def count_of(program: PlanProgram, plan: SolvedPlan) -> dict[int, int]:
    """Variables that count workers -> their number in the plan."""
    table = {(w.role, w.gpu_type, w.parallel_degree): w.replicas for w in plan.workers}
    numbers: dict[int, int] = {}
    for role, counts in _list_roles(program):
        for place, variable in counts.items():
            kind = program.problem.kinds[place]
            numbers[variable] = table.get((role, kind.gpu_type, kind.parallel_degree), 0)
    return numbers


def keep_apart(program: PlanProgram, other: SolvedPlan, distance: int, number: int) -> None:
    """The sum of |workers - other's| over the kinds, in GPUs, at least `distance`: a GPU that changes sides counts on
    both. Each difference is a surplus or a lack, never both: a binary says which."""
    lp = program.lp
    costs = program.gpu_costs()
    sizes: dict[int, float] = {}
    for variable, theirs in count_of(program, other).items():
        most = max(lp.variables[variable].high, float(theirs))
        name = f"{lp.variables[variable].name}, apart {number}"
        surplus, lack = lp.add(f"surplus, {name}", high=most), lp.add(f"lack, {name}", high=most)
        is_more = lp.add(f"more, {name}", high=1.0, is_integer=True)
        lp.require(f"difference, {name}", {variable: 1.0, surplus: -1.0, lack: 1.0}, low=theirs, high=theirs)
        lp.require(f"surplus only, {name}", {surplus: 1.0, is_more: -most}, high=0.0)
        lp.require(f"lack only, {name}", {lack: 1.0, is_more: most}, high=most)
        sizes[surplus] = sizes[lack] = costs[variable]
    lp.require(f"apart {number}", sizes, low=float(distance))


def fix_plan(problem: PlanProblem, plan: SolvedPlan) -> tuple[PlanProgram, LinearProgram]:
    """The linear program of a given plan's highest rate: nothing is an integer any more."""
    program = build_program(problem, "goodput")
    for variable, replicas in count_of(program, plan).items():
        program.lp.variables[variable].is_integer = False
        program.lp.fix({variable: float(replicas)})
    return program, program.lp
