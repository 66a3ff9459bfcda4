"""Why there is no plan: which constraint cannot hold, and the smallest change of a number that would make it hold.

What fails at any rate is named alone, the first of it that is found; what only fails at this rate, with the highest
rate and the fewest GPUs that would do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import replace
from math import floor, inf, log10

from planner.planning.plans import solve_plan
from planner.planning.program import PlanProblem, build_program
from planner.planning.solve import solve
from planner.planning.worker_kinds import ITL_SHARE, WorkerKind, split_rounds
from planner.planning.workload_model import RoundShape, WorkloadModel
from shared.errors import AmpdError, ErrorCode
from shared.messages import Slo

MOST_TIMES_GPUS = 1_024  # how far more GPUs are tried
DIGITS = 4  # of a rate that is named
ROUNDING = 1e-9  # 10 rounds x (1 - 0.9) are 1 that may be late

FAMILIES = {
    "gpus": ("gpus of", "nodes of"),
    "time of workers": ("time of",),
    "KV memory": ("KV memory",),
    "links": ("links of",),
    "TTFT": ("rounds on time",),
}


def explain_infeasible(problem: PlanProblem, workload: WorkloadModel, slo: Slo) -> AmpdError:
    """The typed error for a problem without a plan at its rate."""
    for check in (_check_context, _check_gpus, _check_itl, _check_ttft):
        fault = check(problem, workload, slo)
        if fault is not None:
            return AmpdError(ErrorCode.INVALID_REQUEST, fault)
    return AmpdError(ErrorCode.INVALID_REQUEST, _explain_rate(problem))


def _check_context(problem: PlanProblem, workload: WorkloadModel, _: Slo) -> str | None:
    most = max(kind.num_kv_tokens for kind in problem.kinds)
    longest = workload.longest_context
    if most >= longest:
        return None
    return (
        f"the longest session has {longest} tokens of context, and the largest worker ({_largest(problem).name}) holds "
        f"KV of {most}: cut sessions with --max-context {most}, or use GPUs with more memory"
    )


def _largest(problem: PlanProblem) -> WorkerKind:
    return max(problem.kinds, key=lambda kind: kind.num_kv_tokens)


def _check_gpus(problem: PlanProblem, workload: WorkloadModel, _: Slo) -> str | None:
    holding = [kind for kind in problem.kinds if kind.num_kv_tokens >= workload.longest_context]
    if any(problem.gpus[kind.gpu_type] >= kind.parallel_degree for kind in holding):
        return None
    smallest = min(holding, key=lambda kind: kind.parallel_degree)
    given = ", ".join(f"{n} {gpu_type}" for gpu_type, n in problem.gpus.items())
    return (
        f"{given}: the smallest worker that holds a session of {workload.longest_context} tokens has "
        f"{smallest.parallel_degree} GPUs ({smallest.name}): give at least {smallest.parallel_degree}"
    )


def _check_itl(problem: PlanProblem, workload: WorkloadModel, slo: Slo) -> str | None:
    holding = [kind for kind in _deployable(problem) if kind.num_kv_tokens >= workload.longest_context]
    if any(kind.can_decode for kind in holding):
        return None
    context = max(1.0, problem.load.decode_context)
    fastest = min(holding, key=lambda kind: kind.costs.decode_step_s(1, context))
    step_s = fastest.costs.decode_step_s(1, context)
    return (
        f"an ITL of {slo.itl_s:g} s cannot be kept: a decode step of one sequence takes {step_s:.3g} s on the fastest "
        f"worker ({fastest.name}), and may take {ITL_SHARE:.0%} of the objective: set --itl-slo to "
        f"{1.01 * step_s / ITL_SHARE:.3g} or more"
    )


def _check_ttft(problem: PlanProblem, workload: WorkloadModel, slo: Slo) -> str | None:
    """Even an idle cluster of the fastest workers is late too often: each for first rounds, and for later ones."""
    rounds = [one for session in workload.sessions for one in session]
    allowed = (1.0 - problem.target) * len(rounds) + ROUNDING
    kinds = [kind for kind in _deployable(problem) if kind.can_prefill or kind.can_decode]
    tables = [[_list_prefills_s(kind, part) for kind in kinds] for part in split_rounds(rounds)]

    def count_late(ttft_s: float) -> int:
        return sum(min(sum(time_s > ttft_s for time_s in times) for times in table) for table in tables)

    if count_late(slo.ttft_s) <= allowed:
        return None
    later = sorted({time_s for table in tables for times in table for time_s in times if time_s > slo.ttft_s})
    needed_s = later[bisect_left(later, True, key=lambda ttft_s: count_late(ttft_s) <= allowed)]
    return (
        f"a TTFT of {slo.ttft_s:g} s cannot be kept by {problem.target:.0%} of the rounds, even on idle workers: the "
        f"fastest of {', '.join(kind.name for kind in kinds)} take {needed_s:.3g} s for that: set --ttft-slo to "
        f"{1.01 * needed_s:.3g} or more"
    )


def _list_prefills_s(kind: WorkerKind, rounds: list[RoundShape]) -> list[float]:
    return [kind.costs.prefill_s(one.num_history_tokens, one.num_input_tokens) for one in rounds]


def _deployable(problem: PlanProblem) -> list[WorkerKind]:
    return [kind for kind in problem.kinds if problem.gpus[kind.gpu_type] >= kind.parallel_degree]


def _explain_rate(problem: PlanProblem) -> str:
    """Everything can be kept at a lower rate, or with more GPUs."""
    best = solve_plan(problem, "goodput")
    limits = [name for name in FAMILIES if _is_feasible_without(problem, name)]
    given = ", ".join(f"{n} {gpu_type}" for gpu_type, n in problem.gpus.items())
    relaxations = []
    if best is not None:
        relaxations.append(f"a rate of at most {_round_down(-best.objective)}")
    more = _find_fewest_gpus(problem)
    if more:
        relaxations.append(f"{' + '.join(f'{num} {gpu_type}' for gpu_type, num in more.items())} in all")
    return (
        f"{given} cannot serve {problem.rate:g} sessions/s within the objectives; what cannot hold: "
        f"{' or '.join(limits) or 'several constraints together'}; smallest change: "
        f"{', or '.join(relaxations) or 'none'}"
    )


def _is_feasible_without(problem: PlanProblem, family: str) -> bool:
    program = build_program(problem, "min-gpus")
    prefixes = FAMILIES[family]
    program.lp.rows = [row for row in program.lp.rows if not row.name.startswith(prefixes)]
    if family == "gpus":
        for variable in program.counts:
            program.lp.variables[variable].high = inf
    return bool(solve(program.lp).values)


def _find_fewest_gpus(problem: PlanProblem) -> Counter[str]:
    """{GPU type: how many} of the fewest that serve the rate, were there enough of each type; empty where there is no
    such number."""
    gpus = {gpu_type: num * MOST_TIMES_GPUS for gpu_type, num in problem.gpus.items()}
    plan = solve_plan(replace(problem, gpus=gpus), "min-gpus")
    fewest: Counter[str] = Counter()
    for one in plan.workers if plan else ():
        fewest[one.gpu_type] += one.num_gpus
    return fewest


def _round_down(rate: float) -> str:
    """To DIGITS: as `g` writes it, but never above."""
    step = 10.0 ** (floor(log10(rate)) + 1 - DIGITS)
    return f"{floor(rate / step) * step:.{DIGITS}g}"
