"""What becomes of commands at workers: answered, refused, not answered, not delivered."""

from __future__ import annotations

from typing import assert_never

from shared.core.attempts import (
    RETRYABLE,
    command_decode_worker,
    lose_worker,
    note_history,
    note_run_round_ack,
    start_next_attempt,
)
from shared.core.commands import SendToWorker
from shared.core.endings import fail_round, finish_from_stream
from shared.core.events import CommandFailed, CommandReplied
from shared.core.fleet import WorkerState
from shared.core.role_changes import is_changing, note_role_failed, note_role_set
from shared.core.session import NOTHING_HELD, RoundInFlight, Session
from shared.core.staging import abandon_staging, on_staging_reply
from shared.core.state import PendingCommand, State
from shared.errors import ErrorCode
from shared.messages import (
    Ack,
    CancelRun,
    DropSession,
    ErrorReply,
    GrantHistory,
    HistoryGranted,
    Message,
    NeedTokens,
    PrefillTask,
    RunRound,
    RunRoundAck,
    SetRole,
    StageKv,
)


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
    if isinstance(command.message, DropSession):
        state.note_dropped(command.worker.ref, command.key)
        return
    if isinstance(command.message, SetRole):
        _note_role_reply(state, command.worker, command.message, event.reply)
        return
    if isinstance(command.message, GrantHistory) and command.message.hold:
        _note_history(state, command, event.command_id, event.reply)
        return
    if isinstance(command.message, GrantHistory | StageKv):
        on_staging_reply(state, command.key, event.reply)
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
        case HistoryGranted():
            pass  # an answer to GrantHistory alone
        case _:
            assert_never(event.reply)


def _note_role_reply(state: State, worker: WorkerState, message: SetRole, reply: Message) -> None:
    if not isinstance(reply, ErrorReply):
        note_role_set(state, worker, message)
        return
    if reply.code == ErrorCode.WRONG_INCARNATION and worker.alive:
        lose_worker(state, worker)
    note_role_failed(state, worker, message, reply)


def _note_history(state: State, command: PendingCommand, command_id: int, reply: Message | None) -> None:
    session = state.sessions.get(command.key)
    if session is not None:
        note_history(state, session, command_id, reply if isinstance(reply, HistoryGranted) else None)


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
    session.held = session.held.cut(reply.num_known_tokens)
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
    if isinstance(command.message, CancelRun):
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
            session.held = NOTHING_HELD
            state.drop_at(command.worker.ref, session.key)
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
    if event.reason == "no_responders" and worker.alive:
        lose_worker(state, worker)
    if isinstance(command.message, GrantHistory) and command.message.hold:
        _note_history(state, command, event.command_id, None)
        return
    if isinstance(command.message, GrantHistory | StageKv):
        abandon_staging(state, command.key)
        return
    if event.reason == "timeout":
        state.counters["command_timeouts"] += 1
        if _is_wanted(state, command) and command.num_tries < state.config.max_command_tries:
            _send_again(state, command)
            return
        if worker.alive and _is_wanted(state, command):
            _suspect(state, command)
    if isinstance(command.message, SetRole):
        message = f"worker {worker.worker_id} does not answer: look at its log, and at `ampd status` for its role"
        error = ErrorReply(code=ErrorCode.WORKER_LOST, message=message)
        note_role_failed(state, worker, command.message, error)
    if isinstance(command.message, DropSession):
        if state.is_held_at(worker.ref, command.key):
            state.settle_drop(worker.ref, command.key)
        else:
            state.owe_drop(worker.ref, command.key)


def _suspect(state: State, command: PendingCommand) -> None:
    """The worker sends heartbeats but does not answer: it gets nothing new for a while."""
    worker = command.worker
    worker.suspect_until = state.now + state.config.suspect_s
    state.counters["workers_suspected"] += 1
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
        return not state.is_held_at(command.worker.ref, command.key)
    if isinstance(command.message, CancelRun):
        return True
    if isinstance(command.message, SetRole):
        return is_changing(command.worker, command.message)
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
