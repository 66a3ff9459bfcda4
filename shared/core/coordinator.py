"""The coordinator's brain: `Coordinator.on_event(event, now) -> list[Command]`. No I/O, no clock, no randomness.

The service turns messages into events and commands into messages; the simulator does it with an event heap. A log of
(now, event) replayed into a fresh core gives the same commands.

    client_requests   what clients ask          placement        binding a session, routing a prefill
    command_answers   how commands went         attempts         commanding workers, trying again
    worker_reports    what workers tell         endings          finished, failed, cancelled, closed
    recovery          after a restart           residency        who holds how much of a session's KV
    staging           KV ahead of its round     explain          why rounds were placed where they were
    role_changes      workers take other roles  state            what is in memory, and what all parts use
"""

from __future__ import annotations

from typing import assert_never

from shared.core import client_requests, command_answers, role_changes, worker_reports
from shared.core.attempts import command_decode_worker, lose_worker, place_next_attempt
from shared.core.commands import AcknowledgeEvent, AppendRecord, Command, PublishStream, Reply
from shared.core.coordinator_config import CoordinatorConfig
from shared.core.endings import close_session, fail_round, forget_closed, stop_round
from shared.core.events import (
    AppendFailed,
    ClientRequested,
    CommandFailed,
    CommandReplied,
    Event,
    HeartbeatSeen,
    InputEncoded,
    InputRefused,
    RecordAppended,
    RecordsLoaded,
    RoleRequested,
    StreamSeen,
    Ticked,
    WorkerReported,
)
from shared.core.explain import explain_session
from shared.core.inspection import describe_cluster
from shared.core.integrity import check_state
from shared.core.records import (
    AttemptStartedEntry,
    RoundEndedEntry,
    RoundStartedEntry,
    SessionClosedEntry,
    SessionOpenedEntry,
)
from shared.core.recovery import end_grace, on_records_loaded, reconcile_round
from shared.core.session import HeldRequest, PendingAppend, Session
from shared.core.staging import expire_stagings
from shared.core.state import State
from shared.core.types import SessionKey
from shared.errors import ErrorCode
from shared.messages import ClusterStatus, ErrorReply, ExplainSession, SessionExplained

DEADLINE_EXCEEDED = ErrorReply(code=ErrorCode.DEADLINE_EXCEEDED, message="the round did not end within its deadline_s")
STALL_S = 1.0  # a longer gap between two ticks means that the coordinator itself stood still


class Coordinator:
    """One coordinator. Feed every event through `on_event` in order, with a `now` that never goes back."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self.state = State(config)
        self._last_tick: float | None = None

    def on_event(self, event: Event, now: float) -> list[Command]:
        """What has to be done because `event` happened at `now` (monotonic seconds), in this order."""
        state = self.state
        state.now = now
        self._dispatch(event)
        while state.released:
            key = next(iter(state.released))
            del state.released[key]
            for held in state.take_held(key):
                client_requests.handle_request(state, held)
        commands, state.commands = state.commands, []
        return commands

    def _dispatch(self, event: Event) -> None:
        state = self.state
        match event:
            case StreamSeen():
                worker_reports.on_stream(state, event)
            case RecordAppended():
                self._on_appended(event)
            case CommandReplied():
                command_answers.on_command_replied(state, event)
            case ClientRequested():
                held = HeldRequest(event, state.now, state.now + state.config.hold_s)
                client_requests.handle_request(state, held)
            case WorkerReported():
                worker_reports.on_worker_report(state, event)
            case Ticked():
                self._on_tick()
            case HeartbeatSeen():
                worker_reports.on_heartbeat(state, event)
            case CommandFailed():
                command_answers.on_command_failed(state, event)
            case InputEncoded() | InputRefused():
                client_requests.on_input_encoded(state, event)
            case AppendFailed():
                self._on_append_failed(event)
            case RoleRequested():
                role_changes.on_role_requested(state, event)
            case RecordsLoaded():
                on_records_loaded(state, event)
            case _:
                assert_never(event)

    # ------------------------------------------------------------------------ record

    def _on_appended(self, event: RecordAppended) -> None:
        """The record has the first entry of the outbox: now its effects may show."""
        session = self.state.sessions.get(event.key)
        if session is None or not session.outbox or session.outbox[0].append_id != event.append_id:
            return
        recorded = session.outbox.popleft()
        self.state.commands.extend(recorded.then)
        match recorded.entry:
            case SessionClosedEntry():
                forget_closed(self.state, session)
                return
            case RoundStartedEntry():
                self._command_attempt(session, recorded.entry.round, 1)
            case AttemptStartedEntry():
                self._command_attempt(session, recorded.entry.round, recorded.entry.attempt)
            case SessionOpenedEntry() | RoundEndedEntry():
                pass
            case _:
                assert_never(recorded.entry)
        if session.outbox:
            self._append_first(session, session.outbox[0])

    def _command_attempt(self, session: Session, round_index: int, attempt: int) -> None:
        running = session.in_flight
        if (
            running is not None
            and (running.index, running.attempt) == (round_index, attempt)
            and running.phase == "recording"
        ):
            command_decode_worker(self.state, session)

    def _append_first(self, session: Session, pending: PendingAppend) -> None:
        self.state.emit(AppendRecord(key=session.key, append_id=pending.append_id, entry=pending.entry))

    def _on_append_failed(self, event: AppendFailed) -> None:
        session = self.state.sessions.get(event.key)
        if session is None or not session.outbox or session.outbox[0].append_id != event.append_id:
            return
        self.state.counters["appends_failed"] += 1
        error = ErrorReply(code=event.code, message=event.message)
        if event.code == ErrorCode.NOT_OWNER:
            self._lose_ownership(session, error)
            return
        # The entry stays: what memory has must reach the record. What it would have started is given up.
        session.append_retry_at = self.state.now + self.state.config.append_backoff_s
        entry = session.outbox[0].entry
        if isinstance(entry, SessionOpenedEntry | RoundStartedEntry):
            self._refuse_waiting(session.outbox[0], error)
        if isinstance(entry, SessionOpenedEntry):
            close_session(self.state, session, None)
        elif isinstance(entry, RoundStartedEntry):
            running = session.in_flight
            if running is not None and running.index == entry.round and running.phase == "recording":
                fail_round(self.state, session, error)
        self.state.set_timer(session)

    def _refuse_waiting(self, pending: PendingAppend, error: ErrorReply) -> None:
        """Everybody who waits for this entry gets an error instead."""
        waiting, pending.then = pending.then, []
        for command in waiting:
            if isinstance(command, Reply):
                self.state.refuse(command.request_id, error.code, error.message)
            elif isinstance(command, AcknowledgeEvent):
                self.state.emit(AcknowledgeEvent(ack_id=command.ack_id, error=error))
            elif not isinstance(command, PublishStream):
                pending.then.append(command)

    def _lose_ownership(self, session: Session, error: ErrorReply) -> None:
        """Another coordinator writes the record: nothing that this one believes about the session counts."""
        state = self.state
        for pending in session.outbox:
            self._refuse_waiting(pending, error)
        running = session.in_flight
        waiting = [*session.close_requests, *(running.cancel_requests if running is not None else ())]
        if session.encoding is not None:
            waiting.append(session.encoding.event.request_id)
        waiting.extend(held.event.request_id for held in state.take_held(session.key))
        for request_id in waiting:
            state.refuse(request_id, error.code, error.message)
        state.remove_session(session)
        state.counters["sessions_not_owned"] += 1

    # -------------------------------------------------------------------------- time

    def _on_tick(self) -> None:
        state = self.state
        if self._last_tick is not None and state.now - self._last_tick > STALL_S:
            state.fleet.shift_last_seen(state.now - self._last_tick)
        self._last_tick = state.now
        for worker in state.fleet.list_silent(state.now):
            lose_worker(state, worker)
        role_changes.give_up_unheard(state)
        state.fleet.forget_old(state.now)
        state.settle_drops_of_gone()
        expire_stagings(state)
        if state.now >= state.grace_until:
            end_grace(state)
        for session in state.pop_due():
            self._look_at(session)
            if session.key in state.sessions:
                state.set_timer(session)
        for key, waiting in state.held.items():
            if any(held.until <= state.now for held in waiting):
                state.release_held(key)

    def _look_at(self, session: Session) -> None:
        """A session is due: see find_due for why it may be."""
        state = self.state
        if session.append_retry_at is not None and state.now >= session.append_retry_at:
            session.append_retry_at = None
            self._append_first(session, session.outbox[0])
        running = session.in_flight
        if running is None:
            if state.now >= session.last_active_at + session.opened.idle_timeout_s:
                close_session(state, session, None)
        elif running.phase == "stopping":
            if state.now >= running.not_before:
                assert running.stop_reason is not None
                fail_round(state, session, running.stop_reason)
        elif state.now >= running.deadline_at:
            stop_round(state, session, DEADLINE_EXCEEDED)
        elif running.phase == "waiting" and state.now >= running.not_before:
            place_next_attempt(state, session)
        elif running.phase == "reconciling" and state.now >= running.not_before:
            reconcile_round(state, session)

    # ----------------------------------------------------------------------- queries

    def follows(self, key: SessionKey, round_index: int) -> bool:
        """The round is in flight here, so that its stream matters."""
        session = self.state.sessions.get(key)
        return session is not None and session.in_flight is not None and session.in_flight.index == round_index

    def kv_bytes_per_token(self, worker_id: str) -> int:
        """As the worker reported; 0 for an unknown one."""
        worker = self.state.fleet.workers.get(worker_id)
        return 0 if worker is None else worker.heartbeat.kv_bytes_per_token

    def describe_cluster(self, now: float) -> ClusterStatus:
        return describe_cluster(self.state, now)

    def explain_session(self, request: ExplainSession) -> SessionExplained:
        """Raises AmpdError UNKNOWN_SESSION."""
        return explain_session(self.state, request)

    def check_integrity(self) -> None:
        """Assert every invariant of the state: for tests, after each event."""
        check_state(self.state)
