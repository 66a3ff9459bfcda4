"""Percentiles of values that come in runs of equal ones: the same numbers as over the expanded list, without it.

Linear between the two nearest ranks, as numpy's default.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Runs = Sequence[tuple[int, float]]  # (how often, the value)


def collect_runs(runs: Iterable[tuple[int, float]]) -> tuple[Floats, npt.NDArray[np.int64]]:
    """(values, how often each occurs), in the order given."""
    pairs = np.fromiter(runs, dtype=np.dtype([("count", np.int64), ("value", np.float64)]))
    return pairs["value"], pairs["count"]


def weighted_percentiles(
    values: Floats, counts: npt.NDArray[np.int64], shares: Sequence[float] | Floats
) -> list[float]:
    """`shares` in [0, 1]; counts >= 1; at least one value."""
    order = np.argsort(values, kind="stable")
    ordered, ends = values[order], np.cumsum(counts[order])
    ranks = np.asarray(shares, dtype=np.float64) * (ends[-1] - 1)
    below = np.floor(ranks).astype(np.int64)
    low = ordered[np.searchsorted(ends, below, side="right")]
    high = ordered[np.searchsorted(ends, np.minimum(below + 1, ends[-1] - 1), side="right")]
    return [float(value) for value in low + (high - low) * (ranks - below)]


def percentile_of_runs(runs: Runs, share: float) -> float:
    """One percentile of a few runs, without numpy's cost of a call; 0 of no runs."""
    rank = share * (sum(count for count, _ in runs) - 1)
    below = int(rank)
    low: float | None = None
    end = 0
    for count, value in sorted(runs, key=lambda run: run[1]):
        end += count
        if low is None and end > below:
            low = value
        if low is not None and (end > below + 1 or rank == below):
            return low + (value - low) * (rank - below)
    return 0.0 if low is None else low
