"""What workers say: heartbeats, answers to commands, reports, and tokens on the streams."""

from __future__ import annotations

from typing import assert_never

from shared.core.attempts import (
    KV_FAILURES,
    RETRYABLE,
    command_decode_worker,
    end_prefill,
    lose_worker,
    note_run_round_ack,
    start_next_attempt,
)
from shared.core.commands import AcknowledgeEvent, SendToWorker
from shared.core.endings import fail_round, finish_from_stream, finish_round
from shared.core.events import CommandFailed, CommandReplied, HeartbeatSeen, StreamSeen, WorkerReported
from shared.core.records import RoundEndedEntry, WorkerRef
from shared.core.recovery import reconcile_rounds
from shared.core.session import RoundInFlight, Session
from shared.core.state import PendingCommand, State
from shared.core.stream_output import may_end_round
from shared.core.types import SessionKey
from shared.errors import ErrorCode
from shared.messages import (
    Ack,
    CancelRun,
    DropSession,
    ErrorReply,
    NeedTokens,
    PrefillEnded,
    PrefillTask,
    RoundEnded,
    RunRound,
    RunRoundAck,
    WorkerLeaving,
)


def on_heartbeat(state: State, event: HeartbeatSeen) -> None:
    worker, replaced = state.fleet.note_heartbeat(event.heartbeat, state.now)
    if replaced is not None:
        lose_worker(state, replaced)
    if worker is None:
        return
    state.cost_model.observe_worker(event.heartbeat)
    drops = worker.owed_drops | state.early_drops.pop(worker.ref, set())
    worker.owed_drops = set()
    for key in sorted(drops):
        if not _is_bound(state, key, worker.ref):
            state.drop_at(worker, key)
    if state.reconciling:
        reconcile_rounds(state)
    if state.now < state.grace_until:
        for key in state.held:
            state.release_held(key)


def _is_bound(state: State, key: SessionKey, ref: WorkerRef) -> bool:
    """The session lives at this worker (again): a drop that is still owed would hit the wrong life of it."""
    session = state.sessions.get(key)
    if session is None:
        return False
    return session.binding.worker.ref == ref if session.binding is not None else session.last_decode == ref


# ------------------------------------------------------------------- answers to commands


def _find_round(state: State, command: PendingCommand) -> tuple[Session, RoundInFlight] | None:
    """The round in flight that a command is about; None when the command is out of date."""
    session = state.sessions.get(command.key)
    running = session.in_flight if session is not None else None
    if session is None or running is None:
        return None
    if (running.index, running.attempt) != (command.round, command.attempt) or running.phase == "recording":
        return None
    return session, running


def on_command_replied(state: State, event: CommandReplied) -> None:
    command = state.pending.pop(event.command_id, None)
    if command is None:
        return
    found = _find_round(state, command)
    if found is None:
        return
    session, running = found
    match event.reply:
        case RunRoundAck():
            note_run_round_ack(state, session, event.reply)
        case NeedTokens():
            _send_more_tokens(state, session, running, command, event.reply)
        case ErrorReply():
            _note_refusal(state, session, running, command, event.reply)
        case Ack():
            if isinstance(command.message, CancelRun):
                _note_cancelled(state, session, running, command)
        case _:
            assert_never(event.reply)


def _send_more_tokens(
    state: State, session: Session, running: RoundInFlight, command: PendingCommand, reply: NeedTokens
) -> None:
    if not isinstance(command.message, RunRound) or running.phase not in ("starting", "reconciling"):
        return
    if session.binding is None or session.binding.worker is not command.worker:
        return
    if not 0 <= reply.num_known_tokens < command.message.tokens_start:
        message = f"worker {command.worker.worker_id} asks for tokens that it was sent"
        error = ErrorReply(code=ErrorCode.INTERNAL, message=message)
        start_next_attempt(state, session, error, avoid=command.worker.worker_id)
        return
    session.binding.num_known_tokens = reply.num_known_tokens
    command_decode_worker(state, session)


def _note_cancelled(state: State, session: Session, running: RoundInFlight, command: PendingCommand) -> None:
    """The decode worker has stopped: nothing more comes on the stream. What came before has been seen by now."""
    if running.phase != "stopping" or command.worker.ref != running.decode:
        return
    assert running.stop_reason is not None
    if running.output.is_complete:
        finish_from_stream(state, session)
    elif running.output.finished is None:
        fail_round(state, session, running.stop_reason)
    # else: the client has seen `finished` and tokens are missing here: round_ended brings them, or patience ends


def _note_refusal(
    state: State, session: Session, running: RoundInFlight, command: PendingCommand, error: ErrorReply
) -> None:
    if isinstance(command.message, CancelRun | DropSession):
        return  # nothing to stop there
    if running.phase not in ("starting", "prefilling", "reconciling"):
        return
    if isinstance(command.message, PrefillTask):
        start_next_attempt(state, session, error, avoid=command.worker.worker_id, remote_failed=True)
    elif error.code in RETRYABLE:
        if error.code == ErrorCode.WRONG_INCARNATION:
            lose_worker(state, command.worker)
        elif error.code == ErrorCode.STALE_ATTEMPT and session.binding is not None:
            # We own the record, so what it has is of an earlier session of this name, whose drop was lost.
            session.binding.num_known_tokens = 0
            state.drop_at(command.worker, session.key)
            start_next_attempt(state, session, error)
            return
        if session.in_flight is running and running.phase in ("starting", "reconciling"):
            start_next_attempt(state, session, error, avoid=command.worker.worker_id)
    else:
        fail_round(state, session, error, tell_workers=False)


def on_command_failed(state: State, event: CommandFailed) -> None:
    command = state.pending.pop(event.command_id, None)
    if command is None:
        return
    worker = command.worker
    is_drop = isinstance(command.message, DropSession)
    if event.reason == "no_responders":
        if is_drop:
            worker.owed_drops.add(command.key)
        if worker.alive:
            lose_worker(state, worker)
        return
    state.counters["command_timeouts"] += 1
    if not _is_wanted(state, command):
        return
    if command.num_tries < state.config.max_command_tries:
        _send_again(state, command)
        return
    worker.suspect_until = state.now + state.config.suspect_s
    state.counters["workers_suspected"] += 1
    if is_drop:
        worker.owed_drops.add(command.key)
        return
    found = _find_round(state, command)
    if found is not None and not isinstance(command.message, CancelRun):
        message = f"worker {worker.worker_id} does not answer"
        error = ErrorReply(code=ErrorCode.WORKER_LOST, message=message)
        is_prefill = isinstance(command.message, PrefillTask)
        start_next_attempt(state, found[0], error, avoid=worker.worker_id, remote_failed=is_prefill)


def _is_wanted(state: State, command: PendingCommand) -> bool:
    """A command that timed out still makes sense: its round still waits for it, its worker is there."""
    if not command.worker.alive:
        return False
    if isinstance(command.message, DropSession):
        return not _is_bound(state, command.key, command.worker.ref)
    if isinstance(command.message, CancelRun):
        return True
    found = _find_round(state, command)
    if found is None:
        return False
    phases = ("starting", "reconciling") if isinstance(command.message, RunRound) else ("prefilling",)
    return found[1].phase in phases


def _send_again(state: State, command: PendingCommand) -> None:
    command.num_tries += 1
    command_id = state.take_id()
    state.pending[command_id] = command
    state.emit(
        SendToWorker(
            command_id=command_id,
            worker_id=command.worker.worker_id,
            message=command.message,
            timeout_s=command.timeout_s,
        )
    )


# ------------------------------------------------------------------------------- reports


def on_worker_report(state: State, event: WorkerReported) -> None:
    match event.report:
        case RoundEnded():
            _on_round_ended(state, event.ack_id, event.report)
        case PrefillEnded():
            state.acknowledge(event.ack_id)
            _on_prefill_ended(state, event.report)
        case WorkerLeaving():
            state.acknowledge(event.ack_id)
            worker = state.fleet.find(WorkerRef(event.report.worker_id, event.report.incarnation))
            if worker is not None:
                lose_worker(state, worker)
        case _:
            assert_never(event.report)


def _on_round_ended(state: State, ack_id: int, report: RoundEnded) -> None:
    """Acknowledged once the record has it. A report that is out of date is acknowledged at once."""
    session = state.sessions.get(SessionKey(report.tenant, report.session))
    if session is None:
        state.acknowledge(ack_id)
        return
    running = session.in_flight
    if running is None or running.index != report.round:
        _acknowledge_ended_before(state, session, ack_id, report)
        return
    if report.attempt > running.attempt:
        _refuse_unknown(state, ack_id, report)
        return
    if report.attempt < running.attempt or running.decode != WorkerRef(report.worker_id, report.incarnation):
        state.acknowledge(ack_id)
        return
    running.output.adopt(report.output_token_ids)
    acknowledgement = AcknowledgeEvent(ack_id=ack_id)
    if report.error is None:
        assert report.finish_reason is not None  # checked by the service, as is usage
        assert report.usage is not None
        ended = finish_round(state, session, report.output_token_ids, report.finish_reason, report.usage)
        ended.then.insert(0, acknowledgement)
    elif running.phase == "stopping":
        assert running.stop_reason is not None
        fail_round(state, session, running.stop_reason).then.insert(0, acknowledgement)
    elif report.error.code in RETRYABLE:
        state.emit(acknowledgement)
        _retry_ended(state, session, running, report.error)
    else:
        fail_round(state, session, report.error, tell_workers=False).then.insert(0, acknowledgement)


def _retry_ended(state: State, session: Session, running: RoundInFlight, error: ErrorReply) -> None:
    """The decode worker gave up on the attempt: blame the KV's other end, or the worker that has no room."""
    if error.code in KV_FAILURES:
        avoid = running.prefill.worker_id if running.prefill is not None else None
        start_next_attempt(state, session, error, avoid=avoid, remote_failed=True)
    else:
        start_next_attempt(state, session, error, avoid=running.decode.worker_id)


def _acknowledge_ended_before(state: State, session: Session, ack_id: int, report: RoundEnded) -> None:
    if report.round >= session.num_rounds:
        _refuse_unknown(state, ack_id, report)
        return
    for pending in session.outbox:
        if isinstance(pending.entry, RoundEndedEntry) and pending.entry.round == report.round:
            pending.then.insert(0, AcknowledgeEvent(ack_id=ack_id))
            return
    state.acknowledge(ack_id)


def _refuse_unknown(state: State, ack_id: int, report: RoundEnded) -> None:
    """Somebody else started that attempt: another coordinator owns the session now and must get the report."""
    message = f"round {report.round} attempt {report.attempt} was not started by this coordinator"
    state.emit(AcknowledgeEvent(ack_id=ack_id, error=ErrorReply(code=ErrorCode.NOT_OWNER, message=message)))


def _on_prefill_ended(state: State, report: PrefillEnded) -> None:
    key = SessionKey(report.tenant, report.session)
    worker = state.fleet.find(WorkerRef(report.worker_id, report.incarnation))
    if worker is not None and key in worker.prefills and worker.prefills[key].attempt == report.attempt:
        worker.end_prefill(key)
    session = state.sessions.get(key)
    running = session.in_flight if session is not None else None
    if session is None or running is None or running.prefill is None:
        return
    if (running.index, running.attempt) != (report.round, report.attempt) or (
        running.prefill != WorkerRef(report.worker_id, report.incarnation)
    ):
        return
    running.prefill_ended = True
    if report.error is None:
        state.cost_model.observe_prefill(
            report.worker_id, running.num_cached_tokens, report.num_new_tokens, report.prefill_s
        )
    elif running.phase in ("starting", "prefilling", "reconciling"):
        start_next_attempt(state, session, report.error, avoid=report.worker_id, remote_failed=True)


# ------------------------------------------------------------------------------- streams


def on_stream(state: State, event: StreamSeen) -> None:
    session = state.sessions.get(event.key)
    running = session.in_flight if session is not None else None
    if session is None or running is None or running.index != event.round or not event.payloads:
        return
    running.output.add(event.payloads)
    if running.first_token_at is None and running.output.next_seq > 0:
        running.first_token_at = state.now
    if running.phase in ("starting", "prefilling") and running.output.next_seq > 0:
        running.phase = "decoding"
        end_prefill(state, session, running)
    if may_end_round(event.payloads[-1]) and running.output.is_complete:
        finish_from_stream(state, session)
