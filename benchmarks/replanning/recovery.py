"""Attainment over time, and when one course of it has come up to another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

CLOSE = 0.05  # of the clairvoyant attainment: recovered

Course = Sequence[float | None]


def share_by_time(rounds: Iterable[tuple[float, bool]], bucket_s: float, num_buckets: int) -> list[float | None]:
    """`rounds`: when each was sent, and whether it attained. None for a bucket without rounds."""
    offered, attained = [0] * num_buckets, [0] * num_buckets
    for sent_s, has_attained in rounds:
        place = int(sent_s // bucket_s)
        if place < num_buckets:
            offered[place] += 1
            attained[place] += has_attained
    return [k / n if n else None for n, k in zip(offered, attained, strict=True)]


def mean_after(course: Course, at_s: float, bucket_s: float) -> float:
    """Unweighted over the buckets from `at_s` on."""
    shares = [share for share in course[int(at_s // bucket_s) :] if share is not None]
    return sum(shares) / max(1, len(shares))


def find_recovery(ours: Course, best: Course, at_s: float, bucket_s: float) -> float | None:
    """Seconds from `at_s` to the end of the last bucket that is more than CLOSE below `best`. None: the last one is."""
    first = int(at_s // bucket_s)
    behind = [
        place
        for place, (our, other) in enumerate(zip(ours, best, strict=True))
        if place >= first and our is not None and other is not None and other - our > CLOSE
    ]
    if not behind:
        return 0.0
    return None if behind[-1] == len(ours) - 1 else (behind[-1] + 1) * bucket_s - at_s
