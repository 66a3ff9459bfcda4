"""Is a request's sampling possible at all? Without torch, so that the coordinator can ask before it places a round."""

from __future__ import annotations

import math

from shared.errors import AmpdError, ErrorCode
from shared.messages import SamplingParams


def check_sampling(params: SamplingParams) -> None:
    """Raise AmpdError(INVALID_REQUEST) that names the first field out of range."""
    if not (math.isfinite(params.temperature) and params.temperature >= 0.0):
        _refuse("temperature", params.temperature, "a finite number >= 0 (0 is greedy)")
    if not 0.0 < params.top_p <= 1.0:
        _refuse("top_p", params.top_p, "in (0, 1] (1 keeps every token)")
    if params.top_k < 0:
        _refuse("top_k", params.top_k, ">= 0 (0 keeps every token)")


def _refuse(field: str, value: float, allowed: str) -> None:
    raise AmpdError(ErrorCode.INVALID_REQUEST, f"sampling.{field} is {value}; it must be {allowed}")
