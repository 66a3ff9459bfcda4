"""How a bus runs its handlers: a bounded task per message, or a plain call in order of arrival."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from shared.bus import Handler, OrderedHandler
from shared.errors import AmpdError, BusError, ErrorCode
from shared.messages import ErrorReply, encode, encoding_of, error_reply

ReportError = Callable[[str, BaseException], None]  # (subject, error)

_INTERNAL = ErrorReply(code=ErrorCode.INTERNAL, message="internal error: the service's log has the details")


class Received:
    """A message as a handler gets it (shared.bus.BusMessage)."""

    __slots__ = ("_reply", "_send", "answered", "data", "no_responders", "subject")

    def __init__(
        self,
        subject: str,
        data: bytes,
        reply: str,
        send: Callable[[str, bytes], Awaitable[None]],
        *,
        no_responders: bool = False,
    ) -> None:
        self.subject = subject
        self.data = data
        self.answered = False
        self.no_responders = no_responders  # the server's own answer: nobody subscribes to what was asked
        self._reply = reply
        self._send = send

    @property
    def expects_reply(self) -> bool:
        return bool(self._reply)

    async def respond(self, data: bytes) -> None:
        """Raises BusError when the bus is down, AmpdError INVALID_REQUEST when `data` is too large for it."""
        if self._reply:
            await self._send(self._reply, data)
            self.answered = True


class HandlerTasks:
    """Runs an asynchronous handler as a task per message, at most max_in_flight at once.

    `accept` waits for a free slot; the bus calls it for one message at a time, so the order of arrival is kept.
    """

    def __init__(
        self, subject: str, queue: str, handler: Handler, max_in_flight: int, report_error: ReportError
    ) -> None:
        self.subject = subject
        self.queue = queue
        self.num_requests = 0
        self.num_errors = 0
        self.processing_ns = 0
        self.last_error = ""
        self._handler = handler
        self._report_error = report_error
        self._slots = asyncio.Semaphore(max_in_flight)
        self._tasks: set[asyncio.Task[None]] = set()

    async def accept(self, message: Received) -> None:
        await self._slots.acquire()
        task = asyncio.create_task(self._handle(message), name=f"handle {message.subject}")
        self._tasks.add(task)
        task.add_done_callback(self._release)

    async def close(self, drain_s: float) -> None:
        """Wait for the running handlers, cancel those that take longer than drain_s. Its own caller is not one."""
        tasks = self._tasks - {asyncio.current_task()}
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=drain_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)

    def _release(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._slots.release()

    async def _handle(self, message: Received) -> None:
        started_ns = time.perf_counter_ns()
        self.num_requests += 1
        try:
            await self._handler(message)
        except AmpdError as error:
            await self._answer_error(message, error_reply(error))
        except Exception as error:
            self._report_error(message.subject, error)
            await self._answer_error(message, _INTERNAL)
        finally:
            self.processing_ns += time.perf_counter_ns() - started_ns

    async def _answer_error(self, message: Received, reply: ErrorReply) -> None:
        self.num_errors += 1
        self.last_error = reply.code.value
        if message.answered:
            return
        try:
            await message.respond(encode(reply, encoding_of(message.data)))
        except BusError as error:
            self._report_error(message.subject, error)


class OrderedCalls:
    """Calls a synchronous handler for every message, in order of arrival."""

    def __init__(self, handler: OrderedHandler, report_error: ReportError) -> None:
        self._handler = handler
        self._report_error = report_error

    async def accept(self, message: Received) -> None:
        try:
            self._handler(message)
        except Exception as error:
            self._report_error(message.subject, error)

    async def close(self, drain_s: float) -> None:
        """Nothing runs between two calls of `accept`."""
