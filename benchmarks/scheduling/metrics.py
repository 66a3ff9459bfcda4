"""Goodput by stricter readings: P99 of the token gaps instead of their mean, whole sessions, 98 % instead of 90 %."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.scheduling.cells import Candidate, Cell, list_clusters, list_options, make_candidate, make_cell
from planner.simulator.goodput import Metric, find_goodput

READINGS: tuple[tuple[str, Metric, float], ...] = (
    ("p99_itl_90", "attainment_p99_itl", 0.9),
    ("tpot_98", "attainment", 0.98),
    ("p99_itl_98", "attainment_p99_itl", 0.98),
    ("session_90", "session_attainment", 0.9),
)
TTFT_FACTORS = (2.5, 10.0)
COMPARED = ("adaptive", "colocated", "colocated-untuned", "colocated-host", "remote", "ampd", "ampd-best")
TOLERANCE = 0.05


def run_metrics(cell: Cell, bests: Mapping[str, tuple[Candidate, float]]) -> dict[str, Any]:
    """Goodput of the policies COMPARED (the grid has the readings of all). What suits one reading may not suit
    another: each is tuned again, `colocated` over its chunks, those that may do without prefill workers over that."""
    return {
        name: {
            label: _find_best(cell, list_variants(cell, name, candidate), goodput, metric, target)
            for label, metric, target in READINGS
        }
        for name, (candidate, goodput) in _compared(bests).items()
    }


def list_variants(cell: Cell, name: str, best: Candidate) -> list[Candidate]:
    if name in ("colocated", "colocated-host"):
        groups = best.cluster.groups
        return [make_candidate(cell, name, groups, options) for options in list_options(name)]
    together = [groups for groups in list_clusters(cell, name) if len(groups) == 1 and groups != best.cluster.groups]
    return [best, *(make_candidate(cell, name, groups, best.options) for groups in together)]


def _find_best(cell: Cell, variants: list[Candidate], start: float, metric: Metric, target: float) -> float:
    """The highest goodput of the variants: one is measured if it attains just above the best so far."""
    best = 0.0
    for variant in variants:
        scenario = variant.scenario(cell)
        if best:
            needed = None if metric == "session_attainment" else target
            outcome, _ = scenario.run(best * (1 + TOLERANCE), 0, needed_share=needed)
            if getattr(outcome, metric) < target:
                continue
        found = find_goodput(
            scenario,
            start=max(best or start, cell.lowest_rate),
            lowest=cell.lowest_rate,
            target=target,
            metric=metric,
            tolerance=TOLERANCE,
        )
        best = max(best, found.rate)
    return best


def run_slo_sweep(cell: Cell, bests: Mapping[str, tuple[Candidate, float]], traces: Any) -> dict[str, Any]:
    """Goodput with a tighter and a looser TTFT objective, on the clusters found for the usual one."""
    results: dict[str, Any] = {}
    for factor in TTFT_FACTORS:
        other = make_cell(cell.profile.name, cell.workload_name, traces, ttft_factor=factor)
        results[f"{factor:g}"] = {
            "ttft_slo_s": other.slo.ttft_s,
            **{
                name: find_goodput(
                    candidate.scenario(other),
                    start=max(goodput, cell.lowest_rate),
                    lowest=cell.lowest_rate,
                    tolerance=TOLERANCE,
                ).rate
                for name, (candidate, goodput) in _compared(bests).items()
            },
        }
    return results


def _compared(bests: Mapping[str, tuple[Candidate, float]]) -> dict[str, tuple[Candidate, float]]:
    return {name: bests[name] for name in COMPARED if name in bests}
