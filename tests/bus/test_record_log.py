"""The session log: one behaviour for MemoryRecordLog and JetStreamRecordLog, then what only a real server can do."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shared import subjects
from shared.core.types import SessionKey
from shared.errors import AmpdError, BusError, ErrorCode, RequestTimeout
from shared.nats_bus import NatsBus, connect_nats_bus
from shared.nats_server import NatsServer
from shared.record_log import JetStreamRecordLog, MemoryRecordLog, RecordLog

LIMIT_S = 30.0
A, B = SessionKey("tenant", "a"), SessionKey("tenant", "b")


async def stored(log: RecordLog) -> list[tuple[SessionKey, int, bytes]]:
    return [record async for record in log.load()]


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[NatsBus]:
    bus = await connect_nats_bus(nats_server.url, name="log")
    yield bus
    await bus.close()


@pytest.fixture(params=["memory", "jetstream"])
async def log(request: pytest.FixtureRequest) -> AsyncIterator[RecordLog]:
    if request.param == "memory":
        yield MemoryRecordLog(max_bytes=100_000)
        return
    server: NatsServer = request.getfixturevalue("nats_server")
    connection = await connect_nats_bus(server.url, name="log")
    yield await JetStreamRecordLog.open(connection, max_bytes=100_000)
    await connection.close()


async def test_records_come_back_in_order(log: RecordLog) -> None:
    assert await stored(log) == []
    first = await log.append(A, b"a1", expected_sequence=0)
    second = await log.append(B, b"b1", expected_sequence=0)
    third = await log.append(A, b"\x00a2", expected_sequence=first)
    fourth = await log.append(B, b"", expected_sequence=None)
    assert first < second < third < fourth
    assert await stored(log) == [(A, first, b"a1"), (B, second, b"b1"), (A, third, b"\x00a2"), (B, fourth, b"")]


async def test_a_stale_writer_is_refused_and_stores_nothing(log: RecordLog) -> None:
    first = await log.append(A, b"1", expected_sequence=0)
    last = await log.append(A, b"2", expected_sequence=first)
    await log.append(B, b"other", expected_sequence=0)
    for stale in (0, first, last + 1, last + 100):
        with pytest.raises(AmpdError, match="not the last one") as caught:
            await log.append(A, b"stale", expected_sequence=stale)
        assert caught.value.code == ErrorCode.NOT_OWNER
    assert [data for _, _, data in await stored(log)] == [b"1", b"2", b"other"]
    await log.append(A, b"3", expected_sequence=last)


async def test_of_concurrent_writers_with_one_expectation_exactly_one_wins(log: RecordLog) -> None:
    last = await log.append(A, b"start", expected_sequence=0)
    for turn in range(5):
        outcomes = await asyncio.gather(
            *(log.append(A, f"{turn}-{i}".encode(), expected_sequence=last) for i in range(10)),
            return_exceptions=True,
        )
        won = [o for o in outcomes if isinstance(o, int)]
        lost = [o for o in outcomes if isinstance(o, AmpdError) and o.code == ErrorCode.NOT_OWNER]
        assert (len(won), len(lost)) == (1, 9)
        [last] = won
    assert len(await stored(log)) == 6


async def test_purge_forgets_one_session(log: RecordLog) -> None:
    await log.purge(A)  # nothing there
    first = await log.append(A, b"1", expected_sequence=0)
    await log.append(A, b"2", expected_sequence=first)
    kept = await log.append(B, b"b", expected_sequence=0)
    await log.purge(A)
    assert await stored(log) == [(B, kept, b"b")]
    again = await log.append(A, b"anew", expected_sequence=0)
    assert again > kept
    await log.append(B, b"b2", expected_sequence=kept)


async def test_a_full_log_refuses_and_drops_nothing(log: RecordLog) -> None:
    last = 0

    async def append_until_refused() -> None:
        nonlocal last
        for _ in range(200):
            last = await log.append(A, bytes(1000), expected_sequence=last)

    with pytest.raises(AmpdError, match="full") as caught:
        await append_until_refused()
    assert caught.value.code == ErrorCode.NO_CAPACITY
    records = await stored(log)
    assert 50 < len(records) <= 100
    assert records[-1][1] == last
    await log.purge(A)
    await log.append(B, b"room again", expected_sequence=0)


async def test_records_survive_kill_9_of_the_server(nats_server: NatsServer, bus: NatsBus) -> None:
    log = await JetStreamRecordLog.open(bus)
    last = 0
    for i in range(50):
        last = await log.append(A, str(i).encode(), expected_sequence=last)
    nats_server.kill()
    nats_server.start()
    # the same log object, over the reconnected bus
    last = await log.append(A, b"after", expected_sequence=last)
    wanted = [*(str(i).encode() for i in range(50)), b"after"]
    assert [data for _, _, data in await stored(log)] == wanted
    # and a new owner, after a clean restart
    nats_server.restart()
    await bus.wait_connected(timeout_s=LIMIT_S)
    other = await connect_nats_bus(nats_server.url, name="other")
    assert [data for _, _, data in await stored(await JetStreamRecordLog.open(other))] == wanted
    with pytest.raises(AmpdError) as caught:
        await log.append(A, b"stale", expected_sequence=last - 1)
    assert caught.value.code == ErrorCode.NOT_OWNER
    await other.close()


class LostAcks:
    """Makes the first append's acknowledgement of a bus get lost, after the record has been stored."""

    def __init__(self, bus: NatsBus, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_lost = 0
        self.num_sent = 0
        request = bus.request

        async def request_and_lose(subject: str, data: bytes, **options: Any) -> bytes:
            reply = await request(subject, data, **options)
            if subject.startswith("ampd.sys.v1.record."):
                self.num_sent += 1
                if self.num_lost == 0:
                    self.num_lost += 1
                    await self.before_retry()
                    raise RequestTimeout(subject, 0.0)
            return reply

        monkeypatch.setattr(bus, "request", request_and_lose)

    async def before_retry(self) -> None:
        """What else happens between the lost acknowledgement and the retry."""


@pytest.mark.parametrize("expect", [True, False])
async def test_an_append_whose_acknowledgement_was_lost_is_stored_once(
    nats_server: NatsServer, bus: NatsBus, monkeypatch: pytest.MonkeyPatch, expect: bool
) -> None:
    log = await JetStreamRecordLog.open(bus)
    first = await log.append(A, b"1", expected_sequence=0)
    lost = LostAcks(bus, monkeypatch)
    second = await log.append(A, b"2", expected_sequence=first if expect else None)
    assert (lost.num_lost, lost.num_sent) == (1, 2)
    assert await stored(log) == [(A, first, b"1"), (A, second, b"2")]
    await log.append(A, b"3", expected_sequence=second)


async def test_an_append_is_recognised_after_the_server_was_killed_and_another_has_gone_on(
    nats_server: NatsServer, bus: NatsBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await JetStreamRecordLog.open(bus)
    other_bus = await connect_nats_bus(nats_server.url, name="other")
    other = await JetStreamRecordLog.open(other_bus)
    lost = LostAcks(bus, monkeypatch)

    async def restart_and_go_on() -> None:
        nats_server.kill()
        nats_server.start()
        [(_, sequence, _)] = await stored(other)
        await other.append(A, b"theirs", expected_sequence=sequence)

    monkeypatch.setattr(lost, "before_retry", restart_and_go_on)
    sequence = await log.append(A, b"ours", expected_sequence=0)
    assert [(s, data) for _, s, data in await stored(log)] == [(sequence, b"ours"), (sequence + 1, b"theirs")]
    with pytest.raises(AmpdError) as caught:  # our own turn is over, though
        await log.append(A, b"stale", expected_sequence=sequence)
    assert caught.value.code == ErrorCode.NOT_OWNER
    await other_bus.close()


async def test_loading_goes_on_over_a_killed_server(nats_server: NatsServer, bus: NatsBus) -> None:
    log = await JetStreamRecordLog.open(bus)
    keys = [SessionKey("tenant", f"s{i}") for i in range(2000)]
    await asyncio.gather(*(log.append(key, key.session.encode() * 50, expected_sequence=0) for key in keys))
    loaded = []
    async for key, sequence, data in log.load():
        assert data == key.session.encode() * 50
        loaded.append(sequence)
        if len(loaded) == 700:
            nats_server.kill()
            nats_server.start()
    assert loaded == list(range(1, 2001))


async def test_loading_goes_on_when_the_server_has_forgotten_the_reader(nats_server: NatsServer, bus: NatsBus) -> None:
    log = await JetStreamRecordLog.open(bus)
    await asyncio.gather(*(log.append(SessionKey("t", f"s{i}"), b"x", expected_sequence=0) for i in range(1500)))
    consumers = f"$JS.API.CONSUMER.{{}}.{subjects.RECORD_STREAM}"
    loaded = []
    async for _, sequence, _ in log.load():
        loaded.append(sequence)
        if len(loaded) == 600:
            names = json.loads(await bus.request(consumers.format("NAMES"), b"{}", timeout_s=LIMIT_S))["consumers"]
            assert len(names) == 1
            await bus.request(f"{consumers.format('DELETE')}.{names[0]}", b"", timeout_s=LIMIT_S)
    assert loaded == list(range(1, 1501))


async def test_large_records_load_in_bounded_batches(nats_server: NatsServer, bus: NatsBus) -> None:
    log = await JetStreamRecordLog.open(bus)
    record = bytes(6 * 1024 * 1024)
    last = 0
    for _ in range(6):
        last = await log.append(A, record, expected_sequence=last)
    assert [(s, len(data)) for _, s, data in await stored(log)] == [(i, len(record)) for i in range(1, 7)]
    assert bus.counters["slow_consumers"] == 0
    with pytest.raises(AmpdError, match="a record of") as caught:
        await log.append(A, bytes(bus.max_payload), expected_sequence=last)
    assert caught.value.code == ErrorCode.INVALID_REQUEST


async def test_abandoned_loads_leave_no_consumer(nats_server: NatsServer, bus: NatsBus) -> None:
    log = await JetStreamRecordLog.open(bus)
    for i in range(5):
        await log.append(A, str(i).encode(), expected_sequence=None)
    records = log.load()
    assert await anext(records) == (A, 1, b"0")
    await records.aclose()  # type: ignore[attr-defined]
    consumers = await bus.request(f"$JS.API.CONSUMER.NAMES.{subjects.RECORD_STREAM}", b"{}", timeout_s=LIMIT_S)
    assert b'"total":0' in consumers


async def test_an_emptied_store(nats_server: NatsServer, bus: NatsBus, tmp_path: Path) -> None:
    """New sessions go on at once; an old one's owner learns that its records are not there."""
    log = await JetStreamRecordLog.open(bus)
    last = await log.append(A, b"lost", expected_sequence=0)
    nats_server.kill()
    shutil.rmtree(tmp_path / "nats" / "jetstream")
    nats_server.start()
    await log.append(B, b"new", expected_sequence=0)
    with pytest.raises(AmpdError, match="has lost records") as caught:
        await log.append(A, b"more", expected_sequence=last)
    assert caught.value.code == ErrorCode.NOT_OWNER
    assert [data for _, _, data in await stored(log)] == [b"new"]


async def test_a_server_that_stays_away_gives_a_bus_error(nats_server: NatsServer, bus: NatsBus) -> None:
    log = await JetStreamRecordLog.open(bus, append_timeout_s=0.05, append_attempts=2)
    nats_server.kill()
    with pytest.raises(BusError, match="may or may not"):
        await log.append(A, b"1", expected_sequence=0)
    with pytest.raises(BusError):
        await log.purge(A)
    nats_server.start()


async def test_limits_of_an_existing_stream_follow_the_arguments(nats_server: NatsServer, bus: NatsBus) -> None:
    await (await JetStreamRecordLog.open(bus)).append(A, b"kept", expected_sequence=0)
    log = await JetStreamRecordLog.open(bus, max_bytes=5_000)
    assert [data for _, _, data in await stored(log)] == [b"kept"]
    with pytest.raises(AmpdError, match="full"):
        await log.append(B, bytes(10_000), expected_sequence=0)
    with pytest.raises(ValueError, match="tried for more than"):
        await JetStreamRecordLog.open(bus, append_timeout_s=60.0)
