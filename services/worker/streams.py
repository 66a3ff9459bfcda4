"""Publishing of token streams, off the engine's path and in order.

A publish that fails is counted and forgotten: a stream is at-most-once by design, its readers find gaps by
`start_index` and read them again from the coordinator, which gets every round's whole output in `round_ended`.
"""

from __future__ import annotations

import asyncio

import structlog

from shared.bus import Bus
from shared.errors import AmpdError
from shared.messages import Encoding, StreamMessage, encode

log = structlog.get_logger(__name__)


class StreamPublisher:
    def __init__(self, bus: Bus, *, max_queued: int = 65_536) -> None:
        self._bus = bus
        self._queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(max_queued)
        self.num_lost = 0

    def put(self, subject: str, message: StreamMessage, encoding: Encoding) -> None:
        """Queue one message; never blocks."""
        try:
            self._queue.put_nowait((subject, encode(message, encoding)))
        except asyncio.QueueFull:
            self.num_lost += 1

    async def run(self) -> None:
        while True:
            subject, data = await self._queue.get()
            try:
                await self._bus.publish(subject, data)
            except AmpdError as error:
                self.num_lost += 1
                log.warning("stream_message_lost", subject=subject, error=error.message)
            finally:
                self._queue.task_done()

    async def drain(self) -> None:
        await self._queue.join()
