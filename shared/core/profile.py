"""A profile: measured or derived timings of one model on one kind of device, for every parallel degree.

One step of a worker runs `decode` sequences (one token each) and chunks of prefills in one forward pass. Its duration
is the sum of three piecewise-linear parts (the split that measured silicon data comes in):

    T_step = linear(tokens in the step) + sum over chunks of prefill_attention(history, chunk)
             + decode_attention(batch, mean context)

T_pre(l_hist, l_incr) and T_dec(batch) of AMPD (arXiv 2602.14516) are its two special cases. T_kv(tokens) is bytes over
the slower end's link plus a latency. Files: shared/profiles/<gpu>-<model>.json, and what `ampd profile` writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import msgspec

from shared.errors import AmpdError, ErrorCode

FORMAT = "ampd-profile/1"

Seconds = Annotated[float, msgspec.Meta(ge=0.0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Rate = Annotated[float, msgspec.Meta(gt=0.0)]


class Curve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Piecewise linear in one variable; beyond the last point it goes on with the last slope."""

    at: tuple[int, ...]  # ascending
    s: tuple[Seconds, ...]


class Grid(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bilinear between points: s[row][column]; beyond the edges it goes on with the last slopes."""

    rows: tuple[int, ...]  # ascending
    columns: tuple[int, ...]  # ascending
    s: tuple[tuple[Seconds, ...], ...]


class DegreeProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker of `parallel_degree` devices. num_kv_tokens: what its device memory holds beside the weights."""

    parallel_degree: Count
    num_kv_tokens: Count
    linear: Curve  # at: tokens in the step (prefill and decode together)
    prefill_attention: Grid  # rows: history tokens, columns: tokens of the chunk
    decode_attention: Grid  # rows: sequences, columns: mean context in tokens


class Links(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes per second of one device, in one direction; a worker of n devices has n of each."""

    devices_per_node: Count
    intra_node_bytes_per_s: Rate
    inter_node_bytes_per_s: Rate
    host_bytes_per_s: Rate  # device memory <-> host memory
    latency_s: Seconds


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`provenance` says where every number comes from; nothing computes with it."""

    format: str = FORMAT
    name: str
    model: str
    device: str
    provenance: dict[str, Any]
    max_context_tokens: Count
    vocab_size: Count
    kv_bytes_per_token: Count  # all layers, all devices of a worker together
    host_kv_bytes: Annotated[int, msgspec.Meta(ge=0)]  # host memory for KV, per device; 0: none
    links: Links
    degrees: tuple[DegreeProfile, ...]

    def degree(self, parallel_degree: int) -> DegreeProfile:
        """Raises AmpdError INVALID_REQUEST naming the degrees there are."""
        for one in self.degrees:
            if one.parallel_degree == parallel_degree:
                return one
        known = ", ".join(str(one.parallel_degree) for one in self.degrees)
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"profile {self.name} has no parallel degree {parallel_degree}: choose one of {known}",
        )


_DECODER = msgspec.json.Decoder(Profile)


def decode_profile(data: bytes, name: str) -> Profile:
    """Read and check a profile. Raises AmpdError INVALID_REQUEST that names the number at fault."""
    try:
        profile = _DECODER.decode(data)
    except msgspec.DecodeError as error:
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"profile {name}: {error}") from error
    if profile.format != FORMAT:
        raise _fault(name, f"format is {profile.format!r}, this version reads {FORMAT!r}")
    if not profile.degrees:
        raise _fault(name, "degrees is empty: a profile needs at least one parallel degree")
    for index, degree in enumerate(profile.degrees):
        at = f"degrees[{index}]"
        _check_axis(name, f"{at}.linear.at", degree.linear.at)
        if len(degree.linear.s) != len(degree.linear.at):
            raise _fault(name, f"{at}.linear has {len(degree.linear.at)} points and {len(degree.linear.s)} times")
        _check_monotone(name, f"{at}.linear.s", degree.linear.s)
        _check_grid(name, f"{at}.prefill_attention", degree.prefill_attention)
        _check_grid(name, f"{at}.decode_attention", degree.decode_attention)
    return profile


def _check_grid(name: str, at: str, grid: Grid) -> None:
    _check_axis(name, f"{at}.rows", grid.rows)
    _check_axis(name, f"{at}.columns", grid.columns)
    if len(grid.s) != len(grid.rows) or any(len(row) != len(grid.columns) for row in grid.s):
        raise _fault(name, f"{at}.s must have {len(grid.rows)} rows of {len(grid.columns)} times")
    for index, row in enumerate(grid.s):
        _check_monotone(name, f"{at}.s[{index}]", row)


def _check_axis(name: str, at: str, axis: Sequence[int]) -> None:
    if len(axis) < 2 or axis[0] < 0 or any(a >= b for a, b in pairwise(axis)):
        raise _fault(name, f"{at} must be two or more ascending numbers from 0 on, got {list(axis)[:8]}")


def _check_monotone(name: str, at: str, times: Sequence[float]) -> None:
    for index, (a, b) in enumerate(pairwise(times)):
        if b < a:
            raise _fault(name, f"{at}[{index + 1}] = {b:g} is below {at}[{index}] = {a:g}: more work cannot take less")


def _fault(name: str, problem: str) -> AmpdError:
    return AmpdError(ErrorCode.INVALID_REQUEST, f"profile {name}: {problem}")
