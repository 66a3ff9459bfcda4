"""What a plan does at a rate: attainment and latencies from its capacity, by the closed forms of queueing.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from planner.planning.plans import SolvedPlan, fix_plan
from planner.planning.program import PlanProblem, PlanProgram
from planner.planning.queueing import missed_share, wait_quantile_s
from planner.planning.solve import Solution, solve
from planner.planning.worker_kinds import PREFILL_CLASSES, PrefillClass, WorkerKind
from shared.messages import Slo

NUM_BISECTIONS = 40
EPSILON = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """At `rate` sessions per second. capacity: what the workers sustain, EFFICIENCY of their time; goodput: the highest
    rate with the problem's target of rounds on time. `binding`: what limits the capacity, and by how many percent one
    percent more of it would raise that."""

    rate: float
    attainment: float
    ttft_p95_s: float
    itl_p95_s: float
    capacity_sessions_per_s: float
    goodput_sessions_per_s: float
    local_share: float
    binding: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class _Pool:
    """Everybody who may prefill, as one queue: mean service time of them all together, mean time of a prefill alone on
    its worker, and the share that is late though it waits for nobody."""

    service_s: float
    alone_s: float
    late_share: float
    local_share: float
    itl_s: float


def predict(problem: PlanProblem, plan: SolvedPlan, rate: float, slo: Slo) -> Prediction:
    program, lp = fix_plan(problem, plan)
    solution = solve(lp)
    if not solution.values or solution.values[program.rate] <= 0.0:
        return Prediction(rate=rate, attainment=0.0, ttft_p95_s=float("inf"), itl_p95_s=float("inf"), local_share=0.0,
                          capacity_sessions_per_s=0.0, goodput_sessions_per_s=0.0, binding=())  # fmt: skip
    capacity = solution.values[program.rate]
    pool = _measure_pool(program, solution.values)
    busy = rate / capacity
    return Prediction(
        rate=rate,
        attainment=attainment_at(pool, busy, problem.variability, slo),
        ttft_p95_s=pool.alone_s + wait_quantile_s(busy, pool.service_s, problem.variability, 0.95),
        itl_p95_s=pool.itl_s,
        capacity_sessions_per_s=capacity,
        goodput_sessions_per_s=capacity * _find_utilisation(pool, problem, slo),
        local_share=pool.local_share,
        binding=tuple(_list_binding(program, solution)),
    )


def _list_binding(program: PlanProgram, solution: Solution) -> list[tuple[str, float]]:
    """What holds back the rate, the strongest first: by how many percent it rises for one percent more of each. The
    flows are homogeneous in the rate and in what the workers supply, so the numbers add up to 1."""
    counts, rate = set(program.counts), solution.values[program.rate]
    binding = []
    for row, dual in zip(program.lp.rows, solution.duals, strict=True):
        supplied = -sum(c * solution.values[index] for index, c in row.coefficients.items() if index in counts)
        elasticity = -dual * supplied / rate
        if elasticity > EPSILON:
            binding.append((row.name, elasticity))
    return sorted(binding, key=lambda one: -one[1])


def attainment_at(pool: _Pool, utilisation: float, variability: float, slo: Slo) -> float:
    patience = max(0.0, slo.ttft_s - pool.alone_s) / pool.service_s if pool.service_s > 0.0 else 0.0
    return (1.0 - pool.late_share) * (1.0 - missed_share(utilisation, patience, variability))


def _find_utilisation(pool: _Pool, problem: PlanProblem, slo: Slo) -> float:
    """The highest at which the target is met; 0 when it never is. Those that are served in time are no more than what
    is served at all: 1 / utilisation."""
    low, high = 0.0, 1.0 / problem.target
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        if attainment_at(pool, middle, problem.variability, slo) >= problem.target:
            low = middle
        else:
            high = middle
    return low


def _measure_pool(program: PlanProgram, values: tuple[float, ...]) -> _Pool:
    problem = program.problem
    rounds = {**problem.load.rounds, "again": 0.0}  # they come with `later`
    total = alone = late = work = local = 0.0
    for name, kind, flow, is_local in _flows(program, values):
        num = flow * rounds[name]
        total += num
        local += num * is_local
        alone += num * kind.alone_s[name]
        late += num * kind.late_share[name]
        work += flow * kind.work_s[name]
    num_workers = sum(round(values[v]) for v in program.num_prefill.values())
    num_workers += sum(round(values[v]) for v in program.num_decode.values())
    steps = [
        (problem.kinds[place].modes[number].step_s, values[variable] * problem.kinds[place].modes[number].tokens_per_s)
        for (place, number), variable in program.mode_time.items()
    ]
    total = max(total, 1e-12)
    return _Pool(
        service_s=work / total / max(1, num_workers),
        alone_s=alone / total,
        late_share=late / total,
        local_share=local / total,
        itl_s=_weighted_quantile(steps, 0.95),
    )


def _flows(program: PlanProgram, values: tuple[float, ...]) -> Iterator[tuple[PrefillClass, WorkerKind, float, bool]]:
    for table, is_local in ((program.remote, False), (program.local, True)):
        for (name, place), variable in table.items():
            assert name in PREFILL_CLASSES
            yield name, program.problem.kinds[place], values[variable], is_local


def _weighted_quantile(weighted: list[tuple[float, float]], quantile: float) -> float:
    """Of (value, weight)."""
    total = sum(weight for _, weight in weighted)
    so_far = 0.0
    for value, weight in sorted(weighted):
        so_far += weight
        if so_far >= quantile * total:
            return value
    return 0.0
