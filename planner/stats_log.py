"""The planner's memory: one JSON line of PlannerStats an interval, appended to a file that is rotated.

A planner that is killed leaves at worst one torn line at the end, which the next start passes over.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from planner.collector import NOTHING_YET, Totals
from shared.messages import PlannerStats

MAX_BYTES = 16 * 2**20  # of each of the two files
_TAIL_BYTES = 4 * 2**20  # holds many lines: one is about 1 KB a worker

_TOTALS = msgspec.json.Decoder(Totals)  # other fields of a line are passed over


class StatsLog:
    """`folder/stats.jsonl`, and the file before it as `stats.jsonl.1`."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "stats.jsonl"
        self.previous_path = folder / "stats.jsonl.1"
        self._max_bytes = max_bytes
        self._end_torn_line()

    def append(self, stats: PlannerStats) -> None:
        """Raises OSError when the disk refuses."""
        line = msgspec.json.encode(stats) + b"\n"
        if self.path.exists() and self.path.stat().st_size + len(line) > self._max_bytes:
            self.path.replace(self.previous_path)
        with self.path.open("ab") as file:
            file.write(line)

    def read_totals(self) -> Totals:
        """Of the newest whole line; zeros when there is none."""
        for path in (self.path, self.previous_path):
            for line in reversed(_last_lines(path)):
                try:
                    return _TOTALS.decode(line)
                except msgspec.DecodeError:
                    continue  # torn by a crash, or a stranger's
        return NOTHING_YET

    def _end_torn_line(self) -> None:
        """So that the next line appended stands alone."""
        last = self.path.read_bytes()[-1:] if self.path.exists() else b""
        if last not in (b"", b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")


def _last_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _TAIL_BYTES))
        return [line for line in file.read().split(b"\n") if line]
