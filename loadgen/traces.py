"""Traces of multi-round sessions, and the readers of the formats they come in.

`ampd` (this project's format), one session a line:
    {"session_id": "a/0", "arrival_s": 0.0, "meta": {"arrival_known": false},
     "rounds": [{"input_tokens": 120, "output_tokens": 16, "delay_s": null}, ...]}
input_tokens are the new tokens of that round alone; delay_s is the gap after the end of the round before. A round
may carry its content as `messages` ([{"role", "content"}]) or `text`; otherwise only its lengths are known.
`mooncake`: see mooncake.py.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from shared.errors import AmpdError, ErrorCode
from shared.messages import ChatMessage

TraceFormat = Literal["ampd", "mooncake"]
Count = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0)]


class TraceRound(msgspec.Struct, frozen=True, kw_only=True):
    """One round. With `messages` or `text`, input_tokens is an estimate and output_tokens an upper bound."""

    input_tokens: Count
    output_tokens: Count
    delay_s: Seconds | None = None
    messages: tuple[ChatMessage, ...] | None = None
    text: str | None = None

    @property
    def has_content(self) -> bool:
        return self.messages is not None or self.text is not None


class TraceSession(msgspec.Struct, frozen=True, kw_only=True):
    session_id: str
    arrival_s: Seconds
    rounds: Annotated[tuple[TraceRound, ...], msgspec.Meta(min_length=1)]
    meta: dict[str, Any] = {}

    @property
    def arrival_known(self) -> bool:
        """False: arrival_s says nothing about when sessions arrive."""
        return self.meta.get("arrival_known") is True


_DECODER = msgspec.json.Decoder(TraceSession)


def read_trace(path: Path, trace_format: TraceFormat | Literal["auto"] = "auto") -> Iterator[TraceSession]:
    """Sessions of a trace file, in its order; `ampd` files are read as they are consumed.

    Raises AmpdError INVALID_REQUEST naming the file, the line and what is wrong with it.
    """
    if trace_format == "auto":
        trace_format = detect_format(path)
    if trace_format == "mooncake":
        from loadgen.mooncake import read_mooncake  # it builds on this module

        return read_mooncake(path)
    return _read_ampd(path)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of every line that is not blank."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST, f"cannot read the trace {path}: {error.strerror}; give a JSONL file"
        ) from error


def bad_line(path: Path, number: int, problem: object) -> AmpdError:
    return AmpdError(ErrorCode.INVALID_REQUEST, f"{path}, line {number}: {problem}")


def detect_format(path: Path) -> TraceFormat:
    """Decide by the keys of the first line."""
    for number, line in itertools.islice(read_lines(path), 1):
        try:
            first = json.loads(line)
        except ValueError as error:
            raise bad_line(path, number, f"not JSON: {error}") from error
        if isinstance(first, dict) and "rounds" in first:
            return "ampd"
        if isinstance(first, dict) and "hash_ids" in first:
            return "mooncake"
        raise bad_line(path, number, "neither `rounds` (ampd) nor `hash_ids` (mooncake) in it: give --format")
    raise AmpdError(ErrorCode.INVALID_REQUEST, f"the trace {path} is empty")


def write_trace(path: Path, sessions: Iterator[TraceSession]) -> int:
    """Write an `ampd` trace; returns the number of sessions."""
    num_sessions = 0
    with path.open("wb") as file:
        for session in sessions:
            line = msgspec.to_builtins(session)
            line["rounds"] = [
                {key: value for key, value in one.items() if value is not None or key == "delay_s"}
                for one in line["rounds"]
            ]
            file.write(msgspec.json.encode(line) + b"\n")
            num_sessions += 1
    return num_sessions


def _read_ampd(path: Path) -> Iterator[TraceSession]:
    for number, line in read_lines(path):
        try:
            session = _DECODER.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise bad_line(path, number, error) from error
        contents = [one.has_content for one in session.rounds]
        if any(contents) and not all(contents):
            raise bad_line(path, number, "either every round of a session has `messages` or `text`, or none")
        yield session
