"""Mooncake's published request traces (FAST'25), turned into multi-round sessions.

One request a line: {"timestamp": ms, "input_length", "output_length", "hash_ids": [id of each 512-token block]}.
Equal ids mean equal blocks with equal blocks before them. The traces do not say which requests are rounds of one
session, so they are chained: a request continues the newest request whose full blocks are all a prefix of its own,
and whose input and output it is longer than. Requests with fewer than two full blocks start chains of their own:
the first block is often a system prompt that many sessions share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec

from loadgen.traces import Count, Seconds, TraceRound, TraceSession, bad_line, read_lines

BLOCK_TOKENS = 512
MIN_FULL_BLOCKS = 2
# A request's service time is not published; the gap between two arrivals less this estimate is the delay.
TTFT_ESTIMATE_S = 1.0
ITL_ESTIMATE_S = 0.03
GRID_S = 3.0  # the published arrival times are multiples of this


class _Request(msgspec.Struct, frozen=True):
    timestamp: Seconds  # milliseconds
    input_length: Count
    output_length: Annotated[int, msgspec.Meta(ge=0)]
    hash_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.input_length + max(self.output_length, 1)


@dataclass(slots=True)
class _Chain:
    """A session as far as it was seen; `last` is its newest request."""

    last: _Request
    arrival_s: float
    rounds: list[TraceRound] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


_DECODER = msgspec.json.Decoder(_Request)


def read_mooncake(path: Path) -> Iterator[TraceSession]:
    """Sessions in order of their first request. Reads the whole file first: any later row may continue a session."""
    chains: list[_Chain] = []
    open_chains: dict[int, list[_Chain]] = {}  # by the id of the last full block of the newest request
    for row, (number, line) in enumerate(read_lines(path)):
        try:
            request = _DECODER.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise bad_line(path, number, error) from error
        chain = _take_continued(open_chains, request)
        if chain is None:
            chain = _Chain(last=request, arrival_s=request.timestamp / 1000)
            chains.append(chain)
            new_tokens, delay_s = request.input_length, None
        else:
            new_tokens = request.input_length - chain.last.num_tokens
            gap_s = (request.timestamp - chain.last.timestamp) / 1000
            delay_s = max(0.0, gap_s - TTFT_ESTIMATE_S - ITL_ESTIMATE_S * chain.last.output_length)
        chain.rounds.append(
            TraceRound(
                input_tokens=new_tokens,
                output_tokens=max(request.output_length, 1),
                delay_s=None if delay_s is None else round(delay_s, 3),
            )
        )
        chain.rows.append(row)
        chain.last = request
        num_full = min(request.input_length // BLOCK_TOKENS, len(request.hash_ids))
        if num_full >= MIN_FULL_BLOCKS:
            open_chains.setdefault(request.hash_ids[num_full - 1], []).append(chain)
    for index, chain in enumerate(chains):
        yield TraceSession(
            session_id=f"{path.stem}/{index}",
            arrival_s=chain.arrival_s,
            rounds=tuple(chain.rounds),
            meta={"arrival_known": True, "delay_estimated": True, "rows": chain.rows},
        )


def _take_continued(open_chains: dict[int, list[_Chain]], request: _Request) -> _Chain | None:
    """The chain with the longest history that `request` continues, taken out of `open_chains`."""
    for block in range(len(request.hash_ids) - 1, MIN_FULL_BLOCKS - 2, -1):
        candidates = open_chains.get(request.hash_ids[block], [])
        for chain in reversed(candidates):
            if chain.last.num_tokens < request.input_length:
                candidates.remove(chain)
                return chain
    return None
