"""How much of a remote prefill's transfers is hidden behind compute: pure, from what workers have logged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds of a clock that all processes of the host share."""

    session: str
    round: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Transfer(Span):
    """active_s: the part of the span in which bytes were there to move."""

    purpose: str  # history or increment
    active_s: float
    num_bytes: int
    lane: str


def find_exposed_s(transfer: Transfer, computes: Sequence[Span]) -> float:
    """What the transfer added to the worker's idle time, or to the round's first token.

    History: all of it in which the prefill worker computed nothing. Increment: what came after its own prefill's end.
    """
    if transfer.purpose == "history":
        return transfer.end_s - transfer.start_s - _overlap_s(transfer, computes)
    own = next(one for one in computes if (one.session, one.round) == (transfer.session, transfer.round))
    return min(transfer.active_s, max(0.0, transfer.end_s - own.end_s))


def _overlap_s(span: Span, others: Sequence[Span]) -> float:
    """Of the span, the time that lies within any of the others."""
    covered_s, reached_s = 0.0, span.start_s
    for other in sorted(others, key=lambda one: one.start_s):
        start_s, stop_s = max(reached_s, other.start_s), min(span.end_s, other.end_s)
        if stop_s > start_s:
            covered_s += stop_s - start_s
            reached_s = stop_s
    return covered_s
