"""Which workers hold how much of a session's KV: what the coordinator believes, of the decode worker in `Session.held`,
of prefill workers in `Session.resident`.

A prefill worker is believed to hold positions [0, n) of the conversation; with n = 0 it has had a prefill of the
session and may hold something or nothing: nothing counts on it, but the session is dropped there too when it closes.
Belief may be wrong at any time (reports are repeated and overtake one another, heartbeats are lost): a checksum goes
with each task, and a decode worker says itself what it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shared.core.fleet import WorkerState
from shared.core.records import AttemptStartedEntry, RecordEntry, RoundStartedEntry, WorkerRef
from shared.core.session import HeldKv, Session
from shared.core.state import State
from shared.core.types import SessionKey
from shared.messages import KvHeld, PrefillEnded, ResidentKv


def lives_at(session: Session, ref: WorkerRef) -> bool:
    """Whether it is the session's decode worker: as bound, or, after a restart, as recorded."""
    return session.binding.worker.ref == ref if session.binding is not None else session.last_decode == ref


def find_held(session: Session, ref: WorkerRef) -> HeldKv:
    """KV that a worker can go on from when the session decodes there: its own, or what it has kept of a prefill."""
    return session.held if lives_at(session, ref) else HeldKv(session.resident.get(ref, 0))


def list_resident(state: State, session: Session) -> dict[str, int]:
    """Tokens by worker id, of the living workers that are believed to hold any."""
    return {
        ref.worker_id: num_tokens
        for ref, num_tokens in session.resident.items()
        if num_tokens > 0 and state.fleet.find(ref) is not None
    }


def describe_resident(session: Session, ref: WorkerRef, num_total: int) -> ResidentKv | None:
    """What a prefill of `num_total` tokens may use at a worker: all but the last token, which is always computed."""
    num_tokens = min(session.resident.get(ref, 0), num_total - 1)
    if num_tokens <= 0:
        return None
    return ResidentKv(num_tokens=num_tokens, checksum=session.checksum_until(num_tokens))


def expect_resident(state: State, session: Session, ref: WorkerRef) -> None:
    """A prefill whose KV is to be kept is on its way to this worker."""
    if ref not in session.resident:
        _add_holder(state, session, ref, 0)


def note_prefilled(state: State, session: Session, report: PrefillEnded) -> None:
    """A prefill has ended: as much of what the worker now holds as is still part of the conversation."""
    num_tokens = report.num_resident_tokens
    running = session.in_flight
    if running is None or running.index != report.round:
        ended = session.rounds.get(report.round)
        if ended is None or ended.error is not None:
            num_tokens = min(num_tokens, ended.num_history_tokens if ended is not None else 0)
    note_resident(state, session, WorkerRef(report.worker_id, report.incarnation), num_tokens)


def note_resident(state: State, session: Session, ref: WorkerRef, num_tokens: int) -> None:
    """The worker holds [0, num_tokens) of the conversation, and nothing if that is 0."""
    if session.binding is not None and session.binding.worker.ref == ref:
        return  # the session itself lives there
    if ref in session.resident:
        session.resident[ref] = max(0, num_tokens)
    elif num_tokens > 0 and state.fleet.find(ref) is not None:
        _add_holder(state, session, ref, num_tokens)


def note_held(state: State, worker: WorkerState, changes: Iterable[KvHeld]) -> None:
    """What a worker has left of idle sessions, after it made room or brought some of it back.

    KV kept of a prefill only shrinks: a failed round's tokens may be part of what the worker means.
    """
    for change in changes:
        session = state.sessions.get(SessionKey(change.tenant, change.session))
        if session is None:
            continue
        held = HeldKv(max(0, change.num_device_tokens), max(0, change.num_host_tokens)).cut(session.num_tokens)
        if lives_at(session, worker.ref):
            session.held = held
        elif worker.ref in session.resident:
            session.resident[worker.ref] = min(session.resident[worker.ref], held.num_tokens)


def truncate_resident(session: Session) -> None:
    """A round has failed: what was held of it is no part of the conversation any more."""
    num_history = session.num_tokens
    for ref, num_tokens in session.resident.items():
        session.resident[ref] = min(num_tokens, num_history)


def doubt_worker(state: State, ref: WorkerRef) -> None:
    """The worker is lost: if it comes back, it may or may not hold what it held."""
    for session in state.sessions.values():
        if ref in session.resident:
            session.resident[ref] = 0


def list_former_holders(session: Session, entries: Sequence[RecordEntry], limit: int) -> list[WorkerRef]:
    """Prefill workers in a record, the newest `limit`, that were never the decode worker: they may hold something. So
    may the one that prefills the round in flight, whatever it was before."""
    placed = [entry for entry in entries if isinstance(entry, RoundStartedEntry | AttemptStartedEntry)]
    decode = {entry.decode for entry in placed}
    if session.in_flight is not None:
        decode.discard(session.in_flight.prefill)
    newest = dict.fromkeys(entry.prefill for entry in reversed(placed) if entry.prefill is not None)
    return [ref for ref in newest if ref not in decode][:limit]


def _add_holder(state: State, session: Session, ref: WorkerRef, num_tokens: int) -> None:
    """Bounded: the holder of least goes, and drops what it has."""
    resident = session.resident
    if len(resident) >= state.config.max_holders:
        running = session.in_flight
        least = min(
            (holder for holder in resident if running is None or holder != running.prefill),
            key=lambda holder: (state.fleet.find(holder) is not None, resident[holder]),
        )
        del resident[least]
        state.drop_at(least, session.key)
        state.counters["holders_dropped"] += 1
    resident[ref] = num_tokens
