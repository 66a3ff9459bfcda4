"""The rounds that decode in a step, as far as its time depends on them."""

from __future__ import annotations

import msgspec


class DecodingRounds(msgspec.Struct, frozen=True):
    """What a step's time, and the time that it may take, depend on of the rounds that decode in it."""

    batch: int
    mean_context: float  # tokens
    itl_slo_s: float  # the tightest
