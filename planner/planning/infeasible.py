"""Why there is no plan: which constraint cannot hold, and the smallest change of a number that would make it hold."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from planner.planning.plans import solve_plan
from planner.planning.program import PlanProblem, build_program
from planner.planning.solve import solve
from planner.planning.worker_kinds import ITL_SHARE, WorkerKind
from planner.planning.workload_model import WorkloadModel
from shared.core.step_costs import StepCosts
from shared.errors import AmpdError, ErrorCode
from shared.messages import Slo

MOST_TIMES_GPUS = 1_024  # how far more GPUs are tried

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
    """Even an idle cluster of the fastest workers is late too often."""
    rounds = [one for session in workload.sessions for one in session]
    allowed = int((1.0 - problem.target) * len(rounds))
    needed = {}
    for kind in _deployable(problem):
        if kind.can_prefill or kind.can_decode:
            costs: StepCosts = kind.costs
            times = sorted(costs.prefill_s(one.num_history_tokens, one.num_input_tokens) for one in rounds)
            needed[kind.name] = times[len(times) - 1 - allowed]
    name, needed_s = min(needed.items(), key=lambda one: one[1])
    if needed_s <= slo.ttft_s:
        return None
    return (
        f"a TTFT of {slo.ttft_s:g} s cannot be kept by {problem.target:.0%} of the rounds, even on idle workers: the "
        f"fastest ({name}) take {needed_s:.3g} s for that: set --ttft-slo to {1.01 * needed_s:.3g} or more"
    )


def _deployable(problem: PlanProblem) -> list[WorkerKind]:
    return [kind for kind in problem.kinds if problem.gpus[kind.gpu_type] >= kind.parallel_degree]


def _explain_rate(problem: PlanProblem) -> str:
    """Everything can be kept at a lower rate, or with more GPUs."""
    best = solve_plan(problem, "goodput")
    sustained = 0.0 if best is None else best.rate
    limits = [name for name in FAMILIES if _is_feasible_without(problem, name)]
    given = ", ".join(f"{n} {gpu_type}" for gpu_type, n in problem.gpus.items())
    relaxations = []
    if sustained > 0.0:
        relaxations.append(f"a rate of at most {sustained:.4g}")
    factor = _least_gpu_factor(problem)
    if factor is not None:
        relaxations.append(f"{factor} GPUs in all")
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


def _least_gpu_factor(problem: PlanProblem) -> int | None:
    """The fewest GPUs that serve the rate, were there enough of each type."""
    gpus = {gpu_type: num * MOST_TIMES_GPUS for gpu_type, num in problem.gpus.items()}
    plan = solve_plan(replace(problem, gpus=gpus), "min-gpus")
    return None if plan is None else plan.num_gpus
