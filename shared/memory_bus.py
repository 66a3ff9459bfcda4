"""A bus inside one process, for tests and simulations: bytes in, bytes out, and faults on request.

Buses of one MemoryHub talk to each other as processes on one NATS server do: wildcards, queue groups,
requests, no responders, bounded pending queues. A MessageRule drops, delays or duplicates messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Mapping
from dataclasses import dataclass

from shared.bus_core import DRAIN_S, BusCore, Opened, Receive
from shared.errors import BusError, ErrorCode
from shared.handler_tasks import Received

PENDING_MESSAGES = 65_536


@dataclass(slots=True)
class MessageRule:
    """A fault for the messages on `subject` (wildcards allowed; replies travel on `_INBOX.>`).

    drop and duplicate are probabilities in [0, 1]; a delay is drawn evenly from delay_s, seconds, for each copy
    on its own, so that copies overtake each other. `sender` is a bus's name, "" any. At most max_times messages.
    The num_* fields show that the fault has happened.
    """

    subject: str
    drop: float = 0.0
    duplicate: float = 0.0
    delay_s: tuple[float, float] = (0.0, 0.0)
    sender: str = ""
    max_times: int | None = None
    num_dropped: int = 0
    num_duplicated: int = 0
    num_delayed: int = 0

    def applies(self, subject: str, sender: str) -> bool:
        used_up = self.max_times is not None and self.num_applied >= self.max_times
        return not used_up and self.sender in ("", sender) and matches(self.subject, subject)

    @property
    def num_applied(self) -> int:
        return self.num_dropped + self.num_duplicated + self.num_delayed


def matches(pattern: str, subject: str) -> bool:
    """NATS wildcards: `*` is one token, a last `>` is one or more."""
    if pattern == subject:
        return True
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(given) <= len(wanted):
            return False
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(w in ("*", g) for w, g in zip(wanted, given, strict=True))


class MemoryHub:
    """The server's part: who subscribes to what, and the faults.

    With the same `seed`, drops, delays and the choices within queue groups repeat.
    """

    def __init__(self, *, max_payload: int = 8 * 1024 * 1024, seed: int = 0) -> None:
        self.max_payload = max_payload
        self.rules: list[MessageRule] = []
        self.subscriptions: list[MemorySubscription] = []
        self._random = random.Random(seed)

    async def connect(self, name: str) -> MemoryBus:
        bus = MemoryBus(self, name)
        await bus._open_inbox()
        return bus

    def add_rule(self, rule: MessageRule) -> MessageRule:
        """The first rule that applies decides over a message. Remove it with `rules.remove`."""
        self.rules.append(rule)
        return rule

    def route(self, sender: MemoryBus, subject: str, data: bytes, reply: str) -> None:
        receivers = self._choose_receivers(subject)
        if not receivers and reply:
            # as the NATS server answers: at once, and no rule applies to it
            self._deliver(reply, b"", "", no_responders=True)
            return
        for delay_s in self._draw_copies(subject, sender.name):
            if delay_s > 0:
                asyncio.get_running_loop().call_later(delay_s, self._deliver, subject, data, reply)
            else:
                for receiver in receivers:
                    receiver.put(subject, data, reply)

    def _deliver(self, subject: str, data: bytes, reply: str, no_responders: bool = False) -> None:
        for receiver in self._choose_receivers(subject):
            receiver.put(subject, data, reply, no_responders=no_responders)

    def _choose_receivers(self, subject: str) -> list[MemorySubscription]:
        """Every matching subscription without a queue group, and one of each group."""
        chosen: list[MemorySubscription] = []
        groups: dict[str, list[MemorySubscription]] = {}
        for subscription in self.subscriptions:
            if matches(subscription.subject, subject):
                if subscription.queue:
                    groups.setdefault(subscription.queue, []).append(subscription)
                else:
                    chosen.append(subscription)
        return chosen + [self._random.choice(members) for members in groups.values()]

    def _draw_copies(self, subject: str, sender: str) -> list[float]:
        """Delay in seconds of each copy to deliver; [] drops the message."""
        rule = next((r for r in self.rules if r.applies(subject, sender)), None)
        if rule is None:
            return [0.0]
        if self._random.random() < rule.drop:
            rule.num_dropped += 1
            return []
        num_copies = 1
        if self._random.random() < rule.duplicate:
            rule.num_duplicated += 1
            num_copies = 2
        delays = [self._random.uniform(*rule.delay_s) for _ in range(num_copies)]
        rule.num_delayed += any(delay > 0 for delay in delays)
        return delays


class MemoryBus(BusCore):
    """One connection to a MemoryHub; made by MemoryHub.connect."""

    def __init__(self, hub: MemoryHub, name: str) -> None:
        super().__init__(name)
        self._hub = hub
        self._opened: list[MemorySubscription] = []
        self._is_closed = False

    @property
    def max_payload(self) -> int:
        return self._hub.max_payload

    async def flush(self) -> None:
        """The hub has a message as soon as it is published; faults do not concern this."""
        if self._is_closed:
            raise BusError(ErrorCode.BUS_UNAVAILABLE, "the bus is closed")
        await asyncio.sleep(0)

    async def _send(self, subject: str, data: bytes, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        if self._is_closed:
            raise BusError(ErrorCode.BUS_UNAVAILABLE, "the bus is closed")
        self._hub.route(self, subject, data, reply)

    async def _open(self, subject: str, queue: str, receive: Receive) -> Opened:
        if self._is_closed:
            raise BusError(ErrorCode.BUS_UNAVAILABLE, "the bus is closed")
        subscription = MemorySubscription(self, self._hub, subject, queue, receive)
        self._opened.append(subscription)
        return subscription

    async def _respond(self, reply: str, data: bytes) -> None:
        self._check_outgoing(reply, data)
        await self._send(reply, data)

    def count_dropped(self) -> None:
        self._counters["slow_consumers"] += 1

    async def _close_transport(self) -> None:
        self._is_closed = True
        for subscription in self._opened:
            await subscription.close(deliver_pending=False)


class MemorySubscription:
    """A bounded queue and the task that empties it, one message at a time."""

    def __init__(self, bus: MemoryBus, hub: MemoryHub, subject: str, queue: str, receive: Receive) -> None:
        self.subject = subject
        self.queue = queue
        self._bus = bus
        self._hub = hub
        self._receive = receive
        self._pending: asyncio.Queue[Received] = asyncio.Queue(PENDING_MESSAGES)
        self._pump = asyncio.create_task(self._run(), name=f"memory bus {subject}")
        hub.subscriptions.append(self)

    def put(self, subject: str, data: bytes, reply: str, *, no_responders: bool = False) -> None:
        message = Received(subject, data, reply, self._bus._respond, no_responders=no_responders)
        try:
            self._pending.put_nowait(message)
        except asyncio.QueueFull:
            self._bus.count_dropped()

    async def close(self, *, deliver_pending: bool) -> None:
        with contextlib.suppress(ValueError):  # closed before
            self._hub.subscriptions.remove(self)
        if deliver_pending:
            with contextlib.suppress(TimeoutError):  # handlers hold every slot: what waits behind them is dropped
                async with asyncio.timeout(DRAIN_S):
                    await self._pending.join()
        self._pump.cancel()
        if self._pump is not asyncio.current_task():
            await asyncio.wait({self._pump})

    async def _run(self) -> None:
        while True:
            message = await self._pending.get()
            try:
                await self._receive(message)
            finally:
                self._pending.task_done()
