"""The planner on a bus: what it answers, what it survives, what it knows after a restart."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from heartbeats import make_heartbeat

from planner.app import PlannerService
from planner.stats_log import StatsLog
from shared import subjects
from shared.errors import ErrorCode
from shared.memory_bus import MemoryBus, MemoryHub
from shared.messages import (
    Ack,
    ErrorReply,
    GetStats,
    PlannerStats,
    RoundObserved,
    Slo,
    decode,
    encode,
)

ROUND = RoundObserved(
    tenant="t", session="s", round=0, delay_s=None, ttft_s=0.1, tpot_s=0.01, slo=Slo(), usage=None, error=None
)
BEAT = make_heartbeat("decode-0")


async def start(hub: MemoryHub, folder: Path) -> tuple[PlannerService, MemoryBus]:
    bus = await hub.connect("planner")
    planner = PlannerService(bus, StatsLog(folder))
    await planner.start()
    return planner, bus


async def ask(client: MemoryBus, data: bytes) -> object:
    return decode(await client.request(subjects.PLANNER_STATS, data, timeout_s=10.0))


async def test_it_answers_with_what_it_heard(tmp_path: Path) -> None:
    hub = MemoryHub()
    _, bus = await start(hub, tmp_path)
    client = await hub.connect("client")
    await client.publish(subjects.OBSERVED_ROUND, encode(ROUND))
    await client.publish(subjects.heartbeat("decode-0"), encode(BEAT))
    await client.flush()
    stats = await ask(client, encode(GetStats()))
    assert isinstance(stats, PlannerStats)
    assert (stats.num_rounds, stats.num_attained) == (1, 1)
    assert stats.workers == (BEAT,)
    as_json = await client.request(subjects.PLANNER_STATS, b'{"type":"get_stats"}', timeout_s=10.0)
    assert msgspec.json.decode(as_json)["num_rounds"] == 1
    await client.close()
    await bus.close()


async def test_strange_messages_are_counted_and_change_nothing(tmp_path: Path) -> None:
    hub = MemoryHub()
    planner, bus = await start(hub, tmp_path)
    client = await hub.connect("client")
    for data in (b"", b"\xc1", b"{", encode(Ack()), encode(ROUND)[:-3]):
        await client.publish(subjects.OBSERVED_ROUND, data)
    await client.flush()
    stats = await ask(client, encode(GetStats()))
    assert isinstance(stats, PlannerStats)
    assert stats.num_rounds == 0
    assert planner.num_malformed == 5
    await client.close()
    await bus.close()


@pytest.mark.parametrize(
    ("data", "code"),
    [(b'{"type":"get_status"}', ErrorCode.INVALID_REQUEST), (b"not a message", ErrorCode.MALFORMED_MESSAGE)],
)
async def test_a_wrong_request_gets_a_typed_error(tmp_path: Path, data: bytes, code: ErrorCode) -> None:
    hub = MemoryHub()
    _, bus = await start(hub, tmp_path)
    client = await hub.connect("client")
    reply = await ask(client, data)
    assert isinstance(reply, ErrorReply)
    assert reply.code is code
    await client.close()
    await bus.close()


async def test_totals_are_read_back_after_a_restart(tmp_path: Path) -> None:
    hub = MemoryHub()
    planner, bus = await start(hub, tmp_path)
    client = await hub.connect("client")
    await client.publish(subjects.OBSERVED_ROUND, encode(ROUND))
    await client.flush()
    await ask(client, encode(GetStats()))  # answered after the round was heard
    planner.write_down()
    await bus.close()  # as a kill leaves it: nothing else is written
    _, bus = await start(hub, tmp_path)
    await client.publish(subjects.OBSERVED_ROUND, encode(ROUND))
    await client.flush()
    stats = await ask(client, encode(GetStats()))
    assert isinstance(stats, PlannerStats)
    assert stats.num_rounds == 2
    await client.close()
    await bus.close()


async def test_a_disk_that_refuses_does_not_end_the_service(tmp_path: Path) -> None:
    hub = MemoryHub()
    planner, bus = await start(hub, tmp_path)
    (tmp_path / "stats.jsonl").mkdir()  # cannot be appended to
    planner.write_down()
    client = await hub.connect("client")
    assert isinstance(await ask(client, encode(GetStats())), PlannerStats)
    await client.close()
    await bus.close()
