"""What counts as hidden in benchmarks/bench_overlap.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.overlap.intervals import Span, Transfer, find_exposed_s

COMPUTES = [Span("a", 1, 0.0, 2.0), Span("b", 1, 1.0, 3.0), Span("c", 1, 4.0, 5.0)]


@pytest.mark.parametrize(
    ("start_s", "end_s", "exposed_s"),
    [(0.5, 1.0, 0.0), (1.5, 2.5, 0.0), (2.5, 4.5, 1.0), (3.2, 3.7, 0.5), (-1.0, 6.0, 3.0)],
)
def test_a_history_is_exposed_while_nothing_is_computed(start_s: float, end_s: float, exposed_s: float) -> None:
    transfer = Transfer("d", 1, start_s, end_s, "history", end_s - start_s, 1, "tcp")
    assert find_exposed_s(transfer, COMPUTES) == pytest.approx(exposed_s)


@pytest.mark.parametrize(("end_s", "active_s", "exposed_s"), [(2.9, 0.4, 0.0), (3.1, 0.4, 0.1), (4.0, 0.4, 0.4)])
def test_an_increment_is_exposed_after_its_own_prefill(end_s: float, active_s: float, exposed_s: float) -> None:
    transfer = Transfer("b", 1, 1.0, end_s, "increment", active_s, 1, "tcp")
    assert find_exposed_s(transfer, COMPUTES) == pytest.approx(exposed_s)
