"""What the coordinator's core holds in memory, and the few operations that all of its parts use.

The parts (client_requests, attempts, endings, recovery) are functions over one `State`; they emit commands into
`state.commands` and never call back into `Coordinator`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass

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


@dataclass(slots=True)
class PendingCommand:
    """A command at a worker that has not been answered. `attempt` is 0 for one that is about no round."""

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
        self.early_drops: dict[WorkerRef, set[SessionKey]] = {}  # at workers not heard of yet, in the grace time
        self.purging: dict[SessionKey, set[WorkerRef]] = {}  # closed; these have not confirmed that they dropped it
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
        self.purging.pop(session.key, None)  # its record is in use again
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
        worker.owed_drops.discard(session.key)
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

    def unbind(self, session: Session) -> WorkerRef | None:
        """Leave the decode worker, and have it drop the session: now, or when it can be reached again.

        The worker if its answer can be expected.
        """
        worker = self.release_binding(session)
        if worker is not None:
            return worker.ref if self.drop_at(worker, session.key) else None
        ref = session.last_decode  # bound before this coordinator started
        return ref if ref is not None and self.drop_at_ref(ref, session.key) else None

    def drop_everywhere(self, session: Session) -> set[WorkerRef]:
        """Leave the decode worker, and every prefill worker that may hold KV; those whose answer can be expected."""
        bound = self.unbind(session)
        expected = {bound} if bound is not None else set()
        expected.update(ref for ref in session.resident if self.drop_at_ref(ref, session.key))
        session.resident.clear()
        return expected

    def drop_at(self, worker: WorkerState, key: SessionKey) -> bool:
        if worker.alive:
            self.send(worker, key, DropSession(tenant=key.tenant, session=key.session))
        else:
            worker.owed_drops.add(key)
        return worker.alive

    def drop_at_ref(self, ref: WorkerRef, key: SessionKey) -> bool:
        worker = self.fleet.workers.get(ref.worker_id)
        if worker is not None and worker.incarnation == ref.incarnation:
            return self.drop_at(worker, key)
        if worker is None and self.now < self.grace_until:
            self.early_drops.setdefault(ref, set()).add(key)
            return True
        return False

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

    def purge_when_dropped(self, key: SessionKey, expected: set[WorkerRef]) -> None:
        """The session is closed: its record goes when the workers in `expected` have dropped it, or are gone."""
        self.purging[key] = expected
        self._purge_if_dropped(key)

    def note_dropped(self, key: SessionKey, ref: WorkerRef) -> None:
        if key in self.purging:
            self.purging[key].discard(ref)
            self._purge_if_dropped(key)

    def _purge_if_dropped(self, key: SessionKey) -> None:
        if not self.purging[key]:
            del self.purging[key]
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
