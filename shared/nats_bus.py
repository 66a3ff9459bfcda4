"""The bus over NATS. nats-py's client stays behind this file and record_log.py.

What nats-py leaves open and this closes: a publish while disconnected fails instead of piling up in memory;
a request whose connection is lost fails at once instead of at its time-out; slow-consumer drops are counted;
`close` waits for the client's own tasks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import nats
import nats.aio.client
import nats.errors

from shared.bus_core import BusCore, Opened, Receive
from shared.errors import BusError, ErrorCode
from shared.handler_tasks import Received

PING_INTERVAL_S = 2
MAX_OUTSTANDING_PINGS = 2  # a silent server is noticed after at most 6 s, a closed connection at once
RECONNECT_WAIT_S = 0.2
CONNECT_TIMEOUT_S = 2
FLUSH_TIMEOUT_S = 2
# Per subscription; what arrives beyond is dropped and counted in slow_consumers.
PENDING_MESSAGES = 65_536
PENDING_BYTES = 64 * 1024 * 1024
# Written but not flushed, per connection: a publisher waits for the socket beyond this.
OUTBOUND_BYTES = 4 * 1024 * 1024
CLOSE_TIMEOUT_S = 5.0
_SETTLE_S = 0.02


async def connect_nats_bus(
    url: str, *, name: str, timeout_s: float = 10.0, on_lost: Callable[[str], None] | None = None
) -> NatsBus:
    """Connect to nats://[user:password@|token@]host:port, trying again until timeout_s has passed.

    `on_lost(reason)` is called if the server ends the connection for good (credentials revoked, too many
    connections): nothing reconnects after that, and the process should stop.
    Raises BusError that says why the server could not be reached.
    """
    bus = NatsBus(name, on_lost)
    try:
        await bus._connect(url, timeout_s)
    except BaseException:
        await bus._close_transport()
        raise
    return bus


class NatsBus(BusCore):
    """Made by connect_nats_bus."""

    def __init__(self, name: str, on_lost: Callable[[str], None] | None = None) -> None:
        super().__init__(name)
        self._on_lost = on_lost
        self._client: Any = nats.aio.client.Client()
        self._connected = asyncio.Event()
        self._lost = asyncio.Event()
        self._last_error = ""
        self._refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def max_payload(self) -> int:
        """As the server's INFO says."""
        return int(self._client.max_payload)

    @property
    def is_connected(self) -> bool:
        return self._connected.is_set() and bool(self._client.is_connected)

    async def wait_connected(self, *, timeout_s: float) -> None:
        """Raises BusError if there is no connection within timeout_s."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.is_connected:
                    await self._connected.wait()
                    if not self._client.is_connected:  # lost this moment; its callback is about to say so
                        await asyncio.sleep(_SETTLE_S)
        except TimeoutError:
            raise BusError(
                ErrorCode.BUS_UNAVAILABLE, f"no connection to the NATS server within {timeout_s:.3g} s"
            ) from None

    @property
    def client(self) -> Any:
        """The nats-py client, for JetStream (record_log.py) alone."""
        return self._client

    # ------------------------------------------------------------------------------- transport

    async def _connect(self, url: str, timeout_s: float) -> None:
        connecting = asyncio.create_task(
            self._client.connect(
                servers=[url],
                name=self.name,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnected,
                reconnected_cb=self._on_reconnected,
                closed_cb=self._on_closed,
                connect_timeout=CONNECT_TIMEOUT_S,
                max_reconnect_attempts=-1,
                reconnect_time_wait=RECONNECT_WAIT_S,
                ping_interval=PING_INTERVAL_S,
                max_outstanding_pings=MAX_OUTSTANDING_PINGS,
                pending_size=OUTBOUND_BYTES,
                flush_timeout=FLUSH_TIMEOUT_S,
                skip_subject_validation=True,  # BusCore has checked it
            )
        )
        try:
            await asyncio.wait({connecting, self._refused}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if self._refused.done():
                raise BusError(
                    ErrorCode.BUS_UNAVAILABLE, f"the NATS server refuses the credentials in the URL: {self._last_error}"
                )
            if not connecting.done():
                raise BusError(
                    ErrorCode.BUS_UNAVAILABLE,
                    f"no connection to the NATS server within {timeout_s:.3g} s ({self._last_error or 'no answer'}):"
                    " is it running, and is the URL right?",
                )
            try:
                connecting.result()
            except (nats.errors.Error, OSError, ValueError) as error:
                raise BusError(ErrorCode.BUS_UNAVAILABLE, f"cannot connect to NATS: {error}") from error
        finally:
            connecting.cancel()
            await asyncio.wait({connecting}, timeout=CLOSE_TIMEOUT_S)
            self._refused.cancel()
        self._connected.set()
        await self._open_inbox()
        await self.flush()

    async def _send(self, subject: str, data: bytes, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        if not self.is_connected:
            raise BusError(
                ErrorCode.BUS_UNAVAILABLE,
                "the bus is closed" if self._client.is_closed else "the connection to the NATS server is down",
            )
        try:
            await self._client.publish(subject, data, reply=reply, headers=headers)
        except (nats.errors.Error, OSError) as error:
            raise BusError(ErrorCode.BUS_UNAVAILABLE, f"cannot publish: {error}") from error

    async def _open(self, subject: str, queue: str, receive: Receive) -> Opened:
        async def on_message(message: Any) -> None:
            # headers are the server's status (no responders) or a stranger's: ours has none on the bus
            no_responders = message.headers is not None and message.headers.get("Status") == "503"
            await receive(
                Received(message.subject, message.data, message.reply, self._respond, no_responders=no_responders)
            )

        if not self.is_connected:
            raise BusError(ErrorCode.BUS_UNAVAILABLE, "the connection to the NATS server is down")
        try:
            subscription = await self._client.subscribe(
                subject,
                queue=queue,
                cb=on_message,
                pending_msgs_limit=PENDING_MESSAGES,
                pending_bytes_limit=PENDING_BYTES,
            )
        except (nats.errors.Error, OSError) as error:
            raise BusError(ErrorCode.BUS_UNAVAILABLE, f"cannot subscribe to {subject}: {error}") from error
        return _NatsSubscription(subscription)

    async def _respond(self, reply: str, data: bytes) -> None:
        self._check_outgoing(reply, data)
        await self._send(reply, data)

    async def _close_transport(self) -> None:
        client = self._client
        if client._flush_queue is None:
            return  # the URL was refused before anything was started
        self._on_lost = None
        await _stop_reconnecting(client)
        # nats-py cancels these and does not wait for them
        tasks = [
            task
            for name in ("_reading_task", "_ping_interval_task", "_flusher_task")
            if (task := getattr(client, name, None)) is not None
        ]
        tasks += [s._wait_for_msgs_task for s in client._subs.values() if s._wait_for_msgs_task is not None]
        self._connected.clear()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await client.close()
        except (TimeoutError, OSError, nats.errors.Error) as error:
            self._log.warning("the NATS connection did not close cleanly", error=str(error))
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)

    # ------------------------------------------------------------------- callbacks of nats-py

    async def _on_error(self, error: Exception) -> None:
        self._last_error = str(error) or type(error).__name__
        if isinstance(error, nats.errors.SlowConsumerError):
            self._counters["slow_consumers"] += 1
            count = self._counters["slow_consumers"]
            if count & (count - 1) == 0:  # 1, 2, 4, 8 ...: a flood of drops must not become a flood of lines
                self._log.warning("slow consumer: messages dropped", subject=error.subject, dropped=count)
            return
        self._counters["errors"] += 1
        if not self._refused.done() and "authorization" in self._last_error.lower():
            self._refused.set_result(self._last_error)  # trying again would not help
        elif self._connected.is_set():
            self._log.warning("NATS connection error", error=self._last_error)

    async def _on_disconnected(self) -> None:
        if not self._connected.is_set():
            return
        self._connected.clear()
        self._counters["disconnects"] += 1
        self._fail_waiting("the connection to the NATS server was lost")
        self._log.warning("disconnected from NATS")

    async def _on_reconnected(self) -> None:
        self._connected.set()
        self._counters["reconnects"] += 1
        self._log.info("reconnected to NATS", reconnects=self._counters["reconnects"])

    async def _on_closed(self) -> None:
        self._connected.clear()
        self._fail_waiting("the NATS server ended the connection")
        if self._on_lost is not None and self._closing is None:
            reason = str(self._client.last_error or "the server ended it")
            self._log.error("the NATS connection is closed for good", reason=reason)
            self._on_lost(reason)


async def _stop_reconnecting(client: Any) -> None:
    """nats-py swallows a cancellation in some places, and would be connected again after its own `close`."""
    for _ in range(5):
        task = client._reconnection_task
        if task is None or task.done():
            return
        task.cancel()
        await asyncio.wait({task}, timeout=1.0)


class _NatsSubscription:
    def __init__(self, subscription: Any) -> None:
        self._subscription = subscription

    async def close(self, *, deliver_pending: bool) -> None:
        task = self._subscription._wait_for_msgs_task
        try:
            if deliver_pending and self._subscription._conn.is_connected:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._subscription.drain()
            else:
                await self._subscription.unsubscribe()
        except (TimeoutError, nats.errors.Error, OSError):
            self._subscription._stop_processing()  # the connection is gone, and the server's side with it
        if task is not None and task is not asyncio.current_task():
            await asyncio.wait({task}, timeout=CLOSE_TIMEOUT_S)
