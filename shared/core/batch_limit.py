"""Which rounds decode when a batch of all of them would be too slow for its ITL objective.

A batch that has outgrown its objective makes everybody in it late, new rounds too, and does not recover by itself:
slower rounds stay longer. So it decodes as many as keep a step within the objective, those with the least slack first:
who is ahead of its objective can wait for some steps. Who has fallen behind goes last, at once: least slack first has
everybody miss by a little when there are too many. The oldest of them always has a place, so that each gets its turn.
Where too few are on schedule, they are not worth what it costs: all decode, more tokens a second, until it is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.core.step_costs import StepCosts

MIN_ON_SCHEDULE = 0.45  # of a batch: with a half, one that has fallen behind together stays so (ADR 0008)
ALL_SHARE = 0.95  # of the ITL objective that a decode step of all may take
BATCH_SHARE = 0.9  # of the ITL objective that a decode step may take, so that who is behind can catch up


@dataclass(slots=True)
class Decoding:
    """A round that has its first token, and may decode."""

    first_token_at: float
    num_produced: int
    itl_slo_s: float

    def slack_s(self, now: float) -> float:
        """How long the next token may take."""
        return self.num_produced * self.itl_slo_s - (now - self.first_token_at)

    def is_behind(self, now: float) -> bool:
        return self.slack_s(now) < 0.0


def may_all_decode(costs: StepCosts, batch: int, mean_context: float, itl_slo_s: float) -> bool:
    """Whether a decode step of all is fast enough, if only just."""
    return costs.decode_step_s(batch, mean_context) <= ALL_SHARE * itl_slo_s


def _fits(costs: StepCosts, batch: int, mean_context: float, itl_slo_s: float) -> bool:
    return costs.decode_step_s(batch, mean_context) <= BATCH_SHARE * itl_slo_s


def choose_batch(costs: StepCosts, rounds: Sequence[Decoding], mean_context: float, now: float) -> list[int]:
    """Indices of those that decode next; there is one at least. An objective that one sequence alone would not meet
    limits nobody, nor does that of a round which is behind; all decode where too few are on schedule."""
    behind = [index for index, one in enumerate(rounds) if one.is_behind(now)]
    on_schedule = [index for index, one in enumerate(rounds) if not one.is_behind(now)]
    protected = on_schedule if len(on_schedule) >= MIN_ON_SCHEDULE * len(rounds) else []
    objectives_s = (rounds[index].itl_slo_s for index in protected)
    itl_slo_s = min((one_s for one_s in objectives_s if _fits(costs, 1, mean_context, one_s)), default=float("inf"))
    num_fitting = _count_fitting(costs, len(rounds), mean_context, itl_slo_s)
    behind.sort(key=lambda index: rounds[index].first_token_at)
    on_schedule.sort(key=lambda index: rounds[index].slack_s(now))
    return [*behind[:1], *on_schedule, *behind[1:]][:num_fitting]


def _count_fitting(costs: StepCosts, most: int, mean_context: float, itl_slo_s: float) -> int:
    """One at least."""
    if _fits(costs, most, mean_context, itl_slo_s):
        return most
    low, high = 1, most  # fits, or is one; does not
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(costs, middle, mean_context, itl_slo_s):
            low = middle
        else:
            high = middle
    return low
