"""What workers tell on their own: heartbeats, reports of ended work, and tokens on the streams."""

from __future__ import annotations

from typing import assert_never

from shared.core.attempts import (
    KV_FAILURES,
    RETRYABLE,
    begin_decoding,
    lose_worker,
    start_next_attempt,
)
from shared.core.commands import AcknowledgeEvent
from shared.core.endings import fail_round, finish_from_stream, finish_round
from shared.core.events import HeartbeatSeen, StreamSeen, WorkerReported
from shared.core.records import RoundEndedEntry, WorkerRef
from shared.core.recovery import reconcile_rounds
from shared.core.residency import note_held, note_prefilled
from shared.core.role_changes import note_role
from shared.core.session import RoundInFlight, Session
from shared.core.staging import begin_staging, on_kv_staged
from shared.core.state import State
from shared.core.stream_output import may_end_round
from shared.core.types import SessionKey
from shared.errors import ErrorCode
from shared.messages import ErrorReply, KvStaged, PrefillEnded, RoundEnded, WorkerLeaving


def on_heartbeat(state: State, event: HeartbeatSeen) -> None:
    worker, replaced = state.fleet.note_heartbeat(event.heartbeat, state.now)
    if replaced is not None:
        lose_worker(state, replaced)
    if worker is None:
        return
    note_role(state, worker)
    note_held(state, worker, event.heartbeat.kv_held)
    for key in sorted(state.owed_drops.pop(worker.ref, ())):
        if state.is_held_at(worker.ref, key):
            state.settle_drop(worker.ref, key)
        else:
            state.drop_at(worker.ref, key)
    if state.reconciling:
        reconcile_rounds(state)
    if state.now < state.grace_until:
        for key in state.held:
            state.release_held(key)


# ------------------------------------------------------------------------------- reports


def on_worker_report(state: State, event: WorkerReported) -> None:
    match event.report:
        case RoundEnded():
            _on_round_ended(state, event.ack_id, event.report)
        case PrefillEnded():
            state.acknowledge(event.ack_id)
            _on_prefill_ended(state, event.report)
        case KvStaged():
            state.acknowledge(event.ack_id)
            on_kv_staged(state, event.report)
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
    ref = WorkerRef(report.worker_id, report.incarnation)
    session = state.sessions.get(SessionKey(report.tenant, report.session))
    if session is None:
        return
    note_prefilled(state, session, report)
    running = session.in_flight
    if running is None:
        begin_staging(state, session)  # the report was overtaken by the end of its round
        return
    if running.prefill != ref:
        return
    if (running.index, running.attempt) != (report.round, report.attempt):
        return
    running.prefill_ended = True
    worker = state.fleet.find(ref)
    if worker is not None:
        worker.load.end_prefill(session.key, state.now)
    if report.error is None:
        return
    if running.phase in ("starting", "prefilling", "reconciling"):
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
        begin_decoding(state, session, running)
    if may_end_round(event.payloads[-1]) and running.output.is_complete:
        finish_from_stream(state, session)
