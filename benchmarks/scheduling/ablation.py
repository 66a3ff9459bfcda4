"""`adaptive` without each of its parts, and what every knob is worth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.scheduling.cells import Candidate, Cell
from benchmarks.scheduling.grid import SEEDS, spread
from planner.simulator.goodput import find_goodput
from planner.simulator.scenario import Scenario
from shared.core.policies import PARTS, switch_off, with_options


def run_ablation(cell: Cell, adaptive: Candidate, goodput: float) -> dict[str, Any]:
    """Attainment at `adaptive`'s own goodput, and the goodput that is left, without each part."""
    results: dict[str, Any] = {"rate": goodput, "parts": {}}
    for part in (None, *PARTS):
        policy = adaptive.policy if part is None else switch_off(adaptive.policy, part)
        scenario = replace(adaptive.scenario(cell), policy=policy)
        found = find_goodput(scenario, start=goodput, lowest=cell.lowest_rate, tolerance=0.04)
        results["parts"]["nothing" if part is None else part] = {
            **spread([scenario.run(goodput, seed)[0] for seed in SEEDS]),
            "goodput_sessions_per_s": found.rate,
        }
    return results


def run_sensitivity(cell: Cell, bests: dict[str, tuple[Candidate, float]]) -> dict[str, Any]:
    """Attainment at the policy's own goodput when one thing is changed."""
    results: dict[str, Any] = {}
    for name, label, scenario, rate in _variants(cell, bests):
        results.setdefault(name, {})[label] = spread([scenario.run(rate, seed)[0] for seed in SEEDS])
    return results


def _variants(cell: Cell, bests: dict[str, tuple[Candidate, float]]) -> list[tuple[str, str, Scenario, float]]:
    variants: list[tuple[str, str, Scenario, float]] = []

    def add(name: str, label: str, *, options: dict[str, Any] | None = None, **changes: Any) -> None:
        candidate, rate = bests[name]
        scenario = candidate.scenario(cell)
        if options:
            scenario = replace(scenario, policy=with_options(candidate.policy, options))
        cluster = {key: changes.pop(key) for key in ("predicted_scale", "bandwidth_scale", "pauses") if key in changes}
        if cluster:
            scenario = replace(scenario, cluster=replace(candidate.cluster, **cluster))
        variants.append((name, label, replace(scenario, **changes), rate))

    for name in ("adaptive", "ampd", "ampd-best", "colocated", "remote"):
        add(name, "as it is")
        add(name, "costs predicted 30 % too low", predicted_scale=0.7)
        add(name, "costs predicted 30 % too high", predicted_scale=1.3)
        add(name, "links at a quarter of the bandwidth", bandwidth_scale=0.25)
        add(name, "pause model: a local prefill stops the batch", pauses=True)
    for factor in (0.3, 3.0):
        add("adaptive", f"tool times mispredicted, x {factor:g}", gap_factor=factor)
    for window in (1, 5, 7):
        add("ampd", f"w = {window}", options={"order.window": window})
    for alpha in (0.3, 0.5, 1.0):
        add("ampd", f"alpha = {alpha:g}", options={"routing.alpha": alpha})
    for beta in (0.3, 0.5, 1.0):
        add("ampd", f"beta = {beta:g}", options={"routing.beta": beta})
    for window_s in (1.0, 3.0, 30.0):
        add("ampd", f"statistics over {window_s:g} s", options={"window_s": window_s})
    for ageing, every in ((1.0, 2), (2.0, 3), (8.0, 8)):
        add("adaptive", f"ageing {ageing:g}, turn {every}", options={"order.ageing": ageing, "order.aged_every": every})
    for share in (0.7, 0.8, 1.0):
        add("adaptive", f"chunks fill {share:.0%} of the ITL", options={"routing.chunk.itl_share": share})
    for factor in (0.5, 2.0, 1e9):
        add("adaptive", f"admission at {factor:g} x TTFT", admission_factor=factor)
    return variants
