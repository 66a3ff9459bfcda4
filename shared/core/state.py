"""What the coordinator's core holds in memory, and the few operations that all of its parts use.

The parts (client_requests, attempts, endings, recovery) are functions over one `State`; they emit commands into
`state.commands` and never call back into `Coordinator`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass
from typing import TypeVar

from shared.core.commands import AcknowledgeEvent, AppendRecord, Command, PurgeRecord, Reply, SendToWorker
from shared.core.coordinator_config import CoordinatorConfig
from shared.core.fleet import Fleet, WorkerState
from shared.core.records import RecordEntry, WorkerRef
from shared.core.session import Binding, HeldRequest, PendingAppend, RoundInFlight, Session
from shared.core.types import SessionKey
from shared.errors import ErrorCode
from shared.messages import (
    CancelRun,
    DropSession,
    ErrorReply,
    PrefillTask,
    RunRound,
    SessionExplained,
    WorkerCommand,
)

K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True)
class PendingCommand:
    """A command at a worker that has not been answered. `attempt` is 0 for one that is about no round, `key` NO_SESSION
    for one that is about no session."""

    key: SessionKey
    round: int
    attempt: int
    worker: WorkerState
    message: WorkerCommand
    timeout_s: float
    num_tries: int = 1


@dataclass(slots=True)
class Staging:
    """KV of an idle session on its way from its decode worker to a prefill worker that holds a part of it."""

    decode: WorkerRef
    holder: WorkerRef
    until: float  # then it is given up
    granted: bool = False


class State:
    def __init__(self, config: CoordinatorConfig) -> None:
        self.config = config
        self.now = 0.0
        self.grace_until = 0.0  # after a start: workers that live have sent a heartbeat by then
        self.memory_until = 0.0  # after a start: workers not heard of by then are gone for good
        self.commands: list[Command] = []
        self.fleet = Fleet(
            config.heartbeat_timeout_s,
            config.worker_memory_s,
            profile=config.profile,
            cost_scale=config.cost_scale,
            corrects=config.scheduling.corrects,
        )
        self.sessions: dict[SessionKey, Session] = {}
        self.sessions_of_tenant: Counter[str] = Counter()
        self.num_rounds_in_flight = 0
        self.pending: dict[int, PendingCommand] = {}
        self.held: dict[SessionKey, list[HeldRequest]] = {}
        self.num_held = 0
        self.released: dict[SessionKey, None] = {}  # held requests to look at again at the end of this event
        self.reconciling: set[SessionKey] = set()
        self.dropping: dict[SessionKey, set[WorkerRef]] = {}  # these have not confirmed that they dropped it
        self.owed_drops: dict[WorkerRef, set[SessionKey]] = {}  # of them: to be sent with the worker's next heartbeat
        self.purging: set[SessionKey] = set()  # closed: the record goes when nobody has to drop it any more
        self.staging: dict[SessionKey, Staging] = {}
        self.explained: dict[SessionKey, SessionExplained] = {}  # closed sessions, the newest last
        self.counters: Counter[str] = Counter()
        self._next_id = 1
        self._timers: list[tuple[float, int, SessionKey]] = []

    # ---------------------------------------------------------------- commands

    def take_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def emit(self, command: Command) -> None:
        self.commands.append(command)

    def refuse(self, request_id: int, code: ErrorCode, message: str, *, retry_after_s: float | None = None) -> None:
        self.counters[f"refused_{code.value}"] += 1
        self.emit(
            Reply(
                request_id=request_id,
                message=ErrorReply(code=code, message=message, retry_after_s=retry_after_s),
            )
        )

    def acknowledge(self, ack_id: int) -> None:
        self.emit(AcknowledgeEvent(ack_id=ack_id))

    def append(self, session: Session, entry: RecordEntry) -> PendingAppend:
        """Apply an entry and put it into the outbox; what waits for it is added to the result by the caller."""
        session.apply(entry)
        pending = PendingAppend(self.take_id(), entry)
        session.outbox.append(pending)
        if len(session.outbox) == 1:
            self.emit(AppendRecord(key=session.key, append_id=pending.append_id, entry=entry))
        return pending

    def send(
        self,
        worker: WorkerState,
        key: SessionKey,
        message: WorkerCommand,
        timeout_s: float | None = None,
    ) -> int:
        """Command a worker; the command's id."""
        command_id = self.take_id()
        if timeout_s is None:
            timeout_s = self.config.command_timeout_s
        round_index, attempt = -1, 0
        if isinstance(message, RunRound | PrefillTask | CancelRun):
            round_index, attempt = message.round, message.attempt
        self.pending[command_id] = PendingCommand(key, round_index, attempt, worker, message, timeout_s)
        self.emit(SendToWorker(command_id=command_id, worker_id=worker.worker_id, message=message, timeout_s=timeout_s))
        return command_id

    # ---------------------------------------------------------------- sessions

    def add_session(self, session: Session) -> None:
        self.purging.discard(session.key)  # its record is in use again
        self.sessions[session.key] = session
        self.sessions_of_tenant[session.key.tenant] += 1

    def remove_session(self, session: Session) -> None:
        """Every trace of a session in memory; what its worker has is `unbind`'s matter."""
        if session.in_flight is not None:
            self.leave_workers(session)
            self.num_rounds_in_flight -= 1
        self.release_binding(session)
        self.staging.pop(session.key, None)
        self.reconciling.discard(session.key)
        del self.sessions[session.key]
        self.sessions_of_tenant[session.key.tenant] -= 1
        if self.sessions_of_tenant[session.key.tenant] == 0:
            del self.sessions_of_tenant[session.key.tenant]
        self.release_held(session.key)

    def bind(self, session: Session, worker: WorkerState, num_known_tokens: int) -> None:
        assert session.binding is None
        session.binding = Binding(worker, num_known_tokens)
        session.resident.pop(worker.ref, None)  # what it has is the session's own KV now
        self.settle_drop(worker.ref, session.key)
        worker.load.num_sessions += 1
        self.update_promise(session)

    def update_promise(self, session: Session) -> None:
        """Count the session's tokens, and what the round in flight may add, at the worker it is bound to."""
        binding = session.binding
        if binding is None:
            return
        promised = session.num_tokens + (needed_growth(session.in_flight) if session.in_flight is not None else 0)
        binding.worker.load.num_promised_tokens += promised - binding.num_promised_tokens
        binding.num_promised_tokens = promised

    def release_binding(self, session: Session) -> WorkerState | None:
        binding, session.binding = session.binding, None
        if binding is None:
            return None
        binding.worker.load.num_promised_tokens -= binding.num_promised_tokens
        binding.worker.load.num_sessions -= 1
        return binding.worker

    def unbind(self, session: Session) -> None:
        """Leave the decode worker, and have it drop the session."""
        worker = self.release_binding(session)
        ref = worker.ref if worker is not None else session.last_decode  # as bound before this coordinator started
        if ref is not None:
            self.drop_at(ref, session.key)

    def drop_everywhere(self, session: Session) -> None:
        """Leave the decode worker, and every prefill worker that may hold KV."""
        self.unbind(session)
        for ref in session.resident:
            self.drop_at(ref, session.key)
        session.resident.clear()

    def drop_at(self, ref: WorkerRef, key: SessionKey) -> None:
        """Have a worker drop the session: now, or when it is heard of again."""
        worker = self.fleet.find(ref)
        if worker is None:
            self.owe_drop(ref, key)
            return
        self.dropping.setdefault(key, set()).add(ref)
        self.send(worker, key, DropSession(tenant=key.tenant, session=key.session))

    def owe_drop(self, ref: WorkerRef, key: SessionKey) -> None:
        """The worker cannot be reached: its next heartbeat has it drop the session, if one may still come."""
        if self.may_be_heard(ref):
            self.dropping.setdefault(key, set()).add(ref)
            self.owed_drops.setdefault(ref, set()).add(key)
        else:
            self.settle_drop(ref, key)

    def note_dropped(self, ref: WorkerRef, key: SessionKey) -> None:
        """The worker has dropped the session; what it still owes then is the drop of a later life there."""
        if key not in self.owed_drops.get(ref, ()):
            self.settle_drop(ref, key)

    def settle_drop(self, ref: WorkerRef, key: SessionKey) -> None:
        """The worker has dropped the session, or has it again, or is gone for good."""
        _discard(self.owed_drops, ref, key)
        _discard(self.dropping, key, ref)
        self._purge_if_dropped(key)

    def settle_drops_of_gone(self) -> None:
        """Nothing is expected of workers that are gone for good."""
        for ref in [ref for ref in self.owed_drops if not self.may_be_heard(ref)]:
            for key in sorted(self.owed_drops[ref]):
                self.settle_drop(ref, key)

    def may_be_heard(self, ref: WorkerRef) -> bool:
        """This process lives, or may: no other runs under its id, and it has not been silent for `worker_memory_s`."""
        worker = self.fleet.workers.get(ref.worker_id)
        return self.now < self.memory_until if worker is None else worker.incarnation == ref.incarnation

    def is_held_at(self, ref: WorkerRef, key: SessionKey) -> bool:
        """The session lives at this worker (again): a drop that is still owed would hit the wrong life of it."""
        session = self.sessions.get(key)
        if session is None:
            return False
        if ref in session.resident:
            return True
        running = session.in_flight
        if running is not None and running.move is not None and running.move.source == ref:
            return True
        return session.binding.worker.ref == ref if session.binding is not None else session.last_decode == ref

    def purge_when_dropped(self, key: SessionKey) -> None:
        """The session is closed: its record goes when every worker that had it has dropped it, or is gone for good."""
        self.purging.add(key)
        self._purge_if_dropped(key)

    def _purge_if_dropped(self, key: SessionKey) -> None:
        if key in self.purging and key not in self.dropping:
            self.purging.remove(key)
            self.emit(PurgeRecord(key=key))

    def leave_workers(self, session: Session) -> None:
        """The attempt in flight no longer counts at its workers (what they still do is cancelled elsewhere)."""
        running = session.in_flight
        assert running is not None
        for ref in (running.decode, running.prefill):
            worker = self.fleet.workers.get(ref.worker_id) if ref is not None else None
            if worker is not None:
                worker.load.end_prefill(session.key, self.now)
                worker.load.end_round(session.key)

    # ---------------------------------------------------------------- held requests

    def hold(self, held: HeldRequest) -> bool:
        """Keep a request for later; False when its session or the coordinator holds too many."""
        waiting = self.held.setdefault(held.event.key, [])
        if len(waiting) >= self.config.max_held_per_session or self.num_held >= self.config.max_held:
            if not waiting:
                del self.held[held.event.key]
            return False
        waiting.append(held)
        self.num_held += 1
        return True

    def release_held(self, key: SessionKey) -> None:
        if key in self.held:
            self.released[key] = None

    def take_held(self, key: SessionKey) -> list[HeldRequest]:
        requests = self.held.pop(key, [])
        self.num_held -= len(requests)
        return requests

    # ---------------------------------------------------------------- timers

    def set_timer(self, session: Session) -> None:
        """Have the session looked at when it is due. Invariant: a session has a timer at or before its due time.

        A later due time leaves the old timer: when it fires, the session is found not due and gets a new one.
        """
        due = find_due(session)
        if session.timer_at is None or due < session.timer_at:
            session.timer_at = due
            heapq.heappush(self._timers, (due, self.take_id(), session.key))

    def list_timers(self) -> list[tuple[float, int, SessionKey]]:
        """(time, tie-break, session) of every timer, the outdated ones included."""
        return self._timers

    def pop_due(self) -> list[Session]:
        due: dict[SessionKey, Session] = {}
        while self._timers and self._timers[0][0] <= self.now:
            at, _, key = heapq.heappop(self._timers)
            session = self.sessions.get(key)
            if session is not None and session.timer_at == at:
                session.timer_at = None
                due[key] = session
        return list(due.values())


def _discard(index: dict[K, set[V]], key: K, value: V) -> None:
    """Take a value out of a set of an index; no key without values."""
    values = index.get(key)
    if values is not None:
        values.discard(value)
        if not values:
            del index[key]


def needed_growth(running: RoundInFlight) -> int:
    """KV tokens that a round may add to its session's history."""
    return running.num_input_tokens + running.started.stop.max_output_tokens


def find_due(session: Session) -> float:
    """When the session needs to be looked at next."""
    running = session.in_flight
    if running is None:
        due = session.last_active_at + session.opened.idle_timeout_s
    elif running.phase == "stopping":
        due = running.not_before
    elif running.phase in ("waiting", "reconciling"):
        due = min(running.not_before, running.deadline_at)
    else:
        due = running.deadline_at
    return due if session.append_retry_at is None else min(due, session.append_retry_at)
