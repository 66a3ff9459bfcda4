"""A log of (now, event) lines: replayed into a fresh core, it gives the same commands as the first time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from shared.core.events import Event

_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(tuple[float, Event])


class EventLog:
    """JSON lines. It holds prompts and outputs: for debugging, off by default."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")

    def write(self, now: float, event: Event) -> None:
        self._file.write(_ENCODER.encode((now, event)) + b"\n")

    def close(self) -> None:
        self._file.close()


def read_event_log(path: Path) -> Iterator[tuple[float, Event]]:
    """Raises msgspec.DecodeError for a line that is no event; a torn last line (a killed process) ends the log."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield _DECODER.decode(line)
