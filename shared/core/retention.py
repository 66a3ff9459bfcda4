"""Whose KV goes when a worker runs out of room: the choice among idle sessions.

lru              the least recently used first
ttl              KV is kept for a time predicted from the session's tool times (Continuum, arXiv 2511.02230:
                 time-to-live); who is past it goes first, oldest first
expected_return  ours: who is expected back last, weighed by what bringing its KV back would cost a token
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

RetentionName = Literal["lru", "ttl", "expected_return"]
K = TypeVar("K", bound=Hashable)

PRIOR_GAP_S = 5.0
PRIOR_WEIGHT = 1.0  # the prior counts as this many observed gaps
TTL_FACTOR = 2.0  # kept for twice the mean tool time of the session
MAX_TTL_S = 120.0


@dataclass(slots=True)
class GapStats:
    """Idle times between a session's rounds: a mean that starts from a prior (the fleet's)."""

    total_s: float = PRIOR_GAP_S * PRIOR_WEIGHT
    weight: float = PRIOR_WEIGHT

    def add(self, gap_s: float) -> None:
        self.total_s += gap_s
        self.weight += 1.0

    @property
    def mean_s(self) -> float:
        return self.total_s / self.weight


@dataclass(slots=True)
class IdleKv(Generic[K]):
    """One idle session's KV. restore_s: to bring it back once it has gone (recompute, or read from another tier)."""

    key: K
    num_tokens: int
    idle_since: float
    mean_gap_s: float
    restore_s: float


def expect_return_s(idle_s: float, mean_gap_s: float) -> float:
    """Seconds until the next round. Tool times have heavy tails: one that is overdue is expected to last as long again
    (the mean residual life of a Pareto distribution grows with the age)."""
    return max(mean_gap_s - idle_s, idle_s, 0.01)


def choose_victim(idle: Iterable[IdleKv[K]], now: float, retention: RetentionName) -> IdleKv[K] | None:
    """The idle session whose KV goes first; None when there is none."""
    match retention:
        case "lru":
            return min(idle, key=lambda kv: kv.idle_since, default=None)
        case "ttl":
            return min(idle, key=lambda kv: (not _is_expired(kv, now), kv.idle_since), default=None)
        case "expected_return":
            return min(idle, key=lambda kv: _value_of_keeping(kv, now), default=None)


def _is_expired(kv: IdleKv[K], now: float) -> bool:
    return now - kv.idle_since > min(MAX_TTL_S, TTL_FACTOR * kv.mean_gap_s)


def _value_of_keeping(kv: IdleKv[K], now: float) -> float:
    """Seconds saved a token and second of waiting."""
    return kv.restore_s / (max(1, kv.num_tokens) * expect_return_s(now - kv.idle_since, kv.mean_gap_s))
