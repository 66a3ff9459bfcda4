"""What clients ask: open, round, cancel, close, inspect, read_round. Each request is answered exactly once."""

from __future__ import annotations

from typing import assert_never

import msgspec

from shared import subjects
from shared.core.admission import (
    admit_round,
    admit_session,
    admit_ttft,
    check_open,
    check_round,
    check_tokens,
    explain_no_placement,
)
from shared.core.commands import EncodeInput, Reply
from shared.core.endings import close_session, stop_round
from shared.core.events import ClientRequested, InputEncoded, InputRefused
from shared.core.inspection import describe_session, read_round
from shared.core.placement import Placement, bind_session, choose_placement, occupy_workers
from shared.core.records import RoundStartedEntry, SessionOpenedEntry
from shared.core.session import HeldRequest, Session
from shared.core.state import State
from shared.core.token_bytes import count_tokens
from shared.core.types import SessionKey
from shared.errors import AmpdError, ErrorCode
from shared.messages import (
    CancelRound,
    CloseSession,
    ErrorReply,
    InspectSession,
    OpenSession,
    ReadRound,
    RoundAccepted,
    RoundCancelled,
    SessionOpened,
    SubmitRound,
    TokensInput,
)

CANCELLED_BY_CLIENT = ErrorReply(code=ErrorCode.CANCELLED, message="the client cancelled the round")


def handle_request(state: State, held: HeldRequest) -> None:
    """Answer a request, hold it, or start what its answer waits for."""
    event = held.event
    try:
        if isinstance(event.request, OpenSession):
            _open_session(state, held, event.request)
            return
        session = state.sessions.get(event.key)
        if session is None:
            message = f"session {event.key.session!r} is not open: open it first"
            raise AmpdError(ErrorCode.UNKNOWN_SESSION, message)
        session.last_active_at = state.now
        match event.request:
            case SubmitRound():
                _submit_round(state, held, session, event.request)
            case CancelRound():
                _cancel_round(state, event, session, event.request)
            case CloseSession():
                close_session(state, session, event.request_id)
            case InspectSession():
                state.emit(Reply(request_id=event.request_id, message=describe_session(session, event.request)))
            case ReadRound():
                state.emit(read_round(session, event.request_id, event.request))
            case _:
                assert_never(event.request)
    except AmpdError as error:
        state.refuse(event.request_id, error.code, error.message, retry_after_s=error.retry_after_s)


def _hold_until(state: State, held: HeldRequest, until: float, instead: AmpdError) -> None:
    """Hold the request if there is time and room left for it; otherwise raise `instead`."""
    held.until = min(held.until, until)
    if isinstance(held.event.request, SubmitRound):
        held.until = min(held.until, held.received_at + held.event.request.deadline_s)
    if state.now >= held.until or not state.hold(held):
        raise instead


# ---------------------------------------------------------------------------------- open


def _open_session(state: State, held: HeldRequest, request: OpenSession) -> None:
    check_open(state, request)
    key, request_id = held.event.key, held.event.request_id
    session = state.sessions.get(key)
    if session is not None:
        if session.closing:
            closing = AmpdError(ErrorCode.SESSION_CLOSED, "the session is being closed: open it again later")
            _hold_until(state, held, held.until, closing)
            return
        if (session.opened.slo, session.opened.idle_timeout_s) != (request.slo, request.idle_timeout_s):
            message = f"session {key.session!r} is open with other options: close it, or choose another id"
            raise AmpdError(ErrorCode.SESSION_EXISTS, message)
        _reply_when_recorded(state, session, SessionOpenedEntry, Reply(request_id=request_id, message=_opened(session)))
        return
    admit_session(state, key.tenant)
    workers = state.fleet.list_decode(None, state.now)
    if not workers:
        _hold_until(state, held, state.grace_until, explain_no_placement(state, "", 0))
        return
    # Of several models the one with the most decode workers; a session stays with its model.
    models = [worker.heartbeat.model for worker in workers]
    heartbeat = max(workers, key=lambda worker: models.count(worker.heartbeat.model)).heartbeat
    session = Session(
        key=key,
        opened=SessionOpenedEntry(
            model=heartbeat.model,
            max_context_tokens=heartbeat.max_context_tokens,
            vocab_size=heartbeat.vocab_size,
            slo=request.slo,
            idle_timeout_s=request.idle_timeout_s,
        ),
        rounds_kept=state.config.rounds_kept,
        last_active_at=state.now,
        opened_at=state.now,
    )
    state.add_session(session)
    pending = state.append(session, session.opened)
    pending.then.append(Reply(request_id=request_id, message=_opened(session)))
    state.set_timer(session)
    state.counters["sessions_opened"] += 1


def _opened(session: Session) -> SessionOpened:
    return SessionOpened(
        session=session.key.session,
        model=session.opened.model,
        max_context_tokens=session.opened.max_context_tokens,
        vocab_size=session.opened.vocab_size,
    )


def _reply_when_recorded(
    state: State, session: Session, kind: type[SessionOpenedEntry | RoundStartedEntry], reply: Reply
) -> None:
    """Answer now, or with the entry of this kind that is still on its way into the record."""
    for pending in session.outbox:
        if isinstance(pending.entry, kind):
            pending.then.append(reply)
            return
    state.emit(reply)


# --------------------------------------------------------------------------------- round


def _submit_round(state: State, held: HeldRequest, session: Session, request: SubmitRound) -> None:
    event = held.event
    if session.closing:
        raise AmpdError(ErrorCode.SESSION_CLOSED, "the session is being closed: open a new one")
    if _answer_repeat(state, session, event, request):
        return
    if session.encoding is not None or session.in_flight is not None:
        in_flight = AmpdError(
            ErrorCode.ROUND_IN_FLIGHT,
            f"round {session.num_rounds - 1} is in flight: wait for its last message, or cancel it",
        )
        if session.in_flight is not None and not session.in_flight.is_ending:
            raise in_flight
        _hold_until(state, held, held.until, in_flight)
        return
    check_round(state, session, request)
    if isinstance(request.input, TokensInput):
        assert isinstance(request.input.token_ids, bytes)
        _start_round(state, session, held, request, request.input.token_ids)
        return
    session.encoding = held
    state.emit(
        EncodeInput(
            request_id=event.request_id,
            key=session.key,
            input=request.input,
            last_token_id=session.last_token_id,
        )
    )


def on_input_encoded(state: State, event: InputEncoded | InputRefused) -> None:
    session = state.sessions.get(event.key)
    if session is None or session.encoding is None or session.encoding.event.request_id != event.request_id:
        return  # answered when the session closed
    held, session.encoding = session.encoding, None
    request = held.event.request
    assert isinstance(request, SubmitRound)
    try:
        if isinstance(event, InputRefused):
            error = event.error
            raise AmpdError(error.code, error.message, retry_after_s=error.retry_after_s)
        _start_round(state, session, held, request, event.token_ids)
    except AmpdError as error:
        state.refuse(event.request_id, error.code, error.message, retry_after_s=error.retry_after_s)
    state.release_held(session.key)


def _answer_repeat(state: State, session: Session, event: ClientRequested, request: SubmitRound) -> bool:
    """The same idempotency key again: the first answer again, or a conflict. False: the key is new."""
    index = session.round_of_key.get(request.idempotency_key) if request.idempotency_key else None
    if index is None:
        return False
    running = session.in_flight
    if running is not None and running.index == index:
        digest, num_history, num_input = running.started.digest, session.num_tokens, running.num_input_tokens
    else:
        ended = session.rounds[index]
        digest, num_history, num_input = ended.digest, ended.num_history_tokens, ended.num_input_tokens
    if digest != event.digest:
        message = f"idempotency_key {request.idempotency_key!r} was used for round {index} with other content"
        raise AmpdError(ErrorCode.IDEMPOTENCY_CONFLICT, message)
    reply = Reply(request_id=event.request_id, message=_accepted(session.key, index, num_history, num_input))
    _reply_when_recorded(state, session, RoundStartedEntry, reply)
    return True


def _accepted(key: SessionKey, index: int, num_history: int, num_input: int) -> RoundAccepted:
    return RoundAccepted(
        session=key.session,
        round=index,
        stream=subjects.round_stream(key.tenant, key.session, index),
        num_history_tokens=num_history,
        num_input_tokens=num_input,
    )


def _start_round(state: State, session: Session, held: HeldRequest, request: SubmitRound, token_ids: bytes) -> None:
    """Place the round, record it; its workers are commanded and the client is answered when the record has it."""
    check_tokens(session, request, token_ids)
    if state.now >= held.received_at + request.deadline_s:
        raise AmpdError(ErrorCode.DEADLINE_EXCEEDED, "the round could not be started within its deadline_s")
    admit_round(state)
    if _may_appear(state, session):
        unheard = explain_no_placement(state, session.opened.model, 0)
        _hold_until(state, held, state.grace_until, unheard)
        return
    slo = request.slo or session.opened.slo
    num_input = count_tokens(token_ids)
    num_needed = session.num_tokens + num_input + request.stop.max_output_tokens
    waited_s = state.now - held.received_at
    placement = choose_placement(
        state, session, num_new_tokens=num_input, num_needed_tokens=num_needed, slo=slo, waited_s=waited_s
    )
    if placement is None:
        refusal = explain_no_placement(state, session.opened.model, num_needed)
        if refusal.code == ErrorCode.NO_DECODE_WORKER:
            _hold_until(state, held, state.grace_until, refusal)
            return
        raise refusal
    if session.num_rounds == 0:
        admit_ttft(state, placement.decision, slo, waited_s)
    bind_session(state, session, placement)
    _record_round(state, session, held, request, token_ids, placement)


def _may_appear(state: State, session: Session) -> bool:
    """The session's worker has not been heard of since this coordinator started, but still may be."""
    ref = session.last_decode
    return (
        state.now < state.grace_until
        and session.binding is None
        and ref is not None
        and state.fleet.find(ref) is None
        and not state.fleet.has_replaced(ref)
    )


def _record_round(
    state: State,
    session: Session,
    held: HeldRequest,
    request: SubmitRound,
    token_ids: bytes,
    placement: Placement,
) -> None:
    event = held.event
    sampling = request.sampling
    if sampling.temperature > 0 and sampling.seed is None:
        sampling = msgspec.structs.replace(sampling, seed=event.random_seed)
    delay_s = None if session.last_ended_at is None else state.now - session.last_ended_at
    num_history = session.num_tokens
    pending = state.append(
        session,
        RoundStartedEntry(
            round=session.num_rounds,
            idempotency_key=request.idempotency_key,
            digest=event.digest,
            input_token_ids=token_ids,
            sampling=sampling,
            stop=request.stop,
            slo=request.slo or session.opened.slo,
            deadline_s=request.deadline_s,
            stream_encoding=request.stream_encoding or event.encoding,
            decode=placement.decode.ref,
            prefill=placement.prefill.ref if placement.prefill is not None else None,
        ),
    )
    running = session.in_flight
    assert running is not None
    running.received_at = held.received_at
    running.deadline_at = running.received_at + request.deadline_s
    running.delay_s = delay_s
    state.num_rounds_in_flight += 1
    state.counters["rounds_accepted"] += 1
    occupy_workers(state, session, placement)
    reply = _accepted(session.key, running.index, num_history, running.num_input_tokens)
    pending.then.append(Reply(request_id=event.request_id, message=reply))
    state.set_timer(session)


# -------------------------------------------------------------------------------- cancel


def _cancel_round(state: State, event: ClientRequested, session: Session, request: CancelRound) -> None:
    running = session.in_flight
    if request.round is not None and not 0 <= request.round < session.num_rounds:
        message = f"round {request.round} does not exist: the session has {session.num_rounds}"
        raise AmpdError(ErrorCode.UNKNOWN_ROUND, message)
    if running is None or request.round not in (None, running.index):
        reply = RoundCancelled(session=session.key.session, round=request.round, cancelled=False)
        state.emit(Reply(request_id=event.request_id, message=reply))
        return
    running.cancel_requests.append(event.request_id)
    stop_round(state, session, CANCELLED_BY_CLIENT)
