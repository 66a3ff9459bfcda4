"""After a restart: fold the records, then find out what became of the rounds that were in flight.

For such a round the same attempt's run_round goes again to the same process as soon as its heartbeat is seen; it
answers `running` or `finished` with the tokens so far, and nothing runs twice. If the process is not heard of
within the grace time, or another runs under its id, the round gets a new attempt.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.core.attempts import command_decode_worker, count_prompt, lost_worker_error, start_next_attempt
from shared.core.events import RecordsLoaded
from shared.core.placement import count_prefill
from shared.core.records import AttemptStartedEntry, RecordEntry, RoundStartedEntry, WorkerRef
from shared.core.residency import list_former_holders
from shared.core.session import HeldKv, Session, fold
from shared.core.state import State, needed_growth


def on_records_loaded(state: State, event: RecordsLoaded) -> None:
    state.grace_until = state.now + state.config.heartbeat_timeout_s
    state.memory_until = state.now + state.config.worker_memory_s
    for record in event.records:
        session = fold(record.key, record.entries, state.config.rounds_kept)
        if session is None:
            state.counters["records_without_beginning"] += 1
            continue
        session.opened_at = state.now
        session.held = HeldKv(max(0, session.num_tokens - 1))  # unless the worker says otherwise
        session.resident = dict.fromkeys(list_former_holders(session, record.entries, state.config.max_holders), 0)
        _drop_at_former_workers(state, session, record.entries)
        if session.closed:
            state.drop_everywhere(session)
            state.purge_when_dropped(record.key)
            continue
        state.add_session(session)
        session.last_active_at = state.now
        if session.in_flight is not None:
            _await_worker(state, session)
        state.set_timer(session)
    state.counters["sessions_recovered"] += len(state.sessions)


def _drop_at_former_workers(state: State, session: Session, entries: Sequence[RecordEntry]) -> None:
    """Workers that the session has left may still hold it: the coordinator before may not have reached them."""
    refs = {entry.decode for entry in entries if isinstance(entry, RoundStartedEntry | AttemptStartedEntry)}
    left = refs - {session.last_decode} - session.resident.keys()
    for ref in sorted(left, key=lambda ref: (ref.worker_id, ref.incarnation)):
        state.drop_at(ref, session.key)


def end_grace(state: State) -> None:
    """Workers that live have been heard of by now: no round waits for the others."""
    if state.reconciling:
        reconcile_rounds(state)


def _await_worker(state: State, session: Session) -> None:
    running = session.in_flight
    assert running is not None
    running.phase = "reconciling"
    running.recovered = True
    running.received_at = state.now
    running.deadline_at = state.now + running.deadline_s
    running.not_before = state.grace_until
    running.output.adopt(running.forced)
    state.num_rounds_in_flight += 1
    state.reconciling.add(session.key)


def reconcile_rounds(state: State) -> None:
    """Look at the rounds whose workers have not been heard of yet."""
    for key in sorted(state.reconciling):
        reconcile_round(state, state.sessions[key])


def reconcile_round(state: State, session: Session) -> None:
    """Ask the round's worker, if it is known to live; give it up when it cannot be the one any more."""
    running = session.in_flight
    assert running is not None
    if session.binding is not None:
        return  # asked already
    grace_is_over = state.now >= state.grace_until
    for ref in (running.decode, running.prefill):
        if ref is None or state.fleet.find(ref) is not None:
            continue
        if grace_is_over or state.fleet.has_replaced(ref):
            start_next_attempt(state, session, lost_worker_error(ref.worker_id), avoid=ref.worker_id)
        return
    _ask_worker(state, session, running.decode)


def _ask_worker(state: State, session: Session, ref: WorkerRef) -> None:
    running = session.in_flight
    assert running is not None
    worker = state.fleet.workers[ref.worker_id]
    state.bind(session, worker, session.num_tokens)
    worker.load.begin_round(session.key, session.num_tokens + needed_growth(running))
    target = worker if running.prefill is None else state.fleet.workers[running.prefill.worker_id]
    num_total = count_prompt(session, running)
    count_prefill(state, session, target, num_total=num_total, num_new=num_total - session.num_tokens)
    state.update_promise(session)
    running.not_before = running.deadline_at
    command_decode_worker(state, session)
