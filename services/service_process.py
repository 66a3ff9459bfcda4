"""A child process of `ampd up`: its output in one log file, its death noticed, its end bounded in time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

_TAIL_BYTES = 16_384


class ServiceProcess:
    """Runs `argv` in a session of its own, so that a terminal's Ctrl-C reaches it only through us.

    The child is told our pid (AMPD_PARENT_PID) and asks the kernel to be ended when we are, however we end.
    """

    def __init__(self, name: str, argv: Sequence[str], log_path: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log_path = log_path
        self._argv = list(argv)
        self._environment = dict(environment)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """The pid of the newest start. Raises RuntimeError before the first."""
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal's number when a signal ended it."""
        return None if self._process is None else self._process.returncode

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it, or start it again once it has ended; the log is appended to."""
        assert not self.is_running, f"{self.name} is running"
        environment = {**os.environ, **self._environment, "AMPD_PARENT_PID": str(os.getpid())}
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    async def wait(self) -> int:
        """Wait until it has ended and return its status (minus the signal's number for a signal)."""
        assert self._process is not None, f"{self.name} was not started"
        return await self._process.wait()

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, at most `grace_s` seconds to finish, then SIGKILL. Does nothing when it has ended."""
        if self._process is None:
            return
        self.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            self.send_signal(signal.SIGKILL)
            await self._process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        if self.is_running and self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended between the check and the signal
                self._process.send_signal(number)

    def last_log_lines(self, num_lines: int = 15) -> str:
        """The end of its log, for a report of why it ended."""
        with self.log_path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - _TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])


def describe_exit(returncode: int) -> str:
    """'status 3' or 'signal SIGKILL', for people."""
    if returncode >= 0:
        return f"status {returncode}"
    try:
        return f"signal {signal.Signals(-returncode).name}"
    except ValueError:
        return f"signal {-returncode}"
