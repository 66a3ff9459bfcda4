"""How fast a machine was while a live run was made on it, as a profile to simulate that run with.

A shared machine is slower at one hour than at another, and a worker's steps have more about them than the engine that
`ampd profile` measures: they are handed to a thread, planned and published, and other processes take the core. Live
workers measure what their steps take beside what the profile says (`StepTimes`). Nothing else of the run is used: what
waits for what, and how long, is for the simulator to find.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import msgspec

from shared.core.profile import DegreeProfile, Grid, Profile
from shared.messages import StepTimes

BATCH_TOKENS = 32  # a step of at most so many tokens is taken to decode only


def measure_speed(workers: Iterable[StepTimes]) -> tuple[float, float]:
    """(steps that prefill, steps that only decode): seconds that they took over those of the profile, 1 where there was
    none."""
    times = list(workers)
    prefill = sum(one.prefill_s for one in times), sum(one.prefill_profile_s for one in times)
    decode = sum(one.decode_s for one in times), sum(one.decode_profile_s for one in times)
    return _divide(*prefill), _divide(*decode)


def slow_down(profile: Profile, prefill: float, decode: float) -> Profile:
    """The profile of a machine whose steps take so many times longer."""
    degrees = tuple(_slow_down(degree, prefill, decode) for degree in profile.degrees)
    return msgspec.structs.replace(profile, degrees=degrees)


def _slow_down(degree: DegreeProfile, prefill: float, decode: float) -> DegreeProfile:
    linear = degree.linear
    seconds = (
        one_s * (decode if tokens <= BATCH_TOKENS else prefill)
        for tokens, one_s in zip(linear.at, linear.s, strict=True)
    )
    ascending = tuple(accumulate(seconds, max))  # more work cannot take less
    return msgspec.structs.replace(
        degree,
        linear=msgspec.structs.replace(linear, s=ascending),
        prefill_attention=_scale(degree.prefill_attention, prefill),
        decode_attention=_scale(degree.decode_attention, decode),
    )


def _scale(grid: Grid, factor: float) -> Grid:
    return msgspec.structs.replace(grid, s=tuple(tuple(factor * one_s for one_s in row) for row in grid.s))


def _divide(measured_s: float, profile_s: float) -> float:
    return measured_s / profile_s if profile_s > 0.0 else 1.0
