"""Goodput by stricter readings: P99 of the token gaps instead of their mean, whole sessions, 98 % instead of 90 %."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.scheduling.cells import Candidate, Cell, list_options, make_candidate, make_cell
from planner.simulator.goodput import Metric, find_goodput

READINGS: tuple[tuple[str, Metric, float], ...] = (
    ("p99_itl_90", "attainment_p99_itl", 0.9),
    ("tpot_98", "attainment", 0.98),
    ("p99_itl_98", "attainment_p99_itl", 0.98),
    ("session_90", "session_attainment", 0.9),
)
TTFT_FACTORS = (2.5, 10.0)
COMPARED = ("adaptive", "colocated", "colocated-host", "remote", "ampd", "ampd-best")  # the others: see the grid


def run_metrics(cell: Cell, bests: Mapping[str, tuple[Candidate, float]]) -> dict[str, Any]:
    """Goodput of each policy on its own best cluster; `colocated` is tuned again, for every reading its best chunk."""
    results: dict[str, Any] = {}
    for name, (candidate, goodput) in _compared(bests).items():
        variants = [candidate]
        if name in ("colocated", "colocated-host"):
            groups = candidate.cluster.groups
            variants = [make_candidate(cell, name, groups, options) for options in list_options(name)]
        results[name] = {
            label: max(
                find_goodput(
                    variant.scenario(cell),
                    start=max(goodput, cell.lowest_rate),
                    lowest=cell.lowest_rate,
                    target=target,
                    metric=metric,
                    tolerance=0.05,
                ).rate
                for variant in variants
            )
            for label, metric, target in READINGS
        }
    return results


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
                    tolerance=0.05,
                ).rate
                for name, (candidate, goodput) in _compared(bests).items()
            },
        }
    return results


def _compared(bests: Mapping[str, tuple[Candidate, float]]) -> dict[str, tuple[Candidate, float]]:
    return {name: bests[name] for name in COMPARED if name in bests}
