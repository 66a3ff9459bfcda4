"""Attainment of every policy, each at its own best, over common rates and three seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.scheduling.cells import NUM_DEVICES, Candidate, Cell, list_clusters, make_candidate
from planner.simulator.cluster import WorkerGroup
from planner.simulator.outcome import Outcome

SEEDS = (1, 2, 3)  # the searches used seed 0
SHARES = (0.25, 0.5, 0.75, 1.0, 1.15)  # rates, in units of the highest goodput of the cell
BELOW = 0.8
METRICS = ("attainment", "attainment_p99_itl", "session_attainment", "attainment_ttft", "ttft_p50_s", "ttft_p90_s",
           "ttft_p99_s", "ttft_max_s", "tpot_p50_s", "tpot_p99_s", "local_share", "kv_gb_per_round", "num_rejected",
           "num_preemptions", "num_rounds")  # fmt: skip


def run_grid(cell: Cell, bests: Mapping[str, tuple[Candidate, float]]) -> dict[str, Any]:
    """{"rates": [...], policy: [{metric: [mean, lowest, highest], ...} for each rate]}."""
    highest = max(goodput for _, goodput in bests.values())
    rates = [share * highest for share in SHARES]
    grid: dict[str, Any] = {"rates": rates, "seeds": list(SEEDS), "policies": {}}
    for name, (best, goodput) in bests.items():
        grid["policies"][name] = [run_point(cell, name, best, goodput, rate) for rate in rates]
    return grid


def run_point(cell: Cell, name: str, best: Candidate, goodput: float, rate: float) -> dict[str, Any]:
    """One policy at one rate. Well below its goodput it runs on the parallel degree that does best there (a few large
    workers are faster when idle, many small ones carry more), chosen with the searches' seed."""
    candidates = [best]
    if rate < BELOW * goodput:
        candidates += [
            make_candidate(cell, name, groups, best.options)
            for groups in list_clusters(cell, name)
            if groups != best.cluster.groups and is_alike(groups, best.cluster.groups)
        ]
    chosen = candidates[0]
    if len(candidates) > 1:
        chosen = max(candidates, key=lambda one: one.scenario(cell).run(rate, 0, needed_share=0.5)[0].attainment)
    outcomes = [chosen.scenario(cell).run(rate, seed)[0] for seed in SEEDS]
    return {"cluster": chosen.describe(), **spread(outcomes)}


def is_alike(groups: tuple[WorkerGroup, ...], others: tuple[WorkerGroup, ...]) -> bool:
    """The same kinds of workers in the same shares, with one parallel degree throughout."""
    if len({group.parallel_degree for group in groups}) > 1 or len(groups) != len(others):
        return False
    return all(
        a.role == b.role and abs(a.count * a.parallel_degree - b.count * b.parallel_degree) <= NUM_DEVICES / 16
        for a, b in zip(groups, others, strict=True)
    )


def spread(outcomes: list[Outcome]) -> dict[str, list[float]]:
    """Mean, lowest and highest over the seeds."""
    values = {metric: [float(getattr(outcome, metric)) for outcome in outcomes] for metric in METRICS}
    return {
        metric: [round(statistics.fmean(numbers), 6), round(min(numbers), 6), round(max(numbers), 6)]
        for metric, numbers in values.items()
    }
