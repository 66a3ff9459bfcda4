"""The invariants of the coordinator's state, checked by the tests after each event."""

from __future__ import annotations

from collections import Counter

from shared.core.fleet import WorkerState
from shared.core.state import State, find_due, needed_growth
from shared.messages import DropSession, SetRole


def check_state(state: State) -> None:
    """Raises AssertionError naming the invariant that does not hold."""
    _check_counts(state)
    _check_sessions(state)
    _check_workers(state)
    _check_residency(state)
    _check_drops(state)


def _check_counts(state: State) -> None:
    in_flight = [s for s in state.sessions.values() if s.in_flight is not None]
    assert state.num_rounds_in_flight == len(in_flight), "rounds in flight are counted"
    tenants = Counter(key.tenant for key in state.sessions)
    assert state.sessions_of_tenant == tenants, "sessions of each tenant are counted"
    assert state.num_held == sum(map(len, state.held.values())), "held requests are counted"
    assert all(state.held.values()), "no key without held requests"
    assert not state.purging & state.sessions.keys(), "the record of an open session is not purged"
    assert not state.released, "released requests were looked at"
    reconciling = {s.key for s in in_flight if s.in_flight is not None and s.in_flight.phase == "reconciling"}
    assert state.reconciling == reconciling, "the reconciling set is the rounds in that phase"


def _check_sessions(state: State) -> None:
    timers: dict[tuple[object, float], int] = Counter((key, at) for at, _, key in state.list_timers())
    for session in state.sessions.values():
        running = session.in_flight
        assert session.timer_at is not None, f"{session.key} has a timer"
        assert timers[session.key, session.timer_at] >= 1, f"the timer of {session.key} is in the heap"
        if not session.closing or running is not None or session.append_retry_at is not None:
            assert session.timer_at <= find_due(session), f"the timer of {session.key} is in time"
        assert len(session.history) % 4 == 0, "history is whole tokens"
        if session.closing and running is None:
            assert session.outbox, f"closing {session.key} has its closed entry on the way"
        if session.append_retry_at is not None:
            assert session.outbox, f"{session.key} has an append to try again"
        if running is None:
            continue
        assert running.index == session.num_rounds - 1, "the round in flight is the newest"
        assert 1 <= running.attempt <= state.config.max_attempts, "attempts are bounded"
        if running.phase == "recording":
            assert session.outbox, f"the attempt of {session.key} is on its way into the record"
        if running.phase in ("starting", "prefilling", "decoding"):
            assert session.binding is not None, f"running {session.key} is bound"
            assert session.binding.worker.ref == running.decode, f"{session.key} runs where it is bound"
            assert session.binding.worker.alive, f"{session.key} runs on a living worker"
        assert (running.stop_reason is not None) == (running.phase == "stopping"), "stopping has a reason"


def _check_workers(state: State) -> None:
    promised: Counter[int] = Counter()
    num_bound: Counter[int] = Counter()
    for session in state.sessions.values():
        if session.binding is not None:
            growth = needed_growth(session.in_flight) if session.in_flight is not None else 0
            assert session.binding.num_promised_tokens == session.num_tokens + growth, "promises are up to date"
            promised[id(session.binding.worker)] += session.binding.num_promised_tokens
            num_bound[id(session.binding.worker)] += 1
    for worker in state.fleet.workers.values():
        load = worker.load
        _check_role(state, worker)
        assert load.num_promised_tokens == promised[id(worker)], f"promises of {worker.worker_id} add up"
        assert load.num_sessions == num_bound[id(worker)], f"sessions of {worker.worker_id} are counted"
        assert load.num_active_tokens == sum(load.active.values()), "tokens of rounds in flight add up"
        assert load.num_context_tokens == sum(load.decoding.values()), "contexts add up"
        assert load.num_backlog_tokens == sum(p.num_new_tokens for p in load.prefills.values()), "the backlog adds up"
        assert abs(load.backlog_s - sum(p.work_s for p in load.prefills.values())) < 1e-6, "the backlog's work adds up"
        assert sorted(map(id, load.by_deadline)) == sorted(map(id, load.prefills.values())), "each prefill once"
        assert not load.prefills.keys() & load.decoding.keys(), "a round prefills, then decodes"
        assert load.decoding.keys() <= load.active.keys(), "what decodes runs here"
        for key in [*load.active, *load.prefills]:
            session = state.sessions[key]
            assert session.in_flight is not None, f"{key} at {worker.worker_id} is in flight"
            at = {session.in_flight.decode, session.in_flight.prefill}
            assert worker.ref in at, f"{key} was placed on {worker.worker_id}"


def _check_role(state: State, worker: WorkerState) -> None:
    change = worker.change
    if change is None:
        assert worker.load.role == worker.heartbeat.role, f"{worker.worker_id} has the role that it tells"
        return
    assert worker.load.role == change.role != worker.heartbeat.role, f"{worker.worker_id} takes another role"
    assert len(change.waiting) <= state.config.max_role_waiters, "requests that wait for a role are bounded"
    assert not (change.is_acknowledged and change.waiting), "an acknowledged change has been answered"
    asked = any(c.worker is worker and isinstance(c.message, SetRole) for c in state.pending.values())
    assert asked or change.is_acknowledged, f"{worker.worker_id} has been asked to take its role"


def _check_residency(state: State) -> None:
    for session in state.sessions.values():
        running = session.in_flight
        num_more = needed_growth(running) if running is not None else 0
        assert len(session.resident) <= state.config.max_holders, f"holders of {session.key} are bounded"
        for ref, num_tokens in session.resident.items():
            assert 0 <= num_tokens <= session.num_tokens + num_more, f"{ref.worker_id} holds a part of {session.key}"
        if session.binding is not None:
            assert session.binding.worker.ref not in session.resident, "the decode worker is no holder beside"
        if running is not None and running.move is not None:
            assert running.move.source != running.decode, f"{session.key} moves to another worker"
        assert 0 <= session.held.num_device_tokens <= session.num_tokens + num_more, f"KV of {session.key} is its own"
        assert session.held.num_host_tokens >= 0
    assert len(state.staging) <= state.config.max_staging_in_flight, "staging is bounded"
    assert state.staging.keys() <= state.sessions.keys(), "staged sessions are open"
    assert len(state.explained) <= state.config.closed_explained, "explanations are bounded"


def _check_drops(state: State) -> None:
    unconfirmed = {(ref, key) for key, refs in state.dropping.items() for ref in refs}
    owed = {(ref, key) for ref, keys in state.owed_drops.items() for key in keys}
    sent = {(c.worker.ref, c.key) for c in state.pending.values() if isinstance(c.message, DropSession)}
    assert all(state.dropping.values()), "no key without workers that drop it"
    assert all(state.owed_drops.values()), "no worker without drops that it owes"
    assert owed <= unconfirmed <= owed | sent, "a drop that is not confirmed is on its way, or owed"
    assert state.purging <= state.dropping.keys(), "a record that is kept has workers to drop the session"
