"""Goodput: the highest offered rate at which a share of the rounds attains, found by bisection over simulated runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from planner.simulator.outcome import Outcome
from planner.simulator.scenario import Scenario

Metric = Literal["attainment", "attainment_p99_itl", "session_attainment"]
MAX_DOUBLINGS = 24


@dataclass(frozen=True, slots=True)
class Goodput:
    """`rate` in sessions a second, 0 when even the lowest tried did not attain; `outcome` is of a run at it."""

    rate: float
    outcome: Outcome | None
    num_runs: int


def find_goodput(
    scenario: Scenario,
    *,
    start: float,
    lowest: float,
    target: float = 0.9,
    metric: Metric = "attainment",
    tolerance: float = 0.03,
    growth: float = 1.4,
    seed: int = 0,
) -> Goodput:
    """Bisect between a rate that attains and one that does not, to `tolerance` (relative).

    Attainment need not fall monotonically with the rate; what is found is a rate that attains with one close above
    that does not.
    """
    num_runs = 0

    def try_rate(rate: float) -> tuple[bool, Outcome]:
        nonlocal num_runs
        num_runs += 1
        needed = target if metric != "session_attainment" else None
        outcome, _ = scenario.run(rate, seed, needed_share=needed)
        value: float = getattr(outcome, metric)
        return value >= target, outcome

    low, high, best = _bracket(try_rate, start, lowest, growth)
    if best is None:
        return Goodput(0.0, None, num_runs)
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        attains, outcome = try_rate(middle)
        if attains:
            low, best = middle, outcome
        else:
            high = middle
    return Goodput(low, best, num_runs)


def _bracket(
    try_rate: Callable[[float], tuple[bool, Outcome]], start: float, lowest: float, growth: float
) -> tuple[float, float, Outcome | None]:
    """(a rate that attains, one that does not, the outcome at the first or None when there is none)."""
    attains, outcome = try_rate(start)
    low = high = start
    for _ in range(MAX_DOUBLINGS):
        if attains:
            best = outcome
            high = low * growth
            attains, outcome = try_rate(high)
            if not attains:
                return low, high, best
            low = high
        else:
            high = low
            low = high / growth
            if low < lowest:
                return low, high, None
            attains, outcome = try_rate(low)
            if attains:
                return low, high, outcome
    return low, high, outcome if attains else None
