"""AmpdClient over a MemoryBus, against a coordinator that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

import shared.client as client_module
from shared import client_stream, subjects
from shared.bus import BusMessage, Subscription
from shared.client import AmpdClient, ClientSession
from shared.errors import AmpdError, ErrorCode
from shared.memory_bus import MemoryBus, MemoryHub, MessageRule
from shared.messages import (
    CancelRound,
    ChatInput,
    ChatMessage,
    CloseSession,
    ClusterStatus,
    ErrorReply,
    GetStatus,
    InspectSession,
    Message,
    OpenSession,
    ReadRound,
    RoundAccepted,
    RoundCancelled,
    RoundFailed,
    RoundFinished,
    RoundSnapshot,
    RoundTokens,
    SessionClosed,
    SessionInfo,
    SessionOpened,
    Slo,
    StreamMessage,
    SubmitRound,
    TextInput,
    TokensInput,
    Usage,
    decode,
    encode,
    pack_token_ids,
    unpack_token_ids,
)

OUTPUT = [11, 12, 13, 14, 15]
TEXT = "eleven twelve thirteen fourteen fifteen"
WORDS = ["eleven", " twelve", " thirteen", " fourteen", " fifteen"]

Script = Callable[["ScriptedCoordinator", str], Awaitable[None]]


class ScriptedCoordinator:
    """Answers every request; what it streams for a round, and whether the record knows it, is the test's."""

    def __init__(self, bus: MemoryBus) -> None:
        self.bus = bus
        self.script: Script = play_all
        self.requests: list[Message] = []
        self.answers: dict[str, RoundAccepted] = {}  # by idempotency key
        self.num_recorded = len(OUTPUT)  # tokens that ReadRound knows
        self.recorded_end = True
        self.read_error: ErrorReply | None = None
        self.scripts: set[asyncio.Task[None]] = set()
        self.subscriptions: list[Subscription] = []

    async def start(self) -> None:
        self.subscriptions = [
            await self.bus.subscribe(subjects.ALL_SESSION_REQUESTS, self.on_request),
            await self.bus.subscribe(subjects.STATUS, self.on_request),
        ]

    async def stop(self) -> None:
        for subscription in self.subscriptions:
            await subscription.unsubscribe()

    async def on_request(self, message: BusMessage) -> None:
        request = decode(message.data)
        self.requests.append(request)
        session = "" if message.subject == subjects.STATUS else subjects.parse_session_request(message.subject)[1]
        reply = self.answer(session, request)
        await message.respond(encode(reply))

    def answer(self, session: str, request: Message) -> Message:
        match request:
            case OpenSession():
                return SessionOpened(session=session, model="fake", max_context_tokens=4096, vocab_size=1000)
            case SubmitRound():
                return self.accept(session, request)
            case ReadRound():
                return self.read_error or self.snapshot(session, request)
            case CancelRound():
                return RoundCancelled(session=session, round=0, cancelled=True)
            case CloseSession():
                return SessionClosed(session=session, num_rounds=len(self.answers))
            case InspectSession():
                return SessionInfo(session=session, state="idle", decode_worker="d0", num_tokens=0, rounds=())
            case GetStatus():
                return ClusterStatus(
                    policy="ampd",
                    model="fake",
                    workers=(),
                    sessions=(),
                    num_sessions=0,
                    num_rounds_in_flight=0,
                    counters={},
                )
        raise AssertionError(request)

    def accept(self, session: str, request: SubmitRound) -> RoundAccepted:
        if request.idempotency_key not in self.answers:
            index = len(self.answers)
            self.answers[request.idempotency_key] = RoundAccepted(
                session=session,
                round=index,
                stream=subjects.round_stream("default", session, index),
                num_history_tokens=0,
                num_input_tokens=3,
            )
            task = asyncio.create_task(self.script(self, session))  # type: ignore[arg-type]
            self.scripts.add(task)
            task.add_done_callback(self.scripts.discard)
        return self.answers[request.idempotency_key]

    def snapshot(self, session: str, request: ReadRound) -> RoundSnapshot:
        ids = OUTPUT[request.start_index : self.num_recorded]
        return RoundSnapshot(
            session=session,
            round=request.round,
            start_index=request.start_index,
            token_ids=pack_token_ids(ids),
            text="".join(WORDS[request.start_index : self.num_recorded]),
            finished=finished(session) if self.recorded_end else None,
        )

    async def publish(self, message: StreamMessage, round_index: int = 0) -> None:
        subject = subjects.round_stream("default", message.session, round_index)
        await self.bus.publish(subject, encode(message))


def piece(session: str, start: int, stop: int, *, attempt: int = 1, seq: int | None = None) -> RoundTokens:
    return RoundTokens(
        session=session,
        round=0,
        attempt=attempt,
        seq=start if seq is None else seq,
        start_index=start,
        token_ids=pack_token_ids(OUTPUT[start:stop]),
        text="".join(WORDS[start:stop]),
    )


def finished(session: str, *, attempt: int = 1, seq: int = len(OUTPUT)) -> RoundFinished:
    usage = Usage(
        num_history_tokens=0,
        num_input_tokens=3,
        num_cached_tokens=0,
        num_output_tokens=len(OUTPUT),
        prefill="remote",
        prefill_worker="p0",
        decode_worker="d0",
        kv_bytes_written=96,
    )
    return RoundFinished(
        session=session,
        round=0,
        attempt=attempt,
        seq=seq,
        num_output_tokens=len(OUTPUT),
        finish_reason="stop",
        usage=usage,
    )


async def play_all(coordinator: ScriptedCoordinator, session: str) -> None:
    for start in range(len(OUTPUT)):
        await coordinator.publish(piece(session, start, start + 1))
    await coordinator.publish(finished(session))


async def play_nothing(coordinator: ScriptedCoordinator, session: str) -> None:
    """The round is accepted, and then nothing is heard of it."""


@pytest.fixture
def hub() -> MemoryHub:
    return MemoryHub()


@pytest.fixture
async def coordinator(hub: MemoryHub) -> AsyncIterator[ScriptedCoordinator]:
    coordinator = ScriptedCoordinator(await hub.connect("coordinator"))
    await coordinator.start()
    yield coordinator
    await coordinator.bus.close()


@pytest.fixture
async def client(hub: MemoryHub, coordinator: ScriptedCoordinator) -> AsyncIterator[AmpdClient]:
    bus = await hub.connect("client")
    async with AmpdClient(bus, retry_s=5.0) as client:
        yield client
    await bus.close()


@pytest.fixture
async def session(client: AmpdClient) -> ClientSession:
    return await client.open_session("agent")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are noticed quickly, so that the tests that lose something end quickly."""
    monkeypatch.setattr(client_stream, "SILENCE_S", 0.02)
    monkeypatch.setattr(client_stream, "GAP_PATIENCE_S", 0.005)
    monkeypatch.setattr(client_stream, "MAX_PATIENCE_S", 0.05)
    monkeypatch.setattr(client_stream, "READ_TIMEOUT_S", 0.2)
    monkeypatch.setattr(client_module, "ATTEMPT_TIMEOUT_S", 0.1)


async def test_a_round_from_text_to_result(session: ClientSession) -> None:
    stream = await session.submit("hello", max_output_tokens=8)
    chunks = [chunk async for chunk in stream]
    result = await stream.result()
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == OUTPUT
    assert "".join(chunk.text for chunk in chunks) == TEXT
    assert result.token_ids == tuple(OUTPUT)
    assert result.text == TEXT
    assert result.finish_reason == "stop"
    assert result.usage.kv_bytes_moved == 96
    assert result.num_recoveries == 0
    assert len(result.token_times) == len(OUTPUT)
    assert result.first_token_s == result.token_times[0]
    assert result.sent_s <= result.token_times[0] <= result.token_times[-1] <= result.finished_s
    again = [chunk async for chunk in stream]  # a second reader, after the end
    assert again[0].token_ids == tuple(OUTPUT)


async def test_input_kinds_reach_the_wire(session: ClientSession, coordinator: ScriptedCoordinator) -> None:
    message = ChatMessage(role="user", content="hi")
    for new_input in ("text", [1, 2, 3], [message]):
        await session.submit(new_input, max_output_tokens=8)
    sent = [request.input for request in coordinator.requests if isinstance(request, SubmitRound)]
    assert isinstance(sent[0], TextInput)
    assert isinstance(sent[1], TokensInput)
    assert unpack_token_ids(sent[1].token_ids) == [1, 2, 3]
    assert sent[2] == ChatInput(messages=(message,))
    for wrong in ([1, message], [2**40], ["a", "b"]):
        with pytest.raises(AmpdError) as caught:
            await session.submit(wrong)  # type: ignore[arg-type]
        assert caught.value.code is ErrorCode.INVALID_REQUEST


async def test_messages_before_the_answer_are_kept(
    session: ClientSession, coordinator: ScriptedCoordinator, hub: MemoryHub
) -> None:
    hub.add_rule(MessageRule("_INBOX.>", sender="coordinator", delay_s=(0.05, 0.05)))
    result = await (await session.submit("hello", max_output_tokens=8)).result()
    assert result.token_ids == tuple(OUTPUT)
    assert result.num_recoveries == 0
    assert result.first_token_s is not None
    assert result.first_token_s < result.accepted_s  # the time of arrival, not of the answer


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("lost", range(len(OUTPUT) + 1))
async def test_one_lost_message(session: ClientSession, coordinator: ScriptedCoordinator, lost: int) -> None:
    async def play_with_loss(coordinator: ScriptedCoordinator, session: str) -> None:
        messages = [*(piece(session, start, start + 1) for start in range(len(OUTPUT))), finished(session)]
        for index, message in enumerate(messages):
            if index != lost:
                await coordinator.publish(message)

    coordinator.script = play_with_loss
    stream = await session.submit("hello", max_output_tokens=8)
    chunks = [chunk async for chunk in stream]
    result = await stream.result()
    assert result.token_ids == tuple(OUTPUT)
    assert result.text == TEXT
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == OUTPUT
    assert "".join(chunk.text for chunk in chunks) == TEXT
    assert result.num_recoveries >= 1


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("seed", range(6))
async def test_drops_duplicates_and_reordering(hub: MemoryHub, coordinator: ScriptedCoordinator, seed: int) -> None:
    hub._random.seed(seed)
    rule = hub.add_rule(MessageRule(subjects.ALL_STREAMS, drop=0.3, duplicate=0.5, delay_s=(0.0, 0.01)))
    async with AmpdClient(await hub.connect("faulty")) as client, await client.open_session() as session:
        result = await (await session.submit("hello", max_output_tokens=8)).result()
    assert result.token_ids == tuple(OUTPUT)
    assert result.text == TEXT
    assert rule.num_applied > 0


@pytest.mark.usefixtures("impatient")
async def test_a_new_attempt_in_the_middle(session: ClientSession, coordinator: ScriptedCoordinator) -> None:
    async def play_two_attempts(coordinator: ScriptedCoordinator, session: str) -> None:
        await coordinator.publish(piece(session, 0, 1, seq=0))
        await coordinator.publish(piece(session, 1, 2, seq=1))
        await coordinator.publish(piece(session, 1, 4, attempt=2, seq=0))  # forced prefix of one token only
        stale = piece(session, 2, 3, seq=2)
        await coordinator.publish(stale)
        await coordinator.publish(finished(session, attempt=1, seq=3))
        await coordinator.publish(piece(session, 4, 5, attempt=2, seq=1))
        await coordinator.publish(finished(session, attempt=2, seq=2))

    coordinator.script = play_two_attempts
    result = await (await session.submit("hello", max_output_tokens=8)).result()
    assert result.token_ids == tuple(OUTPUT)
    assert result.text == TEXT


@pytest.mark.usefixtures("impatient")
async def test_the_whole_stream_lost(session: ClientSession, coordinator: ScriptedCoordinator) -> None:
    coordinator.script = play_nothing
    result = await (await session.submit("hello", max_output_tokens=8)).result()
    assert result.token_ids == tuple(OUTPUT)
    assert result.text == TEXT


@pytest.mark.usefixtures("impatient")
async def test_deadline(session: ClientSession, coordinator: ScriptedCoordinator) -> None:
    coordinator.script = play_nothing
    coordinator.num_recorded, coordinator.recorded_end = 2, False
    stream = await session.submit("hello", max_output_tokens=8, deadline_s=0.3)
    with pytest.raises(AmpdError) as caught:
        await stream.result()
    assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED
    assert stream.token_ids == (11, 12)
    with pytest.raises(AmpdError):
        [chunk async for chunk in stream]
    await session.close()
    assert any(isinstance(request, CancelRound) for request in coordinator.requests)


@pytest.mark.usefixtures("impatient")
async def test_a_round_that_the_record_does_not_know_ends(
    session: ClientSession, coordinator: ScriptedCoordinator
) -> None:
    coordinator.script = play_nothing
    coordinator.read_error = ErrorReply(code=ErrorCode.UNKNOWN_SESSION, message="the session has timed out")
    with pytest.raises(AmpdError) as caught:
        await (await session.submit("hello")).result()
    assert caught.value.code is ErrorCode.UNKNOWN_SESSION


async def test_the_same_key_gives_the_same_round(session: ClientSession, coordinator: ScriptedCoordinator) -> None:
    go_on = asyncio.Event()

    async def play_when_told(coordinator: ScriptedCoordinator, session: str) -> None:
        await go_on.wait()
        await play_all(coordinator, session)

    coordinator.script = play_when_told
    first = await session.submit("hello", max_output_tokens=8, idempotency_key="k")
    assert await session.submit("hello", max_output_tokens=8, idempotency_key="k") is first
    go_on.set()
    result = await first.result()
    again = await session.submit("hello", max_output_tokens=8, idempotency_key="k")
    repeated = await again.result()  # from the record: it is not streamed again
    assert (repeated.token_ids, repeated.text) == (result.token_ids, result.text)
    assert repeated.num_recoveries >= 1
    assert len(coordinator.answers) == 1


@pytest.mark.usefixtures("impatient")
async def test_more_early_messages_than_are_kept(
    session: ClientSession, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_EARLY_MESSAGES", 2)
    hub.add_rule(MessageRule("_INBOX.>", sender="coordinator", delay_s=(0.05, 0.05)))
    result = await (await session.submit("hello", max_output_tokens=8)).result()
    assert (result.token_ids, result.text) == (tuple(OUTPUT), TEXT)


async def test_failure_and_cancel(session: ClientSession, coordinator: ScriptedCoordinator) -> None:
    async def play_failure(coordinator: ScriptedCoordinator, session: str) -> None:
        error = ErrorReply(code=ErrorCode.CANCELLED, message="cancelled by the client")
        await coordinator.publish(piece(session, 0, 1))
        await coordinator.publish(
            RoundFailed(session=session, round=0, attempt=1, seq=1, num_output_tokens=1, error=error)
        )

    coordinator.script = play_failure
    stream = await session.submit("hello", max_output_tokens=8)
    assert await stream.cancel()
    with pytest.raises(AmpdError) as caught:
        await stream.result()
    assert caught.value.code is ErrorCode.CANCELLED
    assert stream.token_ids == (11,)


@pytest.mark.usefixtures("impatient")
async def test_coordinator_restarts_while_the_round_is_submitted(
    session: ClientSession, coordinator: ScriptedCoordinator, hub: MemoryHub
) -> None:
    """No responders, then a lost answer: the same key again, and one round only."""
    await coordinator.stop()
    submitting = asyncio.create_task(session.submit("hello", max_output_tokens=8))
    while session._client._bus.counters["no_responders"] < 2:  # noqa: ASYNC110 - a counter sets no event
        await asyncio.sleep(0)
    rule = hub.add_rule(MessageRule("_INBOX.>", drop=1.0, sender="coordinator", max_times=1))
    await coordinator.start()
    result = await (await submitting).result()
    assert result.token_ids == tuple(OUTPUT)
    assert rule.num_dropped == 1
    keys = [r.idempotency_key for r in coordinator.requests if isinstance(r, SubmitRound)]
    assert len(keys) >= 2
    assert len(set(keys)) == 1
    assert len(coordinator.answers) == 1


async def test_no_coordinator_at_all(hub: MemoryHub) -> None:
    bus = await hub.connect("lonely")
    async with AmpdClient(bus, retry_s=0.1) as client:
        with pytest.raises(AmpdError) as caught:
            await client.open_session()
        assert caught.value.code is ErrorCode.BUS_UNAVAILABLE
        assert not client._sessions
    with pytest.raises(AmpdError, match="closed"):
        await client.status()
    await bus.close()


async def test_consumer_that_stops_reading_costs_nothing_and_misses_nothing(
    session: ClientSession, coordinator: ScriptedCoordinator
) -> None:
    seen_first, rest_published = asyncio.Event(), asyncio.Event()

    async def play_in_two_parts(coordinator: ScriptedCoordinator, session: str) -> None:
        await coordinator.publish(piece(session, 0, 1))
        await seen_first.wait()
        for start in range(1, len(OUTPUT)):
            await coordinator.publish(piece(session, start, start + 1))
        await coordinator.publish(finished(session))
        rest_published.set()

    coordinator.script = play_in_two_parts
    stream = await session.submit("hello", max_output_tokens=8)
    chunks = stream.__aiter__()
    first = await anext(chunks)
    seen_first.set()
    await rest_published.wait()
    await stream.result()
    rest = [chunk async for chunk in chunks]
    assert first.token_ids == (11,)
    assert len(rest) == 1  # everything it missed, at once
    assert rest[0].token_ids == tuple(OUTPUT[1:])
    assert rest[0].start_index == 1


async def test_closing_ends_what_is_in_flight(client: AmpdClient, coordinator: ScriptedCoordinator) -> None:
    coordinator.script = play_nothing
    session = await client.open_session(slo=Slo(ttft_s=1.0))
    stream = await session.submit("hello")
    await session.close()
    await session.close()
    with pytest.raises(AmpdError) as caught:
        await stream.result()
    assert caught.value.code is ErrorCode.CLIENT_GONE
    assert not client._sessions
    assert sum(isinstance(request, CloseSession) for request in coordinator.requests) == 1
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("round-")]


async def test_garbage_on_the_stream_is_survived(session: ClientSession, coordinator: ScriptedCoordinator) -> None:
    async def play_with_garbage(coordinator: ScriptedCoordinator, session: str) -> None:
        await coordinator.bus.publish(subjects.round_stream("default", session, 0), b"\xc1 not a message")
        await play_all(coordinator, session)

    coordinator.script = play_with_garbage
    result = await (await session.submit("hello", max_output_tokens=8)).result()
    assert result.token_ids == tuple(OUTPUT)


async def test_status_and_inspect(client: AmpdClient, session: ClientSession) -> None:
    assert (await client.status()).policy == "ampd"
    assert (await session.inspect()).decode_worker == "d0"
