"""Answers that change nothing: a session, the output of a round, the cluster's status."""

from __future__ import annotations

from typing import Literal

from shared.core.commands import Reply, SnapshotText
from shared.core.session import EndedRound, RoundInFlight, Session
from shared.core.state import State
from shared.core.token_bytes import count_tokens, slice_tokens
from shared.errors import AmpdError, ErrorCode
from shared.messages import (
    ClusterStatus,
    InspectSession,
    ReadRound,
    RoundFailed,
    RoundFinished,
    RoundInfo,
    RoundSnapshot,
    SessionInfo,
    SessionStatus,
    WorkerStatus,
)

NEWEST_ROUNDS = 64
NEWEST_SESSIONS = 200
AFTER_LAST_SEQ = 2**31 - 1  # seq of a terminal message that is read, not streamed


def describe_session(session: Session, request: InspectSession) -> SessionInfo:
    rounds = [_describe_ended(ended) for ended in list(session.rounds.values())[-NEWEST_ROUNDS:]]
    if session.in_flight is not None:
        rounds = [*rounds[-NEWEST_ROUNDS + 1 :], _describe_running(session.in_flight)]
    binding = session.binding
    return SessionInfo(
        session=session.key.session,
        state=session.state,
        decode_worker=binding.worker.worker_id if binding is not None else None,
        num_tokens=session.num_tokens,
        rounds=tuple(rounds),
        token_ids=bytes(session.history) if request.include_tokens else None,
    )


def _describe_ended(ended: EndedRound) -> RoundInfo:
    state: Literal["finished", "failed", "cancelled"] = "finished"
    if ended.error is not None:
        state = "cancelled" if ended.error.code == ErrorCode.CANCELLED else "failed"
    return RoundInfo(
        round=ended.index,
        state=state,
        attempt=ended.attempt,
        num_input_tokens=ended.num_input_tokens,
        num_output_tokens=ended.num_output_tokens,
        usage=ended.usage,
        error=None if ended.error is None else f"{ended.error.code.value}: {ended.error.message}",
    )


def _describe_running(running: RoundInFlight) -> RoundInfo:
    state: Literal["queued", "prefilling", "decoding"] = "queued"
    if running.phase == "prefilling":
        state = "prefilling"
    elif running.phase in ("decoding", "stopping"):
        state = "decoding"
    return RoundInfo(
        round=running.index,
        state=state,
        attempt=running.attempt,
        num_input_tokens=running.num_input_tokens,
        num_output_tokens=running.output.num_tokens,
    )


def read_round(session: Session, request_id: int, request: ReadRound) -> Reply:
    """The output of a round as far as it is known. Raises UNKNOWN_ROUND, INVALID_REQUEST."""
    running = session.in_flight
    if request.start_index < 0:
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"start_index must not be negative, got {request.start_index}")
    if running is not None and running.index == request.round:
        output, stop, ended = running.output.token_ids, running.started.stop.stop, None
    elif request.round in session.rounds:
        ended = session.rounds[request.round]
        output, stop = session.output_of(ended), ended.stop
    else:
        raise AmpdError(
            ErrorCode.UNKNOWN_ROUND,
            f"round {request.round} cannot be read: the session has had {session.num_rounds}, and its newest "
            f"{session.rounds_kept} are kept",
        )
    start = min(request.start_index, count_tokens(output))
    if ended is not None and session.is_recording_end(ended.index):
        ended = None  # after a crash now, the round could still end otherwise
    snapshot = RoundSnapshot(
        session=session.key.session,
        round=request.round,
        start_index=start,
        token_ids=slice_tokens(output, start),
        finished=_as_finished(session, ended) if ended is not None and ended.error is None else None,
        failed=_as_failed(session, ended) if ended is not None and ended.error is not None else None,
    )
    return Reply(request_id=request_id, message=snapshot, snapshot=SnapshotText(output, stop))


def _as_finished(session: Session, ended: EndedRound) -> RoundFinished:
    assert ended.finish_reason is not None
    assert ended.usage is not None
    return RoundFinished(
        session=session.key.session,
        round=ended.index,
        attempt=ended.attempt,
        seq=AFTER_LAST_SEQ,
        num_output_tokens=ended.num_output_tokens,
        finish_reason=ended.finish_reason,
        usage=ended.usage,
    )


def _as_failed(session: Session, ended: EndedRound) -> RoundFailed:
    assert ended.error is not None
    return RoundFailed(
        session=session.key.session,
        round=ended.index,
        attempt=ended.attempt,
        seq=AFTER_LAST_SEQ,
        num_output_tokens=ended.num_output_tokens,
        error=ended.error,
    )


def describe_cluster(state: State, now: float) -> ClusterStatus:
    newest = sorted(state.sessions.values(), key=lambda session: -session.last_active_at)[:NEWEST_SESSIONS]
    models = sorted({worker.heartbeat.model for worker in state.fleet.workers.values() if worker.alive})
    return ClusterStatus(
        policy=state.config.scheduling.name,
        model=", ".join(models),
        workers=tuple(
            WorkerStatus(
                alive=worker.alive,
                last_seen_s=now - worker.last_seen,
                heartbeat=worker.heartbeat,
                wanted_role=worker.change.role if worker.change is not None else None,
            )
            for _, worker in sorted(state.fleet.workers.items())
        ),
        sessions=tuple(
            SessionStatus(
                tenant=session.key.tenant,
                session=session.key.session,
                state=session.state,
                decode_worker=session.binding.worker.worker_id if session.binding is not None else None,
                num_rounds=session.num_rounds,
                num_tokens=session.num_tokens,
                idle_s=0.0 if session.in_flight is not None else now - session.last_active_at,
            )
            for session in newest
        ),
        num_sessions=len(state.sessions),
        num_rounds_in_flight=state.num_rounds_in_flight,
        counters=dict(sorted(_count_all(state).items())),
    )


def _count_all(state: State) -> dict[str, int]:
    """What was counted, and the living workers that a profile was given for and does not fit."""
    if state.config.profile is None:
        return state.counters
    off_profile = sum(worker.alive and worker.costs.rates is not None for worker in state.fleet.workers.values())
    return {**state.counters, "workers_off_profile": off_profile}
