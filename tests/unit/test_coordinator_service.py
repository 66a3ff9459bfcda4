"""The coordinator service on a MemoryBus, with a scripted worker: messages in, messages out."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from heartbeats import make_heartbeat

from services.coordinator.app import build_parser
from services.coordinator.config_flags import read_config
from services.coordinator.event_log import EventLog, read_event_log
from services.coordinator.input_text import InputText
from services.coordinator.replay import main as replay_main
from services.coordinator.replay import replay
from services.coordinator.service import CoordinatorService
from shared import subjects
from shared.bus import BusMessage
from shared.client import AmpdClient
from shared.core.commands import Command
from shared.core.coordinator import Coordinator
from shared.core.coordinator_config import CoordinatorConfig
from shared.core.events import RecordsLoaded, Ticked
from shared.core.resident_key import resident_key
from shared.core.types import RoundKey, SessionKey
from shared.errors import AmpdError, BusError, ErrorCode
from shared.memory_bus import MemoryBus, MemoryHub
from shared.messages import (
    Ack,
    CancelRun,
    DropSession,
    ErrorReply,
    ExplainSession,
    GetStatus,
    GrantHistory,
    HistoryGranted,
    KvSource,
    KvStaged,
    Message,
    OpenSession,
    PrefillEnded,
    PrefillTask,
    ReadRound,
    RoleChanged,
    RoundEnded,
    RoundFinished,
    RoundObserved,
    RoundTokens,
    RunRound,
    RunRoundAck,
    SetRole,
    Slo,
    StageKv,
    StopConditions,
    SubmitRound,
    TextInput,
    TokensInput,
    Usage,
    decode,
    encode,
    pack_token_ids,
    unpack_token_ids,
)
from shared.record_log import MemoryRecordLog
from shared.transport.tickets import verify

SECRET = bytes(range(32))


class ScriptedWorker:
    """Answers every round at once: output token i is 10 + i. `holds` keeps rounds open until `finish`."""

    def __init__(self, bus: MemoryBus, worker_id: str, role: str) -> None:
        self.bus = bus
        self.worker_id = worker_id
        self.role = role
        self.commands: list[Message] = []
        self.holds = False
        self.num_cached = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.acknowledged = asyncio.Event()

    async def start(self) -> None:
        await self.bus.subscribe(subjects.worker_command(self.worker_id), self.on_command)
        await self.beat()

    async def beat(self) -> None:
        heartbeat = make_heartbeat(
            self.worker_id,
            incarnation=7,
            role=self.role,
            model="scripted",
            max_context_tokens=100_000,
            vocab_size=1000,
            num_blocks=10_000,
            num_free_blocks=10_000,
        )
        await self.bus.publish(subjects.heartbeat(self.worker_id), encode(heartbeat))

    async def on_command(self, message: BusMessage) -> None:
        command = decode(message.data)
        self.commands.append(command)
        if isinstance(command, GrantHistory):
            granted = HistoryGranted(num_tokens=command.num_tokens - 1, history=self.source())
            await message.respond(encode(granted))
            return
        if isinstance(command, SetRole):
            self.role = command.role
            await self.beat()
        if not isinstance(command, RunRound):
            await message.respond(encode(Ack()))
            if isinstance(command, PrefillTask | StageKv):
                await self.report_kept(command)
            return
        history = None
        if command.remote is not None and self.num_cached:
            history = self.source()
        await message.respond(encode(RunRoundAck(state="started", num_cached_tokens=self.num_cached, history=history)))
        if not self.holds:
            task = asyncio.create_task(self.finish(command))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def source(self) -> KvSource:
        return KvSource(worker_id=self.worker_id, incarnation=7, endpoints=(), lease_id=1, generation=1, ttl_s=9.0)

    async def report_kept(self, command: PrefillTask | StageKv) -> None:
        """As a prefill worker that keeps what it has prefilled or pulled."""
        named = {"tenant": command.tenant, "session": command.session, "worker_id": self.worker_id, "incarnation": 7}
        report: Message
        if isinstance(command, StageKv):
            report = KvStaged(num_resident_tokens=command.num_tokens, kv_bytes_read=0, **named)
        else:
            report = PrefillEnded(
                round=command.round,
                attempt=command.attempt,
                error=None,
                num_new_tokens=len(command.token_ids) // 4,
                queued_s=0.0,
                transfer_s=0.0,
                prefill_s=0.001,
                kv_bytes_read=0,
                num_resident_tokens=command.num_cached_tokens + len(command.token_ids) // 4,
                **named,
            )
        assert decode(await self.bus.request(subjects.COORDINATOR_EVENT, encode(report), timeout_s=5.0)) == Ack()

    async def finish(self, run: RunRound) -> None:
        output = [10 + i for i in range(run.stop.max_output_tokens)]
        subject = subjects.round_stream(run.tenant, run.session, run.round)
        usage = Usage(
            num_history_tokens=run.num_history_tokens,
            num_input_tokens=run.num_input_tokens,
            num_cached_tokens=0,
            num_output_tokens=len(output),
            prefill="local",
            prefill_worker=self.worker_id,
            decode_worker=self.worker_id,
        )
        for index, token in enumerate(output):
            tokens = RoundTokens(
                session=run.session,
                round=run.round,
                attempt=run.attempt,
                seq=index,
                start_index=index,
                token_ids=pack_token_ids([token]) if run.stream_encoding == "msgpack" else [token],
                text=f"<{token}>",
            )
            await self.bus.publish(subject, encode(tokens, run.stream_encoding))
        finished = RoundFinished(
            session=run.session,
            round=run.round,
            attempt=run.attempt,
            seq=len(output),
            num_output_tokens=len(output),
            finish_reason="length",
            usage=usage,
        )
        await self.bus.publish(subject, encode(finished, run.stream_encoding))
        report = RoundEnded(
            tenant=run.tenant,
            session=run.session,
            round=run.round,
            attempt=run.attempt,
            worker_id=self.worker_id,
            incarnation=7,
            output_token_ids=pack_token_ids(output),
            finish_reason="length",
            usage=usage,
            error=None,
        )
        reply = await self.bus.request(subjects.COORDINATOR_EVENT, encode(report), timeout_s=5.0)
        assert decode(reply) == Ack()
        self.acknowledged.set()

    async def received(self, kind: type[Any], count: int = 1) -> list[Any]:
        """Commands of a kind, once there are `count`."""
        async with asyncio.timeout(10.0):
            while len(self.of_kind(kind)) < count:
                await self.bus.flush()  # a round trip
        return self.of_kind(kind)

    def of_kind(self, kind: type[Any]) -> list[Any]:
        return [command for command in self.commands if isinstance(command, kind)]


class FakeDecoder:
    stopped = False

    def push(self, token_id: int) -> str:
        return f"<{token_id}>"

    def finish(self) -> str:
        return ""


class FakeCodec:
    """Words are numbers."""

    eos_token_ids = frozenset({2})

    def stream_decoder(self, stop: tuple[str, ...]) -> FakeDecoder:
        return FakeDecoder()

    def encode_text(self, text: str) -> list[int]:
        if text == "refuse":
            raise AmpdError(ErrorCode.TEXT_UNAVAILABLE, "no")
        if text == "break":
            raise RuntimeError("a tokeniser's own failure")
        return [int(word) for word in text.split()]


class Cluster:
    def __init__(self) -> None:
        self.hub = MemoryHub()
        self.records = MemoryRecordLog()
        self.crashes: list[str] = []
        self.service: CoordinatorService | None = None

    async def start(self, *, event_log: EventLog | None = None, records: Any = None, **config: Any) -> None:
        self.coordinator_bus = await self.hub.connect("coordinator")
        self.service = CoordinatorService(
            self.coordinator_bus,
            records or self.records,
            config=CoordinatorConfig(**{"policy": "remote", **config}),
            secret=SECRET,
            text=InputText(FakeCodec()),  # type: ignore[arg-type]
            on_crash=self.crashes.append,
            event_log=event_log,
        )
        await self.service.start()

    async def stop(self) -> None:
        assert self.service is not None
        await self.service.stop()
        await self.coordinator_bus.close()
        self.service.core.check_integrity()
        assert not self.crashes

    async def add_worker(self, worker_id: str, role: str) -> ScriptedWorker:
        worker = ScriptedWorker(await self.hub.connect(worker_id), worker_id, role)
        await worker.start()
        await self.coordinator_bus.flush()
        return worker

    async def client(self) -> AmpdClient:
        return AmpdClient(await self.hub.connect("client"), tenant="t", owns_bus=True)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    started = Cluster()
    await started.start()
    yield started
    await started.stop()


async def ask(bus: MemoryBus, request: Message | bytes, session: str = "s") -> Any:
    data = request if isinstance(request, bytes) else encode(request)
    return decode(await bus.request(subjects.session_request("t", session), data, timeout_s=10.0))


async def test_rounds_through_the_client_library(cluster: Cluster) -> None:
    worker = await cluster.add_worker("d", "decode")
    observer = await cluster.hub.connect("observer")
    observed: list[Message] = []
    await observer.subscribe_ordered(subjects.OBSERVED_ROUND, lambda message: observed.append(decode(message.data)))
    async with await cluster.client() as client:
        session = await client.open_session()
        for number in range(3):
            stream = await session.submit([1, 2, 3], max_output_tokens=4)
            result = await stream.result()
            assert result.token_ids == (10, 11, 12, 13)
            assert result.usage.num_history_tokens == 7 * number
        await session.close()
    runs = worker.of_kind(RunRound)
    assert [run.tokens_start for run in runs] == [0, 7, 14], "only new tokens travel"
    history = [1, 2, 3, 10, 11, 12, 13]
    assert runs[1].prefix_checksum == zlib.crc32(pack_token_ids(history))
    await observer.flush()
    assert all(isinstance(message, RoundObserved) and message.error is None for message in observed)
    assert len(observed) == 3
    assert len(await worker.received(DropSession)) == 1
    async with asyncio.timeout(10.0):
        while [record async for record in cluster.records.load()]:
            await observer.flush()


async def test_a_worker_takes_another_role(cluster: Cluster) -> None:
    worker = await cluster.add_worker("d1", "decode")
    async with await cluster.client() as client:
        with pytest.raises(AmpdError) as refused:
            await client.change_role("d1", "prefill")
        assert refused.value.code == ErrorCode.NO_DECODE_WORKER
        await cluster.add_worker("d2", "decode")
        changed = await client.change_role("d1", "prefill")
        assert changed == RoleChanged(worker_id="d1", role="prefill", previous="decode")
        assert worker.role == "prefill"
        status = {w.heartbeat.worker_id: (w.heartbeat.role, w.wanted_role) for w in (await client.status()).workers}
        assert status == {"d1": ("prefill", None), "d2": ("decode", None)}
    bus = await cluster.hub.connect("by hand")
    by_hand = b'{"type":"change_role","worker_id":"d1","role":"both"}'
    answer = json.loads(await bus.request(subjects.ROLE, by_hand, timeout_s=10.0))
    assert answer == {"type": "role_changed", "worker_id": "d1", "role": "both", "previous": "prefill"}
    other = decode(await bus.request(subjects.ROLE, b'{"type":"get_status"}', timeout_s=10.0))
    assert isinstance(other, ErrorReply)
    assert other.code == ErrorCode.INVALID_REQUEST


async def test_a_json_client_gets_json_with_lists(cluster: Cluster) -> None:
    await cluster.add_worker("d", "decode")
    bus = await cluster.hub.connect("json")

    async def ask_json(request: dict[str, Any]) -> Any:
        subject = subjects.session_request("t", "s")
        return json.loads(await bus.request(subject, json.dumps(request).encode(), timeout_s=10.0))

    finished = asyncio.Event()
    tokens: list[int] = []

    def on_stream(message: BusMessage) -> None:
        document = json.loads(message.data)
        tokens.extend(document.get("token_ids", []))
        if document["type"] == "finished":
            finished.set()

    await bus.subscribe_ordered(subjects.session_streams("t", "s"), on_stream)
    assert (await ask_json({"type": "open"}))["type"] == "opened"
    submit = {"type": "round", "input": {"type": "tokens", "token_ids": [5]}, "stop": {"max_output_tokens": 2}}
    assert (await ask_json(submit))["stream"] == "ampd.v1.t.stream.s.0"
    await finished.wait()
    assert tokens == [10, 11]
    while (snapshot := await ask_json({"type": "read_round", "round": 0}))["finished"] is None:
        continue  # each answer is a round trip: the record has the end soon
    assert (snapshot["token_ids"], snapshot["text"]) == ([10, 11], "<10><11>")
    info = await ask_json({"type": "inspect", "include_tokens": True})
    assert info["token_ids"] == [5, 10, 11]
    assert (await ask_json({"type": "nonsense"}))["code"] == "malformed_message"


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"\xc1\x00", "malformed_message"),
        (b"", "malformed_message"),
        (b"[" * 10_000, "malformed_message"),
        (encode(GetStatus()), "invalid_request"),
        (encode(SubmitRound(input=TokensInput(token_ids=b"123"))), "malformed_message"),
        (encode(SubmitRound(input=TokensInput(token_ids=[2**40]))), "invalid_request"),
        (encode(SubmitRound(input=TokensInput(token_ids=[1]), deadline_s=float("nan"))), "invalid_request"),
        (encode(SubmitRound(input=TextInput(text="refuse"))), "text_unavailable"),
        (encode(SubmitRound(input=TextInput(text="break"))), "internal"),
        (encode(SubmitRound(input=TextInput(text=""))), "empty_input"),
        (encode(SubmitRound(input=TextInput(text="99999"))), "invalid_request"),
    ],
)
async def test_bad_requests_are_refused_and_the_next_round_works(cluster: Cluster, request_: bytes, code: str) -> None:
    await cluster.add_worker("d", "decode")
    bus = await cluster.hub.connect("bad")
    await ask(bus, OpenSession())
    assert (await ask(bus, request_)).code == code
    accepted = await ask(bus, SubmitRound(input=TextInput(text="1 2 " * 3000)))  # long: tokenised in a thread
    assert accepted.num_input_tokens == 6000


@pytest.fixture
async def reading() -> AsyncIterator[Cluster]:
    """Prefill workers read the history, keep what they have, and get the rest ahead of the next round."""
    started = Cluster()
    await started.start(policy_options={"routing.reads_history": True, "stages": True}, min_staged_tokens=1)
    yield started
    await started.stop()


async def test_tickets_are_signed_for_the_pulls_that_are_commanded(reading: Cluster) -> None:
    cluster = reading
    decode_worker = await cluster.add_worker("d", "decode")
    prefill_worker = await cluster.add_worker("p", "prefill")
    decode_worker.num_cached = 2
    decode_worker.holds = True
    bus = await cluster.hub.connect("client")
    await ask(bus, OpenSession())
    await ask(bus, SubmitRound(input=TokensInput(token_ids=pack_token_ids([1, 2, 3]))))
    while not prefill_worker.of_kind(PrefillTask):
        await bus.flush()
    (run,) = decode_worker.of_kind(RunRound)
    (task,) = prefill_worker.of_kind(PrefillTask)
    key = RoundKey("t", "s", 0, 1)
    increment, history = verify(SECRET, run.remote.ticket), verify(SECRET, task.history.ticket)
    assert (increment.key, increment.source, increment.destination) == (key, "p", "d")
    assert (history.key, history.source, history.destination) == (key, "d", "p")
    assert (increment.max_bytes, history.max_bytes) == (3 * 64, 2 * 64)
    assert unpack_token_ids(task.token_ids) == [3]
    assert increment.nonce != history.nonce


async def test_a_ticket_is_signed_for_kv_that_moves_ahead(reading: Cluster) -> None:
    await reading.add_worker("d", "decode")
    prefill_worker = await reading.add_worker("p", "prefill")
    async with await reading.client() as client:
        session = await client.open_session("s")
        stream = await session.submit([1, 2, 3], max_output_tokens=4)
        await stream.result()
        (stage,) = await prefill_worker.received(StageKv)
        ticket = verify(SECRET, stage.history.ticket)
        assert (ticket.key, ticket.source, ticket.destination) == (resident_key(SessionKey("t", "s")), "d", "p")
        assert (stage.num_tokens, ticket.max_bytes) == (6, 6 * 64)
        await session.close()
    assert len(await prefill_worker.received(DropSession)) == 1, "the prefill worker gives back what it keeps"


async def test_a_session_is_explained_over_the_bus(cluster: Cluster) -> None:
    await cluster.add_worker("d", "decode")
    async with await cluster.client() as client:
        session = await client.open_session("s")
        stream = await session.submit([1, 2, 3], max_output_tokens=4)
        await stream.result()
        explained = await client.explain("s")
        (one,) = explained.rounds
        assert (explained.policy, one.reason, one.worker_id) == ("remote", "no prefill worker", "d")
        assert one.options[one.chosen_index].num_new_tokens == 3
        with pytest.raises(AmpdError, match="other") as refused:
            await client.explain("other")
        assert refused.value.code == ErrorCode.UNKNOWN_SESSION
        await session.close()
        assert (await client.explain("s")).rounds[0].ttft_s is not None
    bus = await cluster.hub.connect("operator")
    as_json = json.dumps({"type": "explain_session", "tenant": "t", "session": "s"}).encode()
    assert json.loads(await bus.request(subjects.EXPLAIN, as_json, timeout_s=5.0))["type"] == "session_explained"
    wrong: Any = decode(await bus.request(subjects.EXPLAIN, encode(GetStatus()), timeout_s=5.0))
    assert wrong.code == ErrorCode.INVALID_REQUEST
    missing = encode(ExplainSession(tenant="other", session="s"))
    unknown: Any = decode(await bus.request(subjects.EXPLAIN, missing, timeout_s=5.0))
    assert unknown.code == ErrorCode.UNKNOWN_SESSION


async def test_a_report_is_acknowledged_only_once_the_record_has_it(cluster: Cluster) -> None:
    worker = await cluster.add_worker("d", "decode")
    worker.holds = True
    bus = await cluster.hub.connect("client")
    await ask(bus, OpenSession())
    await ask(bus, SubmitRound(input=TokensInput(token_ids=[1]), stop=StopConditions(max_output_tokens=1)))
    (run,) = await worker.received(RunRound)
    await worker.finish(run)
    records = [record async for record in cluster.records.load()]
    assert len(records) == 3
    assert b"round_ended" in records[-1][2]


async def test_broken_reports_are_refused(cluster: Cluster) -> None:
    bus = await cluster.hub.connect("broken")
    report = RoundEnded(
        tenant="t",
        session="s",
        round=0,
        attempt=1,
        worker_id="d",
        incarnation=1,
        output_token_ids=b"123",
        finish_reason=None,
        usage=None,
        error=None,
    )
    for data in (encode(report), encode(Ack()), b"\xc1"):
        reply = decode(await bus.request(subjects.COORDINATOR_EVENT, data, timeout_s=5.0))
        assert isinstance(reply, ErrorReply)
        assert reply.code == ErrorCode.MALFORMED_MESSAGE


async def test_a_restarted_coordinator_serves_the_same_sessions(cluster: Cluster) -> None:
    worker = await cluster.add_worker("d", "decode")
    bus = await cluster.hub.connect("client")
    await ask(bus, OpenSession())
    await ask(bus, SubmitRound(input=TokensInput(token_ids=[1]), stop=StopConditions(max_output_tokens=1)))
    await worker.acknowledged.wait()
    worker.holds = True
    await ask(bus, SubmitRound(input=TokensInput(token_ids=[2]), stop=StopConditions(max_output_tokens=1)))
    await cluster.stop()
    await cluster.start()
    await worker.beat()
    worker.acknowledged.clear()
    await worker.finish((await worker.received(RunRound, 2))[-1])
    snapshot = await ask(bus, ReadRound(round=1))
    assert snapshot.finished is not None
    accepted = await ask(bus, SubmitRound(input=TokensInput(token_ids=[3])))
    assert (accepted.round, accepted.num_history_tokens) == (2, 4)


async def test_a_second_writer_fences_the_first(cluster: Cluster) -> None:
    await cluster.add_worker("d", "decode")
    bus = await cluster.hub.connect("client")
    await ask(bus, OpenSession())
    await cluster.records.append(SessionKey("t", "s"), b"another coordinator's", expected_sequence=1)
    refused = await ask(bus, SubmitRound(input=TokensInput(token_ids=[1])))
    assert refused.code == ErrorCode.NOT_OWNER
    assert (await ask(bus, SubmitRound(input=TokensInput(token_ids=[1])))).code == ErrorCode.UNKNOWN_SESSION


class UncertainLog(MemoryRecordLog):
    """Stores or loses an append, and cannot say which."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: list[bool] = []

    async def append(self, key: SessionKey, data: bytes, *, expected_sequence: int | None) -> int:
        if not self.outcomes:
            return await super().append(key, data, expected_sequence=expected_sequence)
        if self.outcomes.pop(0):
            await super().append(key, data, expected_sequence=expected_sequence)
        raise BusError(ErrorCode.BUS_UNAVAILABLE, "no acknowledgement")


@pytest.mark.parametrize("stored", [True, False])
async def test_an_append_of_unknown_outcome_is_settled_from_the_log(stored: bool) -> None:
    cluster = Cluster()
    log = UncertainLog()
    await cluster.start(records=log)
    await cluster.add_worker("d", "decode")
    bus = await cluster.hub.connect("client")
    await ask(bus, OpenSession())
    log.outcomes = [stored]
    assert (await ask(bus, SubmitRound(input=TokensInput(token_ids=[1])))).code == ErrorCode.BUS_UNAVAILABLE
    accepted = await ask(bus, SubmitRound(input=TokensInput(token_ids=[2])))
    assert accepted.round == 1
    kinds = [msgspec.msgpack.decode(data)["type"] for _, _, data in [record async for record in log.load()]]
    assert kinds[:4] == ["opened", "round_started", "round_ended", "round_started"], "each entry once"
    await cluster.stop()


async def test_status_shows_workers_and_sessions(cluster: Cluster) -> None:
    await cluster.add_worker("d", "decode")
    bus = await cluster.hub.connect("client")
    await ask(bus, OpenSession())
    status: Any = decode(await bus.request(subjects.STATUS, encode(GetStatus()), timeout_s=5.0))
    assert (status.policy, status.model, status.num_sessions) == ("remote", "scripted", 1)
    assert [worker.heartbeat.worker_id for worker in status.workers] == ["d"]
    assert [(session.tenant, session.session) for session in status.sessions] == [("t", "s")]
    refused: Any = decode(await bus.request(subjects.STATUS, encode(Ack()), timeout_s=5.0))
    assert refused.code == ErrorCode.INVALID_REQUEST


async def test_a_cancelled_round_ends_on_its_stream(cluster: Cluster) -> None:
    worker = await cluster.add_worker("d", "decode")
    worker.holds = True
    async with await cluster.client() as client:
        session = await client.open_session()
        stream = await session.submit([1, 2, 3])
        await worker.received(RunRound)
        await session.cancel()
        with pytest.raises(AmpdError) as failed:
            await stream.result()
        assert failed.value.code == ErrorCode.CANCELLED
        await session.close()
    assert len(worker.of_kind(CancelRun)) == 1


@pytest.mark.parametrize("policy", ["adaptive", "ampd", "remote"])
async def test_an_event_log_replays_to_the_same_commands(policy: str, tmp_path: Path) -> None:
    """All that this policy may do: prefills elsewhere, KV that is kept and moves ahead, corrected predictions."""
    config = CoordinatorConfig(policy=policy, policy_options={"stages": True}, min_staged_tokens=1)
    cluster = Cluster()
    path = tmp_path / "logs" / "events.jsonl"
    log = EventLog(path)
    await cluster.start(
        event_log=log, policy=policy, policy_options=config.policy_options, min_staged_tokens=config.min_staged_tokens
    )
    assert cluster.service is not None
    live: list[Command] = []
    execute = cluster.service._execute

    def record_and_execute(command: Command) -> None:
        live.append(command)
        execute(command)

    cluster.service._execute = record_and_execute  # type: ignore[method-assign]
    await cluster.add_worker("d", "decode")
    prefill_worker = await cluster.add_worker("p", "prefill")
    async with await cluster.client() as client:
        for _ in range(2):
            session = await client.open_session(slo=Slo(ttft_s=0.5))
            for length in (3, 2000, 40):
                stream = await session.submit([1] * length, max_output_tokens=3)
                await stream.result()
            await session.close()
    await cluster.stop()
    log.close()
    fresh = Coordinator(config)
    replayed = [command for now, event in read_event_log(path) for command in fresh.on_event(event, now)]
    assert replayed == live
    assert len(live) > 20
    assert fresh.state.counters == cluster.service.core.state.counters
    if policy != "adaptive":
        assert prefill_worker.of_kind(PrefillTask), "the log has remote prefills"
    summary = replay(config, read_event_log(path))
    assert summary.commands.total() == len(live)
    assert summary.digest == replay(config, read_event_log(path)).digest
    assert summary.events["RecordsLoaded"] == 1


def test_a_log_is_replayed_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for life in range(2):
        log.write(10.0 + life, RecordsLoaded(records=()))
        log.write(12.5 + life, Ticked())
    log.close()
    monkeypatch.setattr("sys.argv", ["replay", str(path), "--policy", "adaptive", "--disable", "staging"])
    assert replay_main() == 0
    shown = capsys.readouterr().out
    assert "4 events over 5.0 s, 0 sessions open" in shown
    assert "RecordsLoaded 2, Ticked 2" in shown
    path.write_text("{}\n")
    assert replay_main() == 1
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--policy-option", "routing.alpha"], "PATH=VALUE"),
        (["--policy-option", "routing.nothing=1"], "routing.nothing"),
        (["--cost-scale", "0"], "--cost-scale"),
        (["--max-attempts", "0"], "--max-attempts"),
        (["--profile", "no-such-gpu"], "no-such-gpu"),
    ],
)
def test_a_flag_at_fault_is_named(flags: list[str], named: str) -> None:
    with pytest.raises(AmpdError, match=named) as refused:
        read_config(build_parser().parse_args(flags))
    assert refused.value.code == ErrorCode.INVALID_REQUEST


def test_flags_make_the_policy() -> None:
    flags = ["--policy=adaptive", "--disable=staging", "--disable=admission", "--policy-option=routing.uncertainty=0.5"]
    config = read_config(build_parser().parse_args(flags))
    scheduling = config.scheduling
    assert (scheduling.name, scheduling.stages, scheduling.admission) == ("adaptive", False, False)
    assert (scheduling.keeps_resident, scheduling.routing.uncertainty) == (True, 0.5)


async def test_a_failing_core_ends_the_process() -> None:
    cluster = Cluster()
    await cluster.start()
    assert cluster.service is not None
    cluster.service.core.on_event = None  # type: ignore[assignment, method-assign]
    bus = await cluster.hub.connect("client")
    assert (await ask(bus, OpenSession())).code == ErrorCode.INTERNAL
    assert "TypeError" in cluster.crashes[0]
    await cluster.service.stop()
    await cluster.coordinator_bus.close()
