"""Other ways to choose workers for the same GPUs: rules of thumb, and chance."""

from __future__ import annotations

import random
from dataclasses import replace
from math import ceil

from benchmarks.planning.packing import Workers, does_fit, list_slots
from planner.planning.plans import SolvedPlan, WorkerCount, solve_plan
from planner.planning.program import PlanProblem
from planner.planning.worker_kinds import WorkerKind

BOTTLENECK_SHARE = 0.7  # of the goodput rate, at which the latency of the slowest worker is made least
NUM_BISECTIONS = 40


def smallest_kind(problem: PlanProblem) -> WorkerKind:
    """The smallest worker that holds the longest session, which all the rules use, for both roles."""
    return min((kind for kind in problem.kinds if kind.can_decode), key=lambda kind: kind.parallel_degree)


def plan_bottleneck(problem: PlanProblem, goodput_rate: float) -> SolvedPlan | None:
    """The paper's objective: the least latency of the slowest worker, at a rate."""
    return solve_plan(replace(problem, rate=BOTTLENECK_SHARE * goodput_rate), "min-p95")


def split_evenly(problem: PlanProblem) -> Workers:
    """Half the GPUs prefill, the others decode; what is left over decodes."""
    kind = smallest_kind(problem)
    num_workers = problem.gpus[kind.gpu_type] // kind.parallel_degree
    return _make(kind, num_workers // 2, num_workers - num_workers // 2)


def split_by_ratio(problem: PlanProblem) -> Workers:
    """ceil(demand / rate of an engine) workers for each phase, as the throughput planner of NVIDIA Dynamo: at the
    highest demand that the GPUs have room for. Those left over decode.

    A prefill engine takes one prefill after another, a decode engine runs the largest batch that keeps the ITL
    objective and that its memory holds; neither does the other's work.
    """
    kind = smallest_kind(problem)
    num_workers = problem.gpus[kind.gpu_type] // kind.parallel_degree
    load = problem.load
    prefill_s = sum(load.rounds[name] * kind.alone_s[name] for name in ("first", "later"))
    held = kind.num_kv_tokens / max(1.0, load.decode_context)
    pure = [mode for mode in kind.modes if mode.batch and mode.prefill_share == 0.0]
    tokens_per_s = max(mode.tokens_per_s * min(1.0, held / mode.batch) for mode in pure)
    decode_s = load.output_tokens / tokens_per_s

    def count(rate: float) -> tuple[int, int]:
        return max(1, ceil(rate * prefill_s)), max(1, ceil(rate * decode_s))

    low, high = 0.0, num_workers / min(prefill_s, decode_s)
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        if sum(count(middle)) <= num_workers:
            low = middle
        else:
            high = middle
    num_prefill = min(count(low)[0], num_workers - 1)
    return _make(kind, num_prefill, num_workers - num_prefill)


def draw_workers(problem: PlanProblem, draws: random.Random) -> Workers:
    """Workers of random kinds until no more fit."""
    while True:
        counts: dict[WorkerCount, int] = {}
        slots = [
            WorkerCount(role, name, degree, 1) for name in problem.gpus for role, degree in list_slots(problem, name)
        ]
        while slots:
            slot = draws.choice(slots)
            more = {**counts, slot: counts.get(slot, 0) + 1}
            if does_fit(problem, _collect(more)):
                counts = more
            else:
                slots.remove(slot)
        if any(slot.role == "both" for slot in counts):
            return _collect(counts)


def _collect(counts: dict[WorkerCount, int]) -> Workers:
    return tuple(sorted(replace(slot, replicas=number) for slot, number in counts.items()))


def _make(kind: WorkerKind, num_prefill: int, num_both: int) -> Workers:
    workers = (
        WorkerCount("prefill", kind.gpu_type, kind.parallel_degree, num_prefill),
        WorkerCount("both", kind.gpu_type, kind.parallel_degree, num_both),
    )
    return tuple(one for one in workers if one.replicas)
