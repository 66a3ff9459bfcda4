"""The attempts of a round: how the workers of each are commanded, and what follows when one fails."""

from __future__ import annotations

from shared.core.endings import cancel_at_workers, fail_round, finish_from_stream
from shared.core.fleet import WorkerState
from shared.core.moving import ask_for_history, end_move, undo_move
from shared.core.placement import bind_session, choose_placement, count_prefill, occupy_workers
from shared.core.records import AttemptStartedEntry, WorkerRef
from shared.core.residency import describe_resident, doubt_worker, expect_resident
from shared.core.session import HeldKv, RoundInFlight, Session
from shared.core.state import State, needed_growth
from shared.core.token_bytes import TOKEN_BYTES, count_tokens
from shared.errors import ErrorCode
from shared.messages import ErrorReply, HistoryGranted, PrefillTask, RemotePrefill, RunRound, RunRoundAck

# A new attempt may go better: elsewhere, later, or with the KV computed again.
RETRYABLE = frozenset(
    {
        ErrorCode.WORKER_LOST,
        ErrorCode.WRONG_INCARNATION,
        ErrorCode.STALE_ATTEMPT,
        ErrorCode.OUT_OF_BLOCKS,
        ErrorCode.NO_CAPACITY,
        ErrorCode.OVERLOADED,
        ErrorCode.DRAINING,
        ErrorCode.KV_TRANSFER_FAILED,
        ErrorCode.KV_LEASE_INVALID,
        ErrorCode.KV_TICKET_INVALID,
        ErrorCode.KV_LAYOUT_MISMATCH,
        ErrorCode.BUS_UNAVAILABLE,
        ErrorCode.INTERNAL,
    }
)
KV_FAILURES = frozenset(
    {
        ErrorCode.KV_TRANSFER_FAILED,
        ErrorCode.KV_LEASE_INVALID,
        ErrorCode.KV_TICKET_INVALID,
        ErrorCode.KV_LAYOUT_MISMATCH,
    }
)
MAX_REMOTE_FAILURES = 2  # then the prefill runs on the decode worker
BACKOFF_FACTOR = 4.0


# --------------------------------------------------------------------------- commanding


def command_decode_worker(state: State, session: Session) -> None:
    """The attempt is recorded: tell the decode worker, if it still lives."""
    running = session.in_flight
    assert running is not None
    worker = state.fleet.find(running.decode)
    lost = running.decode if worker is None else running.prefill
    if worker is None or (running.prefill is not None and state.fleet.find(running.prefill) is None):
        assert lost is not None
        running.phase = "starting"
        start_next_attempt(state, session, lost_worker_error(lost.worker_id), avoid=lost.worker_id)
        return
    if running.phase != "reconciling":
        running.phase = "starting"
    if running.move is not None and not running.move.is_settled:
        ask_for_history(state, session, running.move)
        if not running.move.is_settled:
            return
    _send_run_round(state, session, running, worker)


def note_history(state: State, session: Session, command_id: int, granted: HistoryGranted | None) -> None:
    """The worker that a session leaves lends its KV, or does not (None): the round can start at the new one."""
    running = session.in_flight
    if running is None or running.move is None or running.move.grant_id != command_id or running.move.is_settled:
        return
    move = running.move
    move.is_settled = True
    if granted is not None and granted.history.worker_id == move.source.worker_id:
        move.granted = granted
    else:
        state.counters["moves_without_kv"] += 1
    if running.phase == "starting":
        command_decode_worker(state, session)


def _send_run_round(state: State, session: Session, running: RoundInFlight, worker: WorkerState) -> None:
    assert session.binding is not None
    assert session.binding.worker is worker
    start = min(session.binding.num_known_tokens, session.num_tokens)
    remote = running.prefill
    started = running.started
    granted = running.move.granted if running.move is not None else None
    state.send(
        worker,
        session.key,
        RunRound(
            tenant=session.key.tenant,
            session=session.key.session,
            round=running.index,
            attempt=running.attempt,
            incarnation=worker.incarnation,
            tokens_start=start,
            prefix_checksum=session.checksum_until(start),
            token_ids=session.conversation_from(start),
            num_history_tokens=session.num_tokens,
            num_input_tokens=running.num_input_tokens,
            num_forced_tokens=count_tokens(running.forced),
            sampling=started.sampling,
            stop=started.stop,
            slo=started.slo,
            deadline_s=max(0.0, running.deadline_at - state.now),
            stream_encoding=started.stream_encoding,
            remote=None
            if remote is None
            else RemotePrefill(worker_id=remote.worker_id, incarnation=remote.incarnation),
            waited_s=state.now - running.received_at,
            session_age_s=state.now - session.opened_at,
            source=granted.history if granted is not None else None,
            num_source_tokens=min(granted.num_tokens, session.num_tokens) if granted is not None else 0,
        ),
    )


def note_run_round_ack(state: State, session: Session, ack: RunRoundAck) -> None:
    """The decode worker has the round; a remote prefill can be commanded now."""
    running = session.in_flight
    assert running is not None
    if running.phase not in ("starting", "reconciling"):
        return
    assert session.binding is not None
    session.binding.num_known_tokens = session.num_tokens
    session.held = HeldKv(max(0, ack.num_cached_tokens)).cut(count_prompt(session, running))
    running.output.adopt(ack.output_token_ids)
    running.ended_at_worker = ack.state == "finished"
    state.reconciling.discard(session.key)
    has_output = len(ack.output_token_ids) > len(running.forced)
    running.phase = "decoding" if has_output or running.ended_at_worker else "prefilling"
    if has_output:
        begin_decoding(state, session, running)
    elif running.prefill is None:
        _recount_prefill(state, session, running.decode, ack.num_cached_tokens)
    elif running.prefill is not None and not running.prefill_sent and not running.ended_at_worker:
        _send_prefill_task(state, session, running, ack)
    state.set_timer(session)
    if not running.is_ending:
        state.release_held(session.key)


def _send_prefill_task(state: State, session: Session, running: RoundInFlight, ack: RunRoundAck) -> None:
    assert running.prefill is not None
    if ack.state == "running" and ack.history is None and ack.num_cached_tokens > 0:
        return  # the prefill worker has read the history already: it has the task
    worker = state.fleet.find(running.prefill)
    if worker is None:
        start_next_attempt(
            state, session, lost_worker_error(running.prefill.worker_id), avoid=running.prefill.worker_id
        )
        return
    num_total = count_prompt(session, running)
    reads_history = ack.history is not None and state.config.scheduling.routing.reads_history
    # At least one token is computed: the first output token comes out of it.
    num_cached = min(ack.num_cached_tokens, num_total - 1) if reads_history else 0
    running.prefill_sent = True
    started, keep = running.started, state.config.scheduling.keeps_resident
    resident = describe_resident(session, worker.ref, num_total) if keep else None
    _recount_prefill(state, session, worker.ref, max(num_cached, resident.num_tokens if resident is not None else 0))
    if keep:
        expect_resident(state, session, worker.ref)
    state.send(
        worker,
        session.key,
        PrefillTask(
            tenant=session.key.tenant,
            session=session.key.session,
            round=running.index,
            attempt=running.attempt,
            incarnation=worker.incarnation,
            num_cached_tokens=num_cached,
            token_ids=session.conversation_from(num_cached),
            num_forced_tokens=count_tokens(running.forced),
            sampling=started.sampling,
            slo=started.slo,
            waited_s=state.now - running.received_at,
            deadline_s=max(0.0, running.deadline_at - state.now),
            history=ack.history if num_cached > 0 else None,
            decode_worker=running.decode.worker_id,
            decode_incarnation=running.decode.incarnation,
            prefix_checksum=session.checksum_until(num_cached),
            resident=resident,
            keep=keep,
            session_age_s=state.now - session.opened_at,
        ),
    )


def count_prompt(session: Session, running: RoundInFlight) -> int:
    """Tokens that the prefill of the newest attempt ends with: history, input, forced output."""
    return session.num_tokens + running.num_input_tokens + count_tokens(running.forced)


def _recount_prefill(state: State, session: Session, ref: WorkerRef, num_held: int) -> None:
    """The worker's KV is not what was expected when the prefill was routed: it has more or less to compute."""
    running = session.in_flight
    worker = state.fleet.find(ref)
    assert running is not None
    num_total = count_prompt(session, running)
    num_new = max(1, num_total - num_held)
    if worker is not None and session.key in worker.load.prefills and num_new != running.num_prefill_tokens:
        count_prefill(state, session, worker, num_total=num_total, num_new=num_new)


def begin_decoding(state: State, session: Session, running: RoundInFlight) -> None:
    """The first token is there: the prefill no longer loads its worker, the round joins the decode worker's batch, and
    a session that has moved has arrived."""
    end_prefill(state, session, running)
    end_move(state, session, running)
    worker = state.fleet.find(running.decode)
    if worker is not None and session.key in worker.load.active:
        worker.load.begin_decoding(session.key, count_prompt(session, running))


def end_prefill(state: State, session: Session, running: RoundInFlight) -> None:
    worker = state.fleet.find(running.prefill or running.decode)
    if worker is not None:
        worker.load.end_prefill(session.key, state.now)


# ------------------------------------------------------------------------------- failing


def lost_worker_error(worker_id: str) -> ErrorReply:
    return ErrorReply(code=ErrorCode.WORKER_LOST, message=f"worker {worker_id} is gone")


def lose_worker(state: State, worker: WorkerState) -> None:
    """A worker is gone: every round that it has gets a new attempt. Its idle sessions are bound anew when needed."""
    worker.alive = False
    state.counters["workers_lost"] += 1
    error = lost_worker_error(worker.worker_id)
    doubt_worker(state, worker.ref)
    for key in [*worker.load.active, *worker.load.prefills]:
        session = state.sessions.get(key)
        running = session.in_flight if session is not None else None
        if session is None or running is None:
            continue
        decodes_here = running.decode == worker.ref
        prefills_here = running.prefill == worker.ref and running.phase in ("starting", "prefilling")
        if decodes_here or prefills_here:
            start_next_attempt(state, session, error, avoid=worker.worker_id)


def start_next_attempt(
    state: State, session: Session, error: ErrorReply, *, avoid: str | None = None, remote_failed: bool = False
) -> None:
    """The newest attempt came to nothing because of `error`: try again, or end the round."""
    running = session.in_flight
    assert running is not None
    if running.phase in ("recording", "waiting"):
        return  # the next attempt is on its way; it looks at its workers before it starts
    if running.output.is_complete:
        finish_from_stream(state, session)
        return
    if running.phase == "stopping":
        assert running.stop_reason is not None
        fail_round(state, session, running.stop_reason)
        return
    if running.attempt >= state.config.max_attempts:
        fail_round(state, session, error)
        return
    if avoid is not None:
        running.avoid.add(avoid)
    running.num_remote_failures += remote_failed
    state.counters["attempts_failed"] += 1
    cancel_at_workers(state, session)
    state.leave_workers(session)
    undo_move(state, session, running)
    state.reconciling.discard(session.key)
    running.phase = "waiting"
    running.no_worker_since = None
    config = state.config
    backoff_s = (
        0.0
        if running.attempt == 1
        else min(config.last_backoff_s, config.first_backoff_s * BACKOFF_FACTOR ** (running.attempt - 2))
    )
    running.not_before = state.now + backoff_s
    if backoff_s == 0.0:
        place_next_attempt(state, session)
    else:
        state.set_timer(session)


def place_next_attempt(state: State, session: Session) -> None:
    """A waiting round's time has come: place it, with what the client has seen as forced prefix, and record that.

    All but the last token seen: it may be the one that ends the round, and it is the worker that ends rounds. It is
    drawn again, the same, and clients know tokens by their index.
    """
    running = session.in_flight
    assert running is not None
    assert running.phase == "waiting"
    forced = running.output.token_ids[:-TOKEN_BYTES]
    placement = choose_placement(
        state,
        session,
        num_new_tokens=running.num_input_tokens + count_tokens(forced),
        num_needed_tokens=session.num_tokens + needed_growth(running),
        slo=running.started.slo,
        waited_s=state.now - running.received_at,
        avoid=running.avoid,
        force_local=running.num_remote_failures >= MAX_REMOTE_FAILURES,
    )
    if placement is None:
        _wait_for_worker(state, session, running)
        return
    bind_session(state, session, placement)
    state.append(
        session,
        AttemptStartedEntry(
            round=running.index,
            attempt=running.attempt + 1,
            forced_token_ids=forced,
            deadline_s=max(0.0, running.deadline_at - state.now),
            decode=placement.decode.ref,
            prefill=placement.prefill.ref if placement.prefill is not None else None,
        ),
    )
    occupy_workers(state, session, placement)
    state.set_timer(session)


def _wait_for_worker(state: State, session: Session, running: RoundInFlight) -> None:
    if running.no_worker_since is None:
        running.no_worker_since = state.now
    if state.now - running.no_worker_since >= state.config.no_worker_patience_s:
        message = f"no decode worker could take the round for {state.config.no_worker_patience_s:g} s: start one"
        fail_round(state, session, ErrorReply(code=ErrorCode.NO_DECODE_WORKER, message=message))
        return
    running.not_before = state.now + state.config.placement_retry_s
    state.set_timer(session)
