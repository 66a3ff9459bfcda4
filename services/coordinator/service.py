"""The coordinator on the bus: messages become events of the core, the core's commands become messages."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar, assert_never

import msgspec

from services.coordinator.event_log import EventLog
from services.coordinator.input_text import InputText
from services.coordinator.message_reading import (
    digest_request,
    read_report,
    read_request,
)
from services.coordinator.outgoing import Outgoing
from services.coordinator.record_writer import RecordWriter
from services.coordinator.stream_buffer import StreamBuffer
from shared import subjects
from shared.bus import Bus, BusMessage, Subscription
from shared.core.commands import (
    AcknowledgeEvent,
    AppendRecord,
    Command,
    EncodeInput,
    ObserveRound,
    PublishStream,
    PurgeRecord,
    Reply,
    SendToWorker,
)
from shared.core.coordinator import Coordinator
from shared.core.coordinator_config import CoordinatorConfig
from shared.core.events import (
    ClientRequested,
    Event,
    HeartbeatSeen,
    RecordsLoaded,
    RoleRequested,
    StreamSeen,
    Ticked,
    WorkerReported,
)
from shared.core.types import SessionKey
from shared.errors import AmpdError, ErrorCode
from shared.log import get_logger
from shared.messages import (
    Ack,
    ChangeRole,
    Encoding,
    ExplainSession,
    GetStatus,
    Heartbeat,
    Message,
    RoundSnapshot,
    SessionInfo,
    SubmitRound,
    WorkerLeaving,
    decode,
    encode,
    encoding_of,
    unpack_token_ids,
)
from shared.record_log import RecordLog

VERSION = "0.1.0"
QUEUE_GROUP = "coordinator"
TICK_S = 0.1
DRAIN_S = 5.0
REPORT_PATIENCE_S = 5.0  # a worker repeats its report after 2 s: an older one need not wait for ever

log = get_logger(__name__)


class CoordinatorService:
    """Runs one core. `on_crash(reason)` is called when the core or a task of ours raised: the process must end."""

    def __init__(
        self,
        bus: Bus,
        record_log: RecordLog,
        *,
        config: CoordinatorConfig,
        secret: bytes,
        text: InputText,
        on_crash: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        is_connected: Callable[[], bool] = lambda: True,
        event_log: EventLog | None = None,
    ) -> None:
        self._bus = bus
        self._records = RecordWriter(record_log)
        self._text = text
        self._on_crash = on_crash
        self._clock = clock
        self._is_connected = is_connected
        self._event_log = event_log
        self.core = Coordinator(config)
        self._streams = StreamBuffer(self.core.follows, self._on_stream_payloads)
        self._outgoing = Outgoing(bus, self._records, text, secret, self.core, self._streams, self.feed)
        self._events: deque[Event] = deque()
        self._is_feeding = False
        self._next_id = 0
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self._acknowledgements: dict[int, asyncio.Future[AcknowledgeEvent]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._record_tasks: dict[SessionKey, asyncio.Task[None]] = {}  # the newest of each session
        self._subscriptions: list[Subscription] = []
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Fold the records, then serve. Raises BusError, or AmpdError for a record that cannot be read."""
        records = await self._records.load()
        self.feed(RecordsLoaded(records=records))
        if records:
            log.info("records loaded", sessions=len(self.core.state.sessions), records=len(records))
        bus, config = self._bus, self.core.state.config
        max_requests = config.max_held + config.max_rounds_in_flight
        self._subscriptions = [
            await bus.subscribe_ordered(subjects.ALL_STREAMS, self._on_stream),
            await bus.subscribe_ordered(subjects.HEARTBEATS, self._on_heartbeat),
            await bus.subscribe(
                subjects.COORDINATOR_EVENT, self._on_report, queue=QUEUE_GROUP, max_in_flight=max_requests
            ),
            await bus.subscribe(subjects.STATUS, self._on_status, queue=QUEUE_GROUP),
            await bus.subscribe(subjects.EXPLAIN, self._on_explain, queue=QUEUE_GROUP),
            await bus.subscribe(subjects.ROLE, self._on_role, queue=QUEUE_GROUP),
            await bus.subscribe(
                subjects.ALL_SESSION_REQUESTS, self._on_request, queue=QUEUE_GROUP, max_in_flight=max_requests
            ),
        ]
        await bus.register_service("ampd-coordinator", VERSION, {"policy": config.policy})
        self._ticking = asyncio.create_task(self._tick(), name="tick")

    async def stop(self) -> None:
        """Take nothing new, let what is on its way into the records arrive. Rounds go on at their workers."""
        if self._ticking is not None:
            self._ticking.cancel()
        for subscription in reversed(self._subscriptions):
            await subscription.unsubscribe()
        appends = [task for task in self._record_tasks.values() if not task.done()]
        if appends:
            await asyncio.wait(appends, timeout=DRAIN_S)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------------- the core

    def feed(self, event: Event) -> None:
        """One event into the core, and its commands out. Events that arise meanwhile come after it."""
        self._events.append(event)
        if self._is_feeding:
            return
        self._is_feeding = True
        try:
            while self._events:
                event, now = self._events.popleft(), self._clock()
                if self._event_log is not None:
                    self._event_log.write(now, event)
                for command in self.core.on_event(event, now):
                    self._execute(command)
        except Exception as error:
            log.error("the core failed", kind=type(event).__name__, exc_info=error)
            self._on_crash(f"the core failed on {type(event).__name__}: {error!r}")
            raise
        finally:
            self._is_feeding = False

    def _execute(self, command: Command) -> None:
        match command:
            case Reply():
                _resolve(self._replies.pop(command.request_id, None), command)
            case SendToWorker():
                self._spawn(self._outgoing.send(command))
            case AppendRecord():
                self._spawn_in_order(command.key, self._outgoing.append(command))
            case AcknowledgeEvent():
                _resolve(self._acknowledgements.pop(command.ack_id, None), command)
            case ObserveRound():
                self._streams.forget(SessionKey(command.observation.tenant, command.observation.session))
                self._spawn(self._outgoing.publish(subjects.OBSERVED_ROUND, encode(command.observation)))
            case EncodeInput():
                self._spawn(self._outgoing.encode_input(command))
            case PublishStream():
                subject = subjects.round_stream(*command.key, command.message.round)
                self._spawn(self._outgoing.publish(subject, encode(command.message, command.encoding)))
            case PurgeRecord():
                self._spawn_in_order(command.key, self._records.purge(command.key))
            case _:
                assert_never(command)

    async def _tick(self) -> None:
        """While the bus is away nothing is decided: silence says nothing about the workers then."""
        while True:
            await asyncio.sleep(TICK_S)
            if self._is_connected():
                self._streams.flush_all()
                self.feed(Ticked())

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        """Bounded by the core: it has a bounded number of commands, appends and requests under way."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task failed", exc_info=error)
            self._on_crash(f"a task failed: {error!r}")

    def _spawn_in_order(self, key: SessionKey, work: Awaitable[None]) -> None:
        """After what this session still writes. The core waits for appends; only a purge may be on its way."""
        before = self._record_tasks.get(key)

        async def follow() -> None:
            if before is not None:
                await asyncio.wait([before])
            await work

        task = self._spawn(work if before is None else follow())
        self._record_tasks[key] = task
        task.add_done_callback(lambda done: self._forget_record_task(key, done))

    def _forget_record_task(self, key: SessionKey, done: asyncio.Task[None]) -> None:
        if self._record_tasks.get(key) is done:
            del self._record_tasks[key]

    # ------------------------------------------------------------------------- messages

    async def _on_request(self, message: BusMessage) -> None:
        encoding = encoding_of(message.data)
        key = SessionKey(*subjects.parse_session_request(message.subject))
        request = read_request(message.data)
        event = ClientRequested(
            request_id=self._take_id(),
            key=key,
            request=request,
            encoding=encoding,
            random_seed=secrets.randbits(63) if isinstance(request, SubmitRound) else 0,
            digest=digest_request(request) if isinstance(request, SubmitRound) and request.idempotency_key else b"",
        )
        self._streams.flush_session(key)
        await message.respond(self._encode_reply(await self._ask(event), encoding))

    async def _ask(self, event: ClientRequested | RoleRequested) -> Reply:
        """Feed a request; the core answers every one, if only with an error."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[event.request_id] = future
        try:
            self.feed(event)
            return await future
        finally:
            self._replies.pop(event.request_id, None)

    def _encode_reply(self, reply: Reply, encoding: Encoding) -> bytes:
        answer: Message = reply.message
        if isinstance(answer, RoundSnapshot) and reply.snapshot is not None:
            ended = answer.finished is not None or answer.failed is not None
            text = self._text.read_snapshot(reply.snapshot, answer.start_index, ended=ended)
            answer = msgspec.structs.replace(answer, text=text)
        if encoding == "json" and isinstance(answer, RoundSnapshot | SessionInfo) and answer.token_ids is not None:
            # a JSON client gets a list: the bytes would arrive as base64
            answer = msgspec.structs.replace(answer, token_ids=unpack_token_ids(answer.token_ids))
        return encode(answer, encoding)

    async def _on_report(self, message: BusMessage) -> None:
        report = read_report(message.data)
        ack_id = self._take_id()
        future: asyncio.Future[AcknowledgeEvent] = asyncio.get_running_loop().create_future()
        self._acknowledgements[ack_id] = future
        try:
            if isinstance(report, WorkerLeaving):
                self._streams.flush_all()
            else:
                self._streams.flush_session(SessionKey(report.tenant, report.session))
            self.feed(WorkerReported(ack_id=ack_id, report=report))
            async with asyncio.timeout(REPORT_PATIENCE_S):
                acknowledgement = await future
        except TimeoutError:
            return  # not recorded yet: the worker repeats it
        finally:
            self._acknowledgements.pop(ack_id, None)
        await message.respond(encode(acknowledgement.error or Ack()))

    def _on_heartbeat(self, message: BusMessage) -> None:
        try:
            heartbeat = decode(message.data)
        except AmpdError as error:
            log.warning("heartbeat not read", subject=message.subject, error=error.message)
            return
        if isinstance(heartbeat, Heartbeat):
            self._streams.flush_all()
            self.feed(HeartbeatSeen(heartbeat=heartbeat))

    def _on_stream(self, message: BusMessage) -> None:
        self._streams.add(message.subject, message.data)

    def _on_stream_payloads(self, key: SessionKey, round_index: int, payloads: tuple[bytes, ...]) -> None:
        self.feed(StreamSeen(key=key, round=round_index, payloads=payloads))

    async def _on_status(self, message: BusMessage) -> None:
        if not isinstance(decode(message.data), GetStatus):
            raise AmpdError(ErrorCode.INVALID_REQUEST, 'this subject answers {"type":"get_status"} alone')
        status = self.core.describe_cluster(self._clock())
        await message.respond(encode(status, encoding_of(message.data)))

    async def _on_explain(self, message: BusMessage) -> None:
        request = decode(message.data)
        if not isinstance(request, ExplainSession):
            raise AmpdError(
                ErrorCode.INVALID_REQUEST,
                'this subject answers {"type":"explain_session","tenant":T,"session":S} alone',
            )
        await message.respond(encode(self.core.explain_session(request), encoding_of(message.data)))

    async def _on_role(self, message: BusMessage) -> None:
        request = decode(message.data)
        if not isinstance(request, ChangeRole):
            raise AmpdError(
                ErrorCode.INVALID_REQUEST, 'this subject answers {"type":"change_role","worker_id":W,"role":R} alone'
            )
        reply = await self._ask(RoleRequested(request_id=self._take_id(), request=request))
        await message.respond(self._encode_reply(reply, encoding_of(message.data)))

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id


T = TypeVar("T")


def _resolve(future: asyncio.Future[T] | None, value: T) -> None:
    """None, or done: whoever waited has gone."""
    if future is not None and not future.done():
        future.set_result(value)
