"""Live progress of a replay: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadgen.records import RoundRecord
from loadgen.replay import SessionsInFlight
from loadgen.report import attains
from shared.messages import Slo

LINE_EVERY_S = 10.0
REFRESH_S = 0.25


class ReplayProgress:
    """Counts records as they come; `show()` displays the counts while its block runs."""

    def __init__(self, num_rounds: int, num_sessions: int, slo: Slo, console: Console) -> None:
        self.sessions = SessionsInFlight()
        self._num_rounds = num_rounds
        self._num_sessions = num_sessions
        self._slo = slo
        self._console = console
        self._num_ended = self._num_attained = self._num_failed = 0

    def count(self, record: RoundRecord) -> None:
        self._num_ended += 1
        self._num_attained += attains(record, self._slo)
        self._num_failed += record.state != "completed"

    @contextlib.asynccontextmanager
    async def show(self) -> AsyncIterator[None]:
        display = asyncio.create_task(self._draw() if self._console.is_terminal else self._print_lines())
        try:
            yield
        finally:
            display.cancel()
            await asyncio.wait([display])

    def _describe(self) -> str:
        sessions = self.sessions
        return (
            f"sessions {sessions.ended}/{self._num_sessions} ended, {sessions.started - sessions.ended} open · "
            f"within SLO {self._num_attained}/{self._num_ended} · failed {self._num_failed}"
        )

    async def _draw(self) -> None:
        columns = (
            TextColumn("rounds"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, auto_refresh=False) as progress:
            task = progress.add_task(self._describe(), total=self._num_rounds)
            try:
                while True:
                    progress.update(task, completed=self._num_ended, description=self._describe(), refresh=True)
                    await asyncio.sleep(REFRESH_S)
            finally:
                progress.update(task, completed=self._num_ended, description=self._describe(), refresh=True)

    async def _print_lines(self) -> None:
        while True:
            await asyncio.sleep(LINE_EVERY_S)
            self._console.print(f"rounds {self._num_ended}/{self._num_rounds} · {self._describe()}")
