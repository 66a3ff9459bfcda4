"""Who is let in: a session whose first round would wait far past its TTFT objective is better told to come back."""

from __future__ import annotations

from collections.abc import Sequence

from shared.core.routing import OptionEstimate
from shared.messages import Slo

ADMISSION_FACTOR = 3.0  # default: times the TTFT objective
# A refused session misses all its rounds, one let in only those that are late: so the factor is well above 1.


def measure_excess_wait_s(options: Sequence[OptionEstimate], slo: Slo, waited_s: float, factor: float) -> float:
    """Seconds by which the wait for the best of `options` is too long; 0 when the session may come in.

    `waited_s` has passed already. Only a wait is a reason: a prompt that is late on an idle cluster too is let in,
    since coming back does not help it.
    """
    best = min(options, key=lambda option: option.total_s)
    limit_s = factor * slo.ttft_s
    if waited_s + best.total_s <= limit_s or best.total_s - best.queue_s > limit_s:
        return 0.0
    return min(best.queue_s, waited_s + best.total_s - slo.ttft_s)
