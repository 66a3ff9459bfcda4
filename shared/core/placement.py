"""Where an attempt runs: choosing the decode worker, routing the prefill, moving the session, counting it all."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import msgspec

from shared.core.fleet import WorkerState, choose_decode_worker, fits
from shared.core.leaving import route_leaving
from shared.core.load import WorkerLoad
from shared.core.records import WorkerRef
from shared.core.residency import find_held, list_resident
from shared.core.routing import RoutingDecision, RoutingView, route_colocated
from shared.core.session import Move, Session
from shared.core.state import State, needed_growth
from shared.messages import Slo

NO_PREFILL_WORKER = "no prefill worker"


@dataclass(frozen=True, slots=True)
class Placement:
    decode: WorkerState
    prefill: WorkerState | None  # None: local
    num_total_tokens: int  # of the conversation with this round's input
    decision: RoutingDecision
    move: Move | None = None  # from the worker that has the session's KV


def choose_placement(
    state: State,
    session: Session,
    *,
    num_new_tokens: int,
    num_needed_tokens: int,
    slo: Slo,
    waited_s: float,
    avoid: Set[str] = frozenset(),
    force_local: bool = False,
) -> Placement | None:
    """The session's decode worker, and where the prefill runs. None: no decode worker can take it now. Changes nothing.

    The binding is sticky while its worker lives, decodes, takes work, has not failed this round and can hold it, unless
    the policy moves the session.
    """
    candidates = state.fleet.list_decode(session.opened.model, state.now)
    home = bound = find_bound_worker(state, session)
    scheduling, overcommit = state.config.scheduling, state.config.kv_overcommit
    if (
        bound is None
        or bound not in candidates
        or bound.worker_id in avoid
        or not fits(bound, num_needed_tokens, overcommit)
    ):
        bound = choose_decode_worker(candidates, num_needed_tokens, avoid, overcommit, scheduling.binding, state.now)
    if bound is None:
        return None
    num_total = session.num_tokens + num_new_tokens
    held = find_held(session, bound.ref).cut(num_total - 1)
    view = RoutingView(
        now=state.now,
        num_cached_tokens=held.num_device_tokens,
        num_restorable_tokens=held.num_tokens,
        num_total_tokens=num_total,
        first_round=session.num_tokens == 0,
        slo=slo,
        decode=bound.load,
        prefill_workers=() if force_local else _list_prefill_loads(state, session, bound, home, avoid),
        movable=()
        if force_local or not scheduling.moves_sessions
        else [w.load for w in candidates if _may_move(w, bound, avoid) and fits(w, num_needed_tokens, overcommit)],
        num_needed_tokens=num_needed_tokens,
        resident=list_resident(state, session) if scheduling.keeps_resident else {},
        waited_s=waited_s,
    )
    decision = scheduling.route(view, scheduling.routing)
    target = state.fleet.workers[decision.worker_id]
    if decision.moves_session:
        return Placement(target, None, num_total, decision, _plan_move(state, session, home, target, avoid))
    move = _plan_move(state, session, home, bound, avoid)
    if move is not None and home is not None:
        kv = move.held.cut(num_total - 1)
        decision = route_leaving(
            view,
            decision,
            home.load,
            num_cached_tokens=kv.num_device_tokens,
            num_restorable_tokens=kv.num_tokens,
            parameters=scheduling.routing,
        )
        if decision.moves_session:
            return Placement(bound, None, num_total, decision, move)
    if not view.prefill_workers and scheduling.route is not route_colocated:
        decision = msgspec.structs.replace(decision, reason=NO_PREFILL_WORKER)
    if decision.placement == "remote":
        return Placement(bound, target, num_total, decision)
    return Placement(bound, None, num_total, decision)


def _may_move(worker: WorkerState, bound: WorkerState, avoid: Set[str]) -> bool:
    return (
        worker is not bound
        and worker.worker_id not in avoid
        and worker.heartbeat.layout_hash == bound.heartbeat.layout_hash
    )


def _plan_move(
    state: State, session: Session, home: WorkerState | None, target: WorkerState, avoid: Set[str]
) -> Move | None:
    """The session is prefilled at `target`: from where its KV comes along. Also when it has to leave `home`, which
    drains, decodes no longer, or has no room for it."""
    if home is None or home is target or not state.config.scheduling.moves_sessions:
        return None
    if home.worker_id in avoid or state.now < home.suspect_until:  # it would not answer
        return None
    held = find_held(session, home.ref)
    if home.heartbeat.layout_hash != target.heartbeat.layout_hash or held.num_tokens == 0:
        return None
    return Move(home.ref, _count_known_tokens(session, home), held)


def _list_prefill_loads(
    state: State, session: Session, bound: WorkerState, home: WorkerState | None, avoid: Set[str]
) -> list[WorkerLoad]:
    """Not the worker that the session leaves, nor one that has yet to drop it: the drop would take the prefill, too."""
    if state.config.scheduling.route is route_colocated:
        return []
    dropping: Set[WorkerRef] = state.dropping.get(session.key, set())
    workers = state.fleet.list_prefill(bound, avoid, state.now)
    loads = [worker.load for worker in workers if worker is not home and worker.ref not in dropping]
    if not state.config.scheduling.fluid_roles:
        loads = [load for load in loads if load.role == "prefill"]
    return loads


def find_bound_worker(state: State, session: Session) -> WorkerState | None:
    """The living worker that has the session's KV: as bound, or, after a restart, as recorded."""
    if session.binding is not None:
        return session.binding.worker if session.binding.worker.alive else None
    return state.fleet.find(session.last_decode) if session.last_decode is not None else None


def _count_known_tokens(session: Session, worker: WorkerState) -> int:
    """Tokens of the session that the worker has, as far as is known."""
    if session.binding is not None:
        return session.binding.num_known_tokens if session.binding.worker is worker else 0
    return session.num_tokens if session.last_decode == worker.ref else 0  # bound before this coordinator started


def bind_session(state: State, session: Session, placement: Placement) -> None:
    """The session's decodes run here from now on. A worker that it leaves drops it: at once, or when the session has
    moved its KV."""
    worker = placement.decode
    num_known_tokens, held = _count_known_tokens(session, worker), find_held(session, worker.ref)
    if placement.move is not None:
        state.release_binding(session)
        state.counters["moves"] += 1
    elif session.binding is not None:
        if session.binding.worker is worker:
            return
        state.unbind(session)
        state.counters["rebinds"] += 1
    elif session.last_decode != worker.ref:
        state.unbind(session)
    state.bind(session, worker, num_known_tokens)
    session.held = held


def occupy_workers(state: State, session: Session, placement: Placement) -> None:
    """Count the attempt at its workers, from now on until it ends."""
    running = session.in_flight
    assert running is not None
    running.decision = placement.decision
    running.move = placement.move
    count_prefill(
        state,
        session,
        placement.prefill or placement.decode,
        num_total=placement.num_total_tokens,
        num_new=placement.decision.chosen.num_new_tokens,
    )
    placement.decode.load.begin_round(session.key, session.num_tokens + needed_growth(running))
    state.update_promise(session)
    state.counters["prefills_remote" if placement.prefill else "prefills_local"] += 1


def count_prefill(state: State, session: Session, worker: WorkerState, *, num_total: int, num_new: int) -> None:
    """The last `num_new` of `num_total` tokens are to be computed at `worker`: its share of the worker's time."""
    running = session.in_flight
    assert running is not None
    load, slo, num_history = worker.load, running.started.slo, num_total - num_new
    running.num_prefill_tokens = num_new
    deadline = running.received_at + slo.ttft_s
    load.begin_prefill(session.key, num_new, load.work_s(num_history, num_new), deadline, state.now)
