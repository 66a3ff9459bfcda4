"""How rounds and sessions end: finished, failed, cancelled, closed. Every round that was accepted ends here, once."""

from __future__ import annotations

from dataclasses import replace

from shared.core.commands import ObserveRound, PublishStream, Reply
from shared.core.explain import keep_explained
from shared.core.moving import end_move, undo_move
from shared.core.records import RoundEndedEntry, SessionClosedEntry
from shared.core.residency import truncate_resident
from shared.core.session import HeldKv, PendingAppend, RoundInFlight, Session
from shared.core.staging import begin_staging
from shared.core.state import State
from shared.core.token_bytes import count_tokens
from shared.errors import ErrorCode
from shared.messages import (
    CancelRun,
    ErrorReply,
    FinishReason,
    RoundCancelled,
    RoundFailed,
    RoundObserved,
    SessionClosed,
    Usage,
)

STOPPED_BY_CLOSE = ErrorReply(code=ErrorCode.CANCELLED, message="the session was closed")


def stop_round(state: State, session: Session, reason: ErrorReply) -> None:
    """End the round in flight with `reason`, unless it finishes first.

    The worker is told and may answer before the client is: after its answer nothing more comes on the stream, so
    that the client sees one terminal message, `finished` or `failed`. Without an answer the round fails after
    `cancel_patience_s`.
    """
    running = session.in_flight
    assert running is not None
    if running.phase == "stopping":
        return
    running.stop_reason = reason
    if running.phase in ("recording", "waiting") or state.fleet.find(running.decode) is None:
        fail_round(state, session, reason)
        return
    cancel_at_workers(state, session)
    running.phase = "stopping"
    running.not_before = state.now + state.config.cancel_patience_s
    state.reconciling.discard(session.key)
    state.set_timer(session)


def cancel_at_workers(state: State, session: Session) -> None:
    """Tell the workers of the newest attempt to stop."""
    running = session.in_flight
    assert running is not None
    message = CancelRun(
        tenant=session.key.tenant,
        session=session.key.session,
        round=running.index,
        attempt=running.attempt,
    )
    for ref in (running.decode, None if running.prefill_ended else running.prefill):
        worker = state.fleet.find(ref) if ref is not None else None
        if worker is not None:
            state.send(worker, session.key, message, state.config.cancel_patience_s)


def finish_round(
    state: State, session: Session, output: bytes, finish_reason: FinishReason | None, usage: Usage | None
) -> PendingAppend:
    """The round succeeded: its tokens join the history. The worker has published `finished`."""
    running = session.in_flight
    assert running is not None
    end_move(state, session, running)
    pending = _append_end(state, session, output, finish_reason, usage, None)
    binding = session.binding
    if binding is not None and binding.worker.ref == running.decode:
        binding.num_known_tokens = session.num_tokens
        session.held = HeldKv(session.num_tokens - 1)  # the last token's KV is computed with the next round
    state.counters["rounds_finished"] += 1
    _settle_ended(state, session, running, pending, was_cancelled=False)
    begin_staging(state, session)
    return pending


def finish_from_stream(state: State, session: Session) -> None:
    """The stream has shown every token and `finished`; the client has seen them too, whatever became of the worker."""
    running = session.in_flight
    assert running is not None
    finished = running.output.finished
    assert finished is not None
    finish_round(state, session, running.output.token_ids, finished.finish_reason, finished.usage)


def fail_round(state: State, session: Session, error: ErrorReply, *, tell_workers: bool = True) -> PendingAppend:
    """The round failed for good: its tokens do not join the history; the coordinator publishes `failed`."""
    running = session.in_flight
    assert running is not None
    if tell_workers and running.phase not in ("recording", "waiting", "stopping"):
        cancel_at_workers(state, session)
    output = running.output.token_ids
    failed = RoundFailed(
        session=session.key.session,
        round=running.index,
        attempt=running.attempt,
        seq=running.output.next_seq,
        num_output_tokens=count_tokens(output),
        error=error,
    )
    pending = _append_end(state, session, output, None, None, error)
    pending.then.append(PublishStream(key=session.key, message=failed, encoding=running.started.stream_encoding))
    undo_move(state, session, running)
    truncate_resident(session)
    session.held = session.held.cut(session.num_tokens)
    if session.binding is not None:  # the worker goes back to the history of finished rounds
        session.binding.num_known_tokens = min(session.binding.num_known_tokens, session.num_tokens)
    cancelled = error.code == ErrorCode.CANCELLED
    state.counters["rounds_cancelled" if cancelled else "rounds_failed"] += 1
    _settle_ended(state, session, running, pending, was_cancelled=cancelled)
    return pending


def _append_end(
    state: State,
    session: Session,
    output: bytes,
    finish_reason: FinishReason | None,
    usage: Usage | None,
    error: ErrorReply | None,
) -> PendingAppend:
    running = session.in_flight
    assert running is not None
    state.leave_workers(session)
    return state.append(
        session,
        RoundEndedEntry(
            round=running.index,
            attempt=running.attempt,
            output_token_ids=output,
            finish_reason=finish_reason,
            usage=usage,
            error=error,
        ),
    )


def _settle_ended(
    state: State, session: Session, running: RoundInFlight, pending: PendingAppend, *, was_cancelled: bool
) -> None:
    """What every ended round leaves behind: answers, an observation, and a session that is idle or closes."""
    state.num_rounds_in_flight -= 1
    state.reconciling.discard(session.key)
    state.update_promise(session)
    _keep_measured(state, session, running)
    for request_id in running.cancel_requests:
        reply = RoundCancelled(session=session.key.session, round=running.index, cancelled=was_cancelled)
        pending.then.append(Reply(request_id=request_id, message=reply))
    pending.then.append(ObserveRound(observation=_observe(session, running)))
    session.last_active_at = session.last_ended_at = state.now
    state.release_held(session.key)
    if session.closing:
        _append_closed(state, session)
    state.set_timer(session)


def _keep_measured(state: State, session: Session, running: RoundInFlight) -> None:
    """Add to the ended round what this coordinator saw of its latencies; older rounds give up their decisions."""
    ended = session.rounds[running.index]
    first_at = None if running.recovered else running.first_token_at
    num_gaps = ended.num_output_tokens - 1
    session.rounds[running.index] = replace(
        ended,
        ttft_s=None if first_at is None else first_at - running.received_at,
        tpot_s=None if first_at is None or num_gaps < 1 else (state.now - first_at) / num_gaps,
    )
    old = session.rounds.get(running.index - state.config.decisions_kept)
    if old is not None and old.decision is not None:
        session.rounds[old.index] = replace(old, decision=None)


def _observe(session: Session, running: RoundInFlight) -> RoundObserved:
    ended = session.rounds[running.index]
    return RoundObserved(
        tenant=session.key.tenant,
        session=session.key.session,
        round=running.index,
        delay_s=running.delay_s,
        ttft_s=ended.ttft_s,
        tpot_s=ended.tpot_s,
        slo=ended.slo,
        usage=ended.usage,
        error=None if ended.error is None else ended.error.code,
    )


def close_session(state: State, session: Session, request_id: int | None) -> None:
    """Close: cancel what runs, record it, then have the worker drop the session. Idempotent."""
    if request_id is not None:
        session.close_requests.append(request_id)
    if session.closing:
        return
    session.closing = True
    if session.encoding is not None:
        state.refuse(session.encoding.event.request_id, ErrorCode.SESSION_CLOSED, "the session was closed")
        session.encoding = None
    state.release_held(session.key)
    if session.in_flight is not None:
        stop_round(state, session, STOPPED_BY_CLOSE)
    else:
        _append_closed(state, session)


def _append_closed(state: State, session: Session) -> None:
    state.append(session, SessionClosedEntry())


def forget_closed(state: State, session: Session) -> None:
    """The record says closed: answer, have the worker give everything back, free the memory.

    The record is purged when the workers have confirmed, or are gone for good: a coordinator that starts in between
    finds it and asks again.
    """
    reply = SessionClosed(session=session.key.session, num_rounds=session.num_rounds)
    for request_id in session.close_requests:
        state.emit(Reply(request_id=request_id, message=reply))
    keep_explained(state, session)
    state.drop_everywhere(session)
    state.remove_session(session)
    state.purge_when_dropped(session.key)
    state.counters["sessions_closed"] += 1
