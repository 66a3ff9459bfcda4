"""The real coordinator core in virtual time: simulated workers and clients, a bus that loses, delays and repeats."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sim_client import SimClient
from sim_worker import SimWorker

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
    AppendFailed,
    ClientRequested,
    CommandFailed,
    CommandReplied,
    Event,
    HeartbeatSeen,
    InputEncoded,
    RecordAppended,
    RecordsLoaded,
    RoleRequested,
    SessionRecord,
    StreamSeen,
    Ticked,
    WorkerReported,
)
from shared.core.records import decode_entry, encode_entry
from shared.core.session import fold
from shared.core.types import SessionKey
from shared.errors import ErrorCode
from shared.messages import (
    ChangeRole,
    ClientRequest,
    ErrorReply,
    Heartbeat,
    KvStaged,
    Message,
    PrefillEnded,
    Role,
    RoleChanged,
    RoundEnded,
    RoundFailed,
    RoundFinished,
    RoundObserved,
    RoundTokens,
    encode,
    pack_token_ids,
)

TICK_S = 0.1
REPORT_RETRY_S = 0.5


@dataclass
class Faults:
    """Probabilities, of each message; the data plane is cut while `cut` is set."""

    drop: float = 0.0
    duplicate: float = 0.0
    slow: float = 0.0  # delayed by up to 0.5 s
    append_fails: float = 0.0
    cut: bool = False


@dataclass
class SimCluster:
    seed: int = 0
    config: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    record_events: bool = False

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.now = 100.0
        self.faults = Faults()
        self.workers: dict[str, SimWorker] = {}
        self.clients: dict[SessionKey, SimClient] = {}
        self.records: dict[SessionKey, list[bytes]] = {}
        self.observed: list[RoundObserved] = []
        self.published_failures: list[tuple[SessionKey, RoundFailed]] = []
        self.event_log: list[tuple[float, Event, list[Command]]] = []
        self.coordinator: Coordinator | None = None
        self.role_answers: list[RoleChanged | ErrorReply] = []
        self.num_mismatches = 0  # kept KV that was not what the coordinator believed ...
        self.num_behind = 0  # ... and that was more, of which it had not heard
        self.num_moved_tokens = 0  # whose KV came along with a session
        self.num_failed_moves = 0  # pulls of it
        self._life = 0  # of the coordinator: what an earlier life still had under way is lost
        self._number = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._link_busy: dict[str, float] = {}
        self._appending: dict[int, Callable[[], None]] = {}
        self._acknowledged: dict[int, Callable[[], None]] = {}
        self._replies: dict[int, Callable[[Message], None]] = {}
        self.start_coordinator()

    # ---------------------------------------------------------------------- virtual time

    def take_number(self) -> int:
        self._number += 1
        return self._number

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when, self.take_number(), action))

    def run_for(self, duration_s: float) -> None:
        end = self.now + duration_s
        while self._heap and self._heap[0][0] <= end:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = end

    def run_until(self, condition: Callable[[], bool], limit_s: float) -> None:
        end = self.now + limit_s
        while not condition():
            assert self.now < end, f"not within {limit_s} s of virtual time"
            self.run_for(TICK_S)

    def deliver(self, link: str, action: Callable[[], None]) -> None:
        """Over a link that keeps the order (one NATS connection), unless the message is lost."""
        if self.random.random() < self.faults.drop:
            return
        delay_s = self.random.uniform(0.0002, 0.002)
        if self.random.random() < self.faults.slow:
            delay_s += self.random.uniform(0.0, 0.5)
        arrival = max(self._link_busy.get(link, 0.0), self.now + delay_s)
        self._link_busy[link] = arrival
        self.at(arrival, action)
        if self.random.random() < self.faults.duplicate:
            self.at(arrival, action)

    # ----------------------------------------------------------------------- coordinator

    def start_coordinator(self) -> None:
        assert self.coordinator is None
        self._life += 1
        self.coordinator = Coordinator(self.config)
        loaded = tuple(
            SessionRecord(key, tuple(map(decode_entry, entries))) for key, entries in sorted(self.records.items())
        )
        self.feed(RecordsLoaded(records=loaded))
        self._tick(self._life)

    def kill_coordinator(self) -> None:
        self._check_records()
        self.coordinator = None
        for store in list(self._appending.values()):
            if self.random.random() < 0.5:
                store()
        self._appending.clear()
        self._acknowledged.clear()
        self._replies.clear()

    def _check_records(self) -> None:
        """What memory has and what the record gives back are the same, when nothing is on its way."""
        assert self.coordinator is not None
        for key, session in self.coordinator.state.sessions.items():
            if session.outbox:
                continue
            folded = fold(key, tuple(map(decode_entry, self.records[key])), session.rounds_kept)
            assert folded is not None
            assert folded.history == session.history
            assert folded.history_checksum == session.history_checksum
            assert (folded.num_rounds, folded.round_of_key) == (session.num_rounds, session.round_of_key)
            live = [replace(r, decision=None, ttft_s=None, tpot_s=None) for r in session.rounds.values()]
            assert live == list(folded.rounds.values())
            assert (folded.in_flight is None) == (session.in_flight is None)
            if folded.in_flight is not None and session.in_flight is not None:
                for name in ("started", "attempt", "forced", "decode", "prefill"):
                    assert getattr(folded.in_flight, name) == getattr(session.in_flight, name)

    def _tick(self, life: int) -> None:
        if self.coordinator is not None and life == self._life:
            self.feed(Ticked())
            self._check_deadlines()
            self.at(self.now + TICK_S, lambda: self._tick(life))

    def _check_deadlines(self) -> None:
        assert self.coordinator is not None
        for session in self.coordinator.state.sessions.values():
            if session.in_flight is not None:
                assert self.now <= session.in_flight.deadline_at + 2.0, "a round ends 2 s after its deadline at most"

    def feed(self, event: Event) -> None:
        if self.coordinator is None:
            return
        coordinator = self.coordinator
        commands = coordinator.on_event(event, self.now)
        coordinator.check_integrity()
        if self.record_events:
            self.event_log.append((self.now, event, commands))
        for command in commands:
            self._execute(command)

    def _feed_in_life(self, life: int, event: Event) -> None:
        if life == self._life:
            self.feed(event)

    def _execute(self, command: Command) -> None:
        life = self._life
        match command:
            case Reply():
                take = self._replies.pop(command.request_id, None)
                assert take is not None, "every request is answered once"
                self.deliver("to-clients", lambda: take(command.message))
            case EncodeInput():
                content = command.input.messages[0].content
                token_ids = pack_token_ids(list(map(int, content.split(","))))
                encoded = InputEncoded(request_id=command.request_id, key=command.key, token_ids=token_ids)
                self.at(self.now + 0.003, lambda: self._feed_in_life(life, encoded))
            case AppendRecord():
                self._append(command)
            case PurgeRecord():
                self.records.pop(command.key, None)
            case SendToWorker():
                self._send(command)
            case PublishStream():
                self.published_failures.append((command.key, command.message))
                self.publish_stream(command.key, command.message)
            case AcknowledgeEvent():
                acknowledged = self._acknowledged.pop(command.ack_id, None)
                assert acknowledged is not None, "every report is acknowledged once"
                if command.error is None:
                    self.deliver("acks", acknowledged)
            case ObserveRound():
                self.observed.append(command.observation)

    def _append(self, command: AppendRecord) -> None:
        """The record has it after a moment; if the coordinator dies meanwhile, perhaps."""
        life = self._life
        if self.random.random() < self.faults.append_fails:
            failed = AppendFailed(
                key=command.key, append_id=command.append_id, code=ErrorCode.BUS_UNAVAILABLE, message="injected"
            )
            self.at(self.now + 0.01, lambda: self._feed_in_life(life, failed))
            return

        def store() -> None:
            if self._appending.pop(number, None) is not None:
                self.records.setdefault(command.key, []).append(encode_entry(command.entry))
                self._feed_in_life(life, RecordAppended(key=command.key, append_id=command.append_id))

        number = self.take_number()
        self._appending[number] = store
        self.at(self.now + self.random.uniform(0.0003, 0.003), store)

    # --------------------------------------------------------------------------- workers

    def add_worker(self, worker_id: str, role: Role) -> SimWorker:
        worker = SimWorker(self, worker_id, role, incarnation=self.take_number())
        self.workers[worker_id] = worker
        return worker

    def kill_worker(self, worker_id: str) -> None:
        self.workers.pop(worker_id).alive = False

    def change_role(self, worker_id: str, role: Role) -> None:
        """What comes of it is in role_answers, unless the coordinator dies meanwhile."""

        def take(answer: Message) -> None:
            assert isinstance(answer, RoleChanged | ErrorReply)
            self.role_answers.append(answer)

        worker = self.workers.get(worker_id)
        if worker is not None:
            worker.had_roles.add(role)
        if self.coordinator is not None:
            request_id = self.take_number()
            self._replies[request_id] = take
            self.feed(RoleRequested(request_id=request_id, request=ChangeRole(worker_id=worker_id, role=role)))

    def data_plane_is_cut(self) -> bool:
        return self.faults.cut

    def _send(self, command: SendToWorker) -> None:
        life, answered = self._life, False

        def answer(event: Event) -> None:
            nonlocal answered
            if not answered:
                answered = True
                self._feed_in_life(life, event)

        def arrive() -> None:
            worker = self.workers.get(command.worker_id)
            if worker is None:
                answer(CommandFailed(command_id=command.command_id, reason="no_responders"))
                return
            reply = worker.command(command.message)
            replied = CommandReplied(command_id=command.command_id, reply=reply)
            self.deliver(f"from-{command.worker_id}", lambda: answer(replied))

        self.deliver(f"to-{command.worker_id}", arrive)
        timed_out = CommandFailed(command_id=command.command_id, reason="timeout")
        self.at(self.now + command.timeout_s, lambda: answer(timed_out))

    def deliver_heartbeat(self, worker: SimWorker, heartbeat: Heartbeat) -> None:
        self.deliver(f"from-{worker.worker_id}", lambda: self.feed(HeartbeatSeen(heartbeat=heartbeat)))

    def report_until_acknowledged(self, worker: SimWorker, report: RoundEnded | PrefillEnded | KvStaged) -> None:
        done = False

        def acknowledged() -> None:
            nonlocal done
            done = True

        def arrive() -> None:
            if self.coordinator is not None:
                ack_id = self.take_number()
                self._acknowledged[ack_id] = acknowledged
                self.feed(WorkerReported(ack_id=ack_id, report=report))

        def send() -> None:
            if not done:
                self.deliver(f"from-{worker.worker_id}", arrive)
                worker.later(REPORT_RETRY_S, send)

        send()

    def publish_stream(self, key: SessionKey, message: RoundTokens | RoundFinished | RoundFailed) -> None:
        """One publish, two subscribers: NATS fans it out, each connection may lose it for itself."""
        payload = encode(message)
        link = f"from-{self.random.choice('ab')}" if isinstance(message, RoundFailed) else "stream"
        seen = StreamSeen(key=key, round=message.round, payloads=(payload,))
        self.deliver(link, lambda: self.feed(seen))
        client = self.clients.get(key)
        if client is not None:
            self.deliver(f"client-{key.session}", lambda: client.on_stream(message))

    # --------------------------------------------------------------------------- clients

    def add_client(self, session: str) -> SimClient:
        key = SessionKey("tenant", session)
        client = self.clients[key] = SimClient(self, key)
        return client

    def request(self, key: SessionKey, request: ClientRequest, take: Callable[[Message], None]) -> None:
        def arrive() -> None:
            if self.coordinator is None:
                return
            request_id = self.take_number()
            self._replies[request_id] = take
            self.feed(
                ClientRequested(
                    request_id=request_id,
                    key=key,
                    request=request,
                    encoding="msgpack",
                    digest=encode(request),
                )
            )

        self.deliver(f"requests-{key.session}", arrive)

    # ------------------------------------------------------------------------------- end

    def heal(self) -> None:
        """No more faults: every process that is needed runs."""
        self.faults = Faults()
        if self.coordinator is None:
            self.start_coordinator()

    def finish(self, limit_s: float = 400.0) -> None:
        """Heal, let every round end, close every session, and see that nothing is left anywhere."""
        self.heal()
        if not any(worker.role != "prefill" for worker in self.workers.values()):
            self.add_worker("late-decode", "decode")
        self.run_until(lambda: not any(client.is_busy for client in self.clients.values()), limit_s)
        for client in self.clients.values():
            client.close()
        self.run_until(lambda: all(client.closed for client in self.clients.values()), limit_s)
        assert self.coordinator is not None
        state = self.coordinator.state
        # a worker that was killed owes its drops until it is forgotten
        limit_s = self.config.worker_memory_s + 60.0
        self.run_until(lambda: not (state.pending or state.purging or state.owed_drops), limit_s)
        patience_s = self.config.role_change_patience_s + 1.0
        self.run_until(lambda: not any(worker.change for worker in state.fleet.workers.values()), patience_s)
        self.run_for(2.0)
        assert not state.sessions
        assert not state.held
        assert not state.reconciling
        assert state.num_rounds_in_flight == 0
        assert not self.records, "closed sessions leave no record"
        for worker in self.workers.values():
            assert not worker.sessions, f"{worker.worker_id} still has {list(worker.sessions)}"
            assert not worker.tasks
            assert not worker.resident, f"{worker.worker_id} keeps KV of {list(worker.resident)}"
        for worker_state in state.fleet.workers.values():
            load = worker_state.load
            assert not load.active
            assert not load.prefills
            assert not load.decoding
            assert (load.num_promised_tokens, load.num_sessions, load.backlog_s) == (0, 0, 0.0)
        assert not state.staging
