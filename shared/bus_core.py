"""What every bus has in common: requests through one inbox, a bounded task per message, service discovery.

A bus is a BusCore with a transport under it (NatsBus, MemoryBus): `_send` puts bytes on a subject and `_open`
calls a coroutine for every message that arrives on one, one call at a time and in order of arrival.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from shared.bus import Handler, OrderedHandler, Subscription
from shared.errors import AmpdError, BusError, ErrorCode, NoResponders, RequestTimeout
from shared.handler_tasks import HandlerTasks, OrderedCalls, Received
from shared.log import get_logger
from shared.service_api import ServiceRegistration

COUNTERS = (
    "published",
    "requests",
    "timeouts",
    "no_responders",
    "handler_errors",
    "slow_consumers",
    "reconnects",
    "disconnects",
    "errors",
)
MAX_OUTSTANDING_REQUESTS = 16_384
DRAIN_S = 5.0  # a handler still running this long after unsubscribe or close is cancelled
FLUSH_TIMEOUT_S = 5.0

_BAD_PUBLISH_SUBJECT = re.compile(r"[\s*>]|^\.|\.\.|\.$|^$")
_BAD_SUBSCRIBE_SUBJECT = re.compile(r"\s|^\.|\.\.|\.$|^$|>.|[^.]>|\*[^.]|[^.]\*")

Receive = Callable[[Received], Awaitable[None]]
Reply = bytes | BusError


class Opened(Protocol):
    """A transport's subscription."""

    async def close(self, *, deliver_pending: bool) -> None:
        """Stop; with deliver_pending, pass on first what has already arrived here."""


class BusCore(ABC):
    """The Bus protocol (shared/bus.py) over a transport. Not thread-safe: one event loop owns it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._log = get_logger("shared.bus").bind(bus=name)
        self._inbox = f"_INBOX.{secrets.token_hex(11)}."
        self._num_requests = 0
        self._waiting: dict[str, Callable[[Reply], None]] = {}  # inbox token -> where its replies go
        self._subscriptions: list[_Subscription] = []
        self._registration: ServiceRegistration | None = None
        self._closing: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------------------- transport

    @property
    @abstractmethod
    def max_payload(self) -> int: ...

    @abstractmethod
    async def _send(self, subject: str, data: bytes, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Raises BusError when the transport is down."""

    @abstractmethod
    async def _open(self, subject: str, queue: str, receive: Receive) -> Opened: ...

    @abstractmethod
    async def _close_transport(self) -> None: ...

    # ------------------------------------------------------------------------------------- Bus

    @property
    def counters(self) -> Mapping[str, int]:
        return self._counters

    async def publish(self, subject: str, data: bytes) -> None:
        self._check_outgoing(subject, data)
        await self._send(subject, data)
        self._counters["published"] += 1

    async def request(
        self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> bytes:
        """Bus.request; `headers` are for JetStream and ignored by a MemoryBus."""
        self._check_outgoing(subject, data)
        self._counters["requests"] += 1
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        with self._expect_reply(lambda reply: None if future.done() else future.set_result(reply)) as inbox:
            try:
                async with asyncio.timeout(max(timeout_s, 0.0)):
                    await self._send(subject, data, inbox, headers)
                    reply = await future
            except TimeoutError:
                self._counters["timeouts"] += 1
                raise RequestTimeout(subject, timeout_s) from None
        if isinstance(reply, NoResponders):
            self._counters["no_responders"] += 1
            raise NoResponders(subject)
        if isinstance(reply, BusError):
            raise reply
        return reply

    async def request_many(
        self, subject: str, data: bytes, *, timeout_s: float, enough: Callable[[Sequence[bytes]], bool]
    ) -> list[bytes]:
        """Every reply within timeout_s, or until `enough(replies)`; at most 1,024. No responder gives []."""
        self._check_outgoing(subject, data)
        replies: list[bytes] = []
        done = asyncio.Event()

        def collect(reply: Reply) -> None:
            if isinstance(reply, bytes):
                replies.append(reply)
            if isinstance(reply, BusError) or len(replies) >= 1024 or enough(replies):
                done.set()

        with self._expect_reply(collect) as inbox:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._send(subject, data, inbox)
                    await done.wait()
            except TimeoutError:
                pass  # the time is what ends a scatter request
        return replies

    async def subscribe(
        self, subject: str, handler: Handler, *, queue: str = "", max_in_flight: int = 256
    ) -> Subscription:
        """Bus.subscribe; the server has the subscription when this returns."""
        tasks = HandlerTasks(subject, queue, handler, max_in_flight, self._count_handler_error)
        return await self._add_subscription(subject, queue, tasks)

    async def subscribe_ordered(self, subject: str, handler: OrderedHandler) -> Subscription:
        """Bus.subscribe_ordered; the server has the subscription when this returns."""
        return await self._add_subscription(subject, "", OrderedCalls(handler, self._count_handler_error))

    async def register_service(self, name: str, version: str, metadata: Mapping[str, str]) -> None:
        if self._registration is not None:
            raise RuntimeError(f"{self.name} is registered already, as {self._registration.name}")
        self._registration = ServiceRegistration(name, version, metadata)
        for subject in self._registration.subjects():
            await self.subscribe(subject, self._answer_discovery)

    async def flush(self) -> None:
        """Return when the server has everything published so far. Raises BusError when it is not reached in 5 s."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        # An echo through our own inbox comes back after all that was sent before it on this connection.
        with self._expect_reply(lambda reply: None if future.done() else future.set_result(reply)) as inbox:
            try:
                async with asyncio.timeout(FLUSH_TIMEOUT_S):
                    await self._send(inbox, b"")
                    reply = await future
            except TimeoutError:
                raise BusError(
                    ErrorCode.BUS_UNAVAILABLE, f"the server did not answer within {FLUSH_TIMEOUT_S:.3g} s"
                ) from None
        if isinstance(reply, BusError):
            raise reply

    async def close(self) -> None:
        """Stop receiving, let handlers finish (cancelled after 5 s), flush, disconnect. Idempotent."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"close {self.name}")
        await asyncio.shield(self._closing)

    # -------------------------------------------------------------------------------- internals

    async def _open_inbox(self) -> None:
        await self._open(self._inbox + "*", "", self._receive_reply)

    async def _receive_reply(self, message: Received) -> None:
        deliver = self._waiting.get(message.subject[len(self._inbox) :])
        if deliver is not None:  # else: a reply after its time-out, or a second reply
            deliver(NoResponders(message.subject) if message.no_responders else message.data)

    @contextmanager
    def _expect_reply(self, deliver: Callable[[Reply], None]) -> Iterator[str]:
        """Yield an inbox subject whose replies go to `deliver` until the block ends."""
        if self._closing is not None and self._closing.done():
            raise BusError(ErrorCode.BUS_UNAVAILABLE, f"the bus {self.name} is closed")
        if len(self._waiting) >= MAX_OUTSTANDING_REQUESTS:
            raise BusError(
                ErrorCode.BUS_UNAVAILABLE, f"{MAX_OUTSTANDING_REQUESTS} requests are waiting for replies already"
            )
        self._num_requests += 1
        token = str(self._num_requests)
        self._waiting[token] = deliver
        try:
            yield self._inbox + token
        finally:
            del self._waiting[token]

    def _fail_waiting(self, reason: str) -> None:
        """The connection is gone: no reply can be relied on, so nobody waits for the time-out."""
        for deliver in list(self._waiting.values()):
            deliver(BusError(ErrorCode.BUS_UNAVAILABLE, reason))

    def _check_outgoing(self, subject: str, data: bytes) -> None:
        if not isinstance(data, bytes):
            raise TypeError(f"the bus carries bytes, not {type(data).__name__}")
        if _BAD_PUBLISH_SUBJECT.search(subject):
            raise ValueError(f"not a subject to publish on: {subject!r}")
        if len(data) > self.max_payload:
            raise AmpdError(
                ErrorCode.INVALID_REQUEST,
                f"the message of {len(data):,} bytes exceeds the bus's limit of {self.max_payload:,} bytes: send less",
            )

    async def _add_subscription(self, subject: str, queue: str, sink: HandlerTasks | OrderedCalls) -> _Subscription:
        if _BAD_SUBSCRIBE_SUBJECT.search(subject):
            raise ValueError(f"not a subject to subscribe to: {subject!r}")
        opened = await self._open(subject, queue, sink.accept)
        subscription = _Subscription(opened, sink, self._subscriptions)
        self._subscriptions.append(subscription)
        try:
            await self.flush()
        except BusError:
            await subscription.unsubscribe()
            raise
        return subscription

    def _count_handler_error(self, subject: str, error: BaseException) -> None:
        self._counters["handler_errors"] += 1
        self._log.error("a bus handler failed", subject=subject, exc_info=error)

    async def _answer_discovery(self, message: object) -> None:
        assert isinstance(message, Received)
        assert self._registration is not None
        endpoints = [s.sink for s in self._subscriptions if isinstance(s.sink, HandlerTasks)]
        await message.respond(self._registration.answer(message.subject, endpoints))

    async def _close(self) -> None:
        for subscription in list(self._subscriptions):
            await subscription.opened.close(deliver_pending=True)
        await asyncio.gather(*(s.sink.close(DRAIN_S) for s in self._subscriptions))
        self._subscriptions.clear()
        try:
            await self.flush()
        except BusError as error:
            self._log.warning("closed without a last flush", error=error.message)
        self._fail_waiting(f"the bus {self.name} was closed")
        await self._close_transport()


class _Subscription:
    def __init__(self, opened: Opened, sink: HandlerTasks | OrderedCalls, registry: list[_Subscription]) -> None:
        self.opened = opened
        self.sink = sink
        self._registry = registry

    async def unsubscribe(self) -> None:
        if self in self._registry:
            self._registry.remove(self)
            await self.opened.close(deliver_pending=False)
            await self.sink.close(DRAIN_S)
