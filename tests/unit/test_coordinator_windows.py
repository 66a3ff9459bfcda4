"""Sliding windows: what counts, and the statistics."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core.windows import SlidingWindow


def test_only_the_last_seconds_count() -> None:
    window = SlidingWindow(10.0)
    window.add(0.0, 100.0)
    window.add(5.0, 2.0)
    window.add(9.0, 4.0)
    assert window.stats(9.5).count == 3
    stats = window.stats(10.0)
    assert (stats.count, stats.mean, stats.p50, stats.p95, stats.window_s) == (2, 3.0, 2.0, 4.0, 10.0)
    assert window.stats(30.0).count == 0
    assert window.stats(30.0).mean == 0.0


def test_the_number_of_samples_is_bounded() -> None:
    window = SlidingWindow(10.0, max_samples=3)
    for value in range(10):
        window.add(0.0, float(value))
    assert window.stats(1.0).count == 3
    assert window.stats(1.0).mean == 8.0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_percentiles_are_samples_that_enough_others_do_not_exceed(values: list[float]) -> None:
    window = SlidingWindow()
    for value in values:
        window.add(0.0, value)
    stats = window.stats(1.0)
    for percentile, share in ((stats.p50, 0.5), (stats.p95, 0.95)):
        assert percentile in values
        assert sum(value <= percentile for value in values) >= share * len(values)
    assert min(values) <= stats.mean * (1 + 1e-9)
    assert stats.mean <= max(values) * (1 + 1e-9)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="window_s"):
        SlidingWindow(0.0)
