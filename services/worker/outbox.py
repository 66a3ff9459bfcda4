"""Events that must reach the coordinator: repeated until acknowledged, while the process lives."""

from __future__ import annotations

import asyncio

import structlog

from shared import subjects
from shared.bus import Bus
from shared.errors import BusError
from shared.messages import CoordinatorEvent, ErrorReply, decode, encode

log = structlog.get_logger(__name__)

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 2.0


class Outbox:
    """At most `max_pending` events wait. Over that the newest is dropped and counted: the coordinator, which asks a
    worker for any round it has not heard the end of, then learns it by sending `run_round` again."""

    def __init__(self, bus: Bus, *, max_pending: int = 4096, timeout_s: float = 2.0) -> None:
        self._bus = bus
        self._max_pending = max_pending
        self._timeout_s = timeout_s
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_dropped = 0

    def __len__(self) -> int:
        return len(self._tasks)

    def send(self, event: CoordinatorEvent) -> None:
        if len(self._tasks) >= self._max_pending:
            self.num_dropped += 1
            log.error("outbox_full", dropped=type(event).__name__)
            return
        task = asyncio.create_task(self._deliver(event), name=f"outbox:{type(event).__name__}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deliver(self, event: CoordinatorEvent) -> None:
        data = encode(event)
        wait_s = FIRST_RETRY_S
        while True:
            try:
                reply = decode(await self._bus.request(subjects.COORDINATOR_EVENT, data, timeout_s=self._timeout_s))
            except BusError as error:
                log.debug("event_not_acknowledged", event_type=type(event).__name__, error=str(error))
            else:
                if isinstance(reply, ErrorReply):
                    log.warning("event_refused", event_type=type(event).__name__, error=reply.message)
                return
            await asyncio.sleep(wait_s)
            wait_s = min(LAST_RETRY_S, wait_s * 2)

    async def drain(self, timeout_s: float) -> None:
        """Wait for what is pending, up to timeout_s."""
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=timeout_s)

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
