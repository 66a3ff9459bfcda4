"""Buses under test: MemoryBus, and NatsBus on a real server of our own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from shared.bus_core import BusCore
from shared.memory_bus import MemoryHub
from shared.nats_bus import connect_nats_bus
from shared.nats_server import NatsServer

Connect = Callable[[str], Awaitable[BusCore]]


@pytest.fixture(scope="session")
def shared_nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """For tests that leave the server alone."""
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A server that the test may kill, restart and fill."""
    with NatsServer(tmp_path / "nats") as server:
        yield server


@pytest.fixture(params=["memory", "nats"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """connect(name) gives another bus on the same hub or server. All are closed at the end, and nothing is left."""
    before = asyncio.all_tasks()
    opened: list[BusCore] = []
    hub = MemoryHub()
    url = request.getfixturevalue("shared_nats_server").url if request.param == "nats" else ""

    async def connect_bus(name: str) -> BusCore:
        bus: BusCore = await (connect_nats_bus(url, name=name) if url else hub.connect(name))
        opened.append(bus)
        return bus

    yield connect_bus
    for bus in opened:
        await bus.close()
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left, f"tasks left behind: {left}"
