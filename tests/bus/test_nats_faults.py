"""NatsBus when the server is killed, stopped, refuses, or sends faster than handlers take."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from shared import nats_bus
from shared.bus import BusMessage
from shared.errors import BusError, NoResponders, RequestTimeout
from shared.memory_bus import MemoryHub
from shared.nats_bus import NatsBus, connect_nats_bus
from shared.nats_server import NatsServer

LIMIT_S = 30.0

ConnectNats = Callable[..., Awaitable[NatsBus]]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for lies in the bus or in another process
            await asyncio.sleep(0.01)


@pytest.fixture
async def connect_to() -> AsyncIterator[ConnectNats]:
    opened: list[NatsBus] = []

    async def connect(server: NatsServer, name: str, **options: Any) -> NatsBus:
        opened.append(await connect_nats_bus(server.url, name=name, **options))
        return opened[-1]

    yield connect
    for bus in opened:
        await bus.close()


async def echo(message: BusMessage) -> None:
    await message.respond(message.data)


async def test_a_killed_and_restarted_server(nats_server: NatsServer, connect_to: ConnectNats) -> None:
    """Subscriptions, queue groups and services are back by themselves; the gap shows in the sequence numbers."""
    publisher, receiver = await connect_to(nats_server, "publisher"), await connect_to(nats_server, "receiver")
    received: list[int] = []
    await receiver.subscribe_ordered("numbers", lambda message: received.append(int(message.data)))
    await receiver.subscribe("svc.echo", echo, queue="q")
    await receiver.register_service("svc", "0.1.0", {})
    for i in range(100):
        await publisher.publish("numbers", str(i).encode())
    await publisher.flush()
    await until(lambda: len(received) == 100)

    nats_server.kill()
    assert not nats_server.is_running
    await until(lambda: not publisher.is_connected and not receiver.is_connected)
    with pytest.raises(BusError, match="down"):
        await publisher.publish("numbers", b"100")
    with pytest.raises(BusError):
        await publisher.request("svc.echo", b"", timeout_s=LIMIT_S)
    with pytest.raises(BusError):
        await receiver.subscribe("svc.other", echo)
    with pytest.raises(BusError):
        await publisher.wait_connected(timeout_s=0.01)

    nats_server.start()
    await publisher.wait_connected(timeout_s=LIMIT_S)
    await receiver.wait_connected(timeout_s=LIMIT_S)
    assert await publisher.request("svc.echo", b"back", timeout_s=LIMIT_S) == b"back"
    assert b'"name":"svc"' in await publisher.request("$SRV.PING.svc", b"", timeout_s=LIMIT_S)
    await publisher.publish("numbers", b"101")
    await until(lambda: received[-1] == 101)
    assert received == [*range(100), 101]
    assert publisher.counters["disconnects"] == publisher.counters["reconnects"] == 1
    assert publisher.counters["published"] == 101


async def test_a_request_in_flight_fails_when_the_connection_is_lost_not_at_its_timeout(
    nats_server: NatsServer, connect_to: ConnectNats
) -> None:
    bus = await connect_to(nats_server, "bus")
    asked = asyncio.Event()
    await bus.subscribe_ordered("silent", lambda message: asked.set())
    waiting = asyncio.create_task(bus.request("silent", b"", timeout_s=3600.0))
    await until(asked.is_set)
    nats_server.kill()
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(BusError, match="lost") as caught:
            await waiting
    assert not isinstance(caught.value, RequestTimeout | NoResponders)


async def test_a_stopped_server_is_noticed_by_its_silence(nats_server: NatsServer, connect_to: ConnectNats) -> None:
    bus = await connect_to(nats_server, "bus")
    await bus.subscribe("svc.echo", echo)

    async def ask_until_refused() -> None:
        while True:  # a few requests may pass before all threads of the server have stopped
            await bus.request("svc.echo", b"", timeout_s=3600.0)

    os.kill(nats_server.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(BusError, match="lost"):
                await ask_until_refused()
        assert bus.counters["disconnects"] == 1
    finally:
        os.kill(nats_server.pid, signal.SIGCONT)
    await bus.wait_connected(timeout_s=LIMIT_S)
    assert await bus.request("svc.echo", b"again", timeout_s=LIMIT_S) == b"again"


async def test_close_while_the_server_is_gone(nats_server: NatsServer, connect_to: ConnectNats) -> None:
    before = asyncio.all_tasks()
    bus = await connect_to(nats_server, "bus")
    await bus.subscribe("svc.echo", echo)
    await bus.subscribe_ordered("numbers", lambda message: None)
    nats_server.kill()
    await until(lambda: not bus.is_connected)
    async with asyncio.timeout(LIMIT_S):
        await bus.close()
    assert asyncio.all_tasks() == before


async def test_close_at_any_moment_of_a_reconnect_ends_it(nats_server: NatsServer) -> None:
    before = asyncio.all_tasks()
    for moment in range(5):
        bus = await connect_nats_bus(nats_server.url, name="bus")
        await bus.subscribe_ordered("numbers", lambda message: None)
        nats_server.kill()
        await until(lambda bus=bus: not bus.is_connected)
        nats_server.start()
        for _ in range(moment * 5):  # turns of the loop: different points of nats-py's reconnect
            await asyncio.sleep(0.0)
            if not bus.is_connected:
                await asyncio.sleep(0.01)
        await bus.close()
        assert asyncio.all_tasks() == before
        assert not bus.is_connected


async def test_a_reconnect_that_swallows_a_cancellation_is_ended_too(
    nats_server: NatsServer, connect_to: ConnectNats
) -> None:
    """As nats-py's does when the cancellation meets the connection's success (asyncio.wait_for, Python 3.11)."""
    bus = await connect_to(nats_server, "bus")
    swallowed = 0

    async def reconnect_stubbornly() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if swallowed == 2:
                    raise
                swallowed += 1

    bus.client._reconnection_task = asyncio.create_task(reconnect_stubbornly())
    await asyncio.sleep(0)
    async with asyncio.timeout(LIMIT_S):
        await bus.close()
    assert swallowed == 2
    assert bus.client._reconnection_task.done()


async def test_connecting_to_nothing_says_so(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    with NatsServer(tmp_path) as server:
        url = server.url
    with pytest.raises(BusError, match="is it running"):
        await connect_nats_bus(url, name="bus", timeout_s=0.5)
    with pytest.raises(BusError, match="cannot connect"):
        await connect_nats_bus("nats://127.0.0.1:port", name="bus", timeout_s=0.5)
    assert asyncio.all_tasks() == before


async def test_a_server_that_comes_up_later_is_found(tmp_path: Path) -> None:
    with NatsServer(tmp_path) as server:
        url = server.url
    connecting = asyncio.create_task(connect_nats_bus(url, name="early", timeout_s=LIMIT_S))
    await asyncio.sleep(0)
    server.start()
    try:
        bus = await connecting
        await bus.close()
    finally:
        server.stop()


async def test_wrong_credentials_are_refused_at_once(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    with NatsServer(tmp_path, token="correct") as server:
        bus = await connect_nats_bus(server.url, name="bus")
        await bus.close()
        for url in (server.url.replace("correct", "wrong"), server.url.replace("correct@", "")):
            async with asyncio.timeout(LIMIT_S):
                with pytest.raises(BusError, match="credentials"):
                    await connect_nats_bus(url, name="bus", timeout_s=3600.0)
    assert asyncio.all_tasks() == before


async def test_a_connection_that_the_server_ends_for_good_is_reported() -> None:
    send_error = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Just enough of a NATS server: greet, echo to the one inbox, then end the connection with an error."""
        writer.write(b'INFO {"server_id":"x","version":"2.10.0","max_payload":1024,"headers":true}\r\n')
        try:
            while line := await reader.readline():
                if line.startswith(b"PING"):
                    writer.write(b"PONG\r\n")
                elif line.startswith(b"PUB"):
                    subject = line.split()[1]
                    await reader.readline()
                    writer.write(b"MSG %s 1 0\r\n\r\n" % subject)
                    send_error.set()
                if send_error.is_set() and line.startswith(b"\r\n"):
                    writer.write(b"-ERR 'User Authentication Expired'\r\n")
        finally:
            writer.close()

    reasons: list[str] = []
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        bus = await connect_nats_bus(f"nats://127.0.0.1:{port}", name="bus", on_lost=reasons.append)
        assert bus.max_payload == 1024
        bus.client._transport.write(b"\r\n")  # tell the server to end it
        await until(lambda: bool(reasons))
        with pytest.raises(BusError, match="closed"):
            await bus.publish("a", b"")
        await bus.close()
    assert reasons == ["nats: user authentication expired"]


async def overflow(publisher: Any, receiver: Any) -> None:
    """50 messages to a handler that holds its only slot, with room for 10 to wait."""
    release, started = asyncio.Event(), asyncio.Event()
    handled: list[int] = []

    async def hold(message: BusMessage) -> None:
        started.set()
        async with asyncio.timeout(LIMIT_S):
            await release.wait()
        handled.append(int(message.data))

    await receiver.subscribe("slow", hold, max_in_flight=1)
    await publisher.publish("slow", b"0")
    await until(started.is_set)
    for i in range(1, 50):
        await publisher.publish("slow", str(i).encode())
    await publisher.flush()
    await receiver.flush()
    await until(lambda: receiver.counters["slow_consumers"] > 0)
    release.set()
    await until(lambda: len(handled) + receiver.counters["slow_consumers"] == 50)
    assert handled == sorted(handled)
    assert 10 <= len(handled) <= 13


async def test_overflow_is_dropped_and_counted_on_nats(
    shared_nats_server: NatsServer, connect_to: ConnectNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = await connect_to(shared_nats_server, "receiver")
    monkeypatch.setattr(nats_bus, "PENDING_MESSAGES", 10)
    await overflow(await connect_to(shared_nats_server, "publisher"), receiver)


async def test_overflow_is_dropped_and_counted_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.memory_bus.PENDING_MESSAGES", 10)
    hub = MemoryHub()
    publisher, receiver = await hub.connect("publisher"), await hub.connect("receiver")
    await overflow(publisher, receiver)
    await publisher.close()
    await receiver.close()
