"""The message bus as the services see it. Implementations: NatsBus (nats_bus.py) and MemoryBus (memory_bus.py)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol


class BusMessage(Protocol):
    """A message as a handler receives it."""

    @property
    def subject(self) -> str: ...
    @property
    def data(self) -> bytes: ...
    @property
    def expects_reply(self) -> bool: ...
    async def respond(self, data: bytes) -> None:
        """Answer a request; does nothing when no reply is expected."""


class Subscription(Protocol):
    async def unsubscribe(self) -> None:
        """Stop receiving; handlers already running finish or are cancelled before this returns."""


Handler = Callable[[BusMessage], Awaitable[None]]
OrderedHandler = Callable[[BusMessage], None]


class Bus(Protocol):
    """At-most-once publish, request/reply with deadlines, bounded concurrent handlers.

    Delivery of a publish is never certain: consumers find gaps by sequence numbers. Payloads over
    `max_payload` bytes raise AmpdError INVALID_REQUEST before anything is sent.
    """

    @property
    def max_payload(self) -> int: ...

    @property
    def counters(self) -> Mapping[str, int]:
        """published, requests, timeouts, no_responders, handler_errors, slow_consumers, reconnects, disconnects."""

    async def publish(self, subject: str, data: bytes) -> None: ...

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        """Raises NoResponders, RequestTimeout or BusError (closed)."""

    async def subscribe(
        self, subject: str, handler: Handler, *, queue: str = "", max_in_flight: int = 256
    ) -> Subscription:
        """Every message runs as a task of its own, at most max_in_flight at once; more wait, in order of arrival.

        An AmpdError that leaves the handler is answered as ErrorReply if a reply is expected; any other exception
        is logged, counted in handler_errors, and answered as ErrorReply INTERNAL without details.
        """

    async def subscribe_ordered(self, subject: str, handler: OrderedHandler) -> Subscription:
        """For streams: a synchronous handler, called in the order of arrival."""

    async def register_service(self, name: str, version: str, metadata: Mapping[str, str]) -> None:
        """Answer $SRV.PING / INFO / STATS for this process (NATS services API)."""

    async def flush(self) -> None:
        """Return when the server has everything published so far."""

    async def close(self) -> None:
        """Drain and close; idempotent."""
