"""The program of planner/planning over workers that already run: only their roles are open."""

from __future__ import annotations

from dataclasses import dataclass

from planner.planning.program import PlanProblem, PlanProgram, build_program
from planner.planning.solve import solve
from planner.replanning.running import RoleCounts

Kind = tuple[str, int]  # GPU type, parallel degree
ENOUGH = 0.97  # of the best capacity: what lies between is not worth a change
COMFORT = 0.7  # of the capacity that a workload should use: more capacity than that needs no further change


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """Sessions per second: capacity with the roles as they are, with the best roles, and with those proposed;
    `decoding`: how many of each kind decode then."""

    now: float
    best: float
    proposed: float
    decoding: dict[Kind, int]


def measure_capacity(problem: PlanProblem, counts: RoleCounts) -> float:
    """Sessions per second with the roles as they are."""
    return _solve_fixed(problem, counts, counts.decoding)


def assess_roles(problem: PlanProblem, counts: RoleCounts) -> Assessment:
    """The fewest changes of role that bring the capacity to ENOUGH of the best, or the load to COMFORT."""
    now = measure_capacity(problem, counts)
    program = _build(problem, counts)
    found = solve(program.lp)
    best = found.values[program.rate] if found.values else 0.0
    wanted = min(ENOUGH * best, problem.rate / COMFORT)
    if now >= wanted:
        return Assessment(now=now, best=best, proposed=now, decoding=dict(counts.decoding))
    program.lp.variables[program.rate].low = wanted * (1.0 - 1e-6)
    program.lp.minimise(_add_changes(program, counts))
    answer = solve(program.lp)
    values = answer.values or found.values
    decoding = {_kind(program, place): round(values[variable]) for place, variable in program.num_decode.items()}
    decoding = {kind: decoding.get(kind, 0) for kind in counts.total}
    return Assessment(now=now, best=best, proposed=_solve_fixed(problem, counts, decoding), decoding=decoding)


def _build(problem: PlanProblem, counts: RoleCounts) -> PlanProgram:
    """Every worker that there is has a role, and there are no others."""
    program = build_program(problem, "goodput")
    program.lp.rows = [row for row in program.lp.rows if not row.name.startswith(("gpus of", "nodes of"))]
    for place, kind in enumerate(problem.kinds):
        total = float(counts.total.get((kind.gpu_type, kind.parallel_degree), 0))
        roles = [table[place] for table in (program.num_prefill, program.num_decode) if place in table]
        for variable in roles:
            program.lp.variables[variable].high = total
        if roles:  # a kind that can do neither stands idle
            program.lp.require(f"workers of {kind.name}", dict.fromkeys(roles, 1.0), low=total, high=total)
    return program


def _add_changes(program: PlanProgram, counts: RoleCounts) -> dict[int, float]:
    """Costs that count the workers which change between decoding and not."""
    lp, costs = program.lp, {}
    for place, variable in program.num_decode.items():
        kind = _kind(program, place)
        more, fewer = lp.add(f"begin to decode, {kind}"), lp.add(f"stop decoding, {kind}")
        before = float(counts.decoding.get(kind, 0))
        lp.require(f"changes, {kind}", {variable: 1.0, more: -1.0, fewer: 1.0}, low=before, high=before)
        costs[more] = costs[fewer] = 1.0
    return costs


def _solve_fixed(problem: PlanProblem, counts: RoleCounts, decoding: dict[Kind, int]) -> float:
    program = _build(problem, counts)
    for place, variable in program.num_decode.items():
        program.lp.fix({variable: float(decoding.get(_kind(program, place), 0))})
    solution = solve(program.lp)
    return solution.values[program.rate] if solution.values else 0.0


def _kind(program: PlanProgram, place: int) -> Kind:
    kind = program.problem.kinds[place]
    return kind.gpu_type, kind.parallel_degree
