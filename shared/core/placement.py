"""Where an attempt runs: binding the session to a decode worker, routing its prefill, counting both."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from shared.core.fleet import WorkerState, choose_decode_worker, fits
from shared.core.routing import POLICIES, RoutingDecision, RoutingView, route_remote
from shared.core.session import Session
from shared.core.state import State, needed_growth
from shared.messages import Slo


@dataclass(frozen=True, slots=True)
class Placement:
    decode: WorkerState
    prefill: WorkerState | None  # None: local
    num_new_tokens: int  # to be prefilled, as expected
    decision: RoutingDecision


def choose_placement(
    state: State,
    session: Session,
    *,
    num_new_tokens: int,
    num_needed_tokens: int,
    slo: Slo,
    avoid: Set[str] = frozenset(),
    force_local: bool = False,
) -> Placement | None:
    """Bind the session if it must be, and route its prefill. None: no decode worker can take it now.

    The binding is sticky while its worker lives, takes work, has not failed this round and can hold it.
    """
    candidates = state.fleet.list_decode(session.opened.model, state.now)
    bound = find_bound_worker(state, session)
    overcommit = state.config.kv_overcommit
    if (
        bound is None
        or bound not in candidates
        or bound.worker_id in avoid
        or not fits(bound, num_needed_tokens, overcommit)
    ):
        bound = choose_decode_worker(candidates, num_needed_tokens, avoid, overcommit)
    if bound is None:
        return None
    _bind(state, session, bound)
    assert session.binding is not None
    num_cached = max(0, min(session.binding.num_known_tokens, session.num_tokens) - 1)
    view = RoutingView(
        num_cached_tokens=num_cached,
        num_new_tokens=session.num_tokens - num_cached + num_new_tokens,
        first_round=session.num_tokens == 0,
        slo=slo,
        decode=bound.load(),
        prefill_workers=[]
        if force_local
        else [worker.load() for worker in state.fleet.list_prefill(bound, avoid, state.now)],
        cost_model=state.cost_model,
    )
    # With no prefill worker every policy is local; route_remote says so in the decision.
    route = POLICIES[state.config.policy] if view.prefill_workers else route_remote
    decision = route(view, state.config.routing)
    prefill = state.fleet.workers[decision.worker_id] if decision.placement == "remote" else None
    return Placement(bound, prefill, view.num_new_tokens, decision)


def find_bound_worker(state: State, session: Session) -> WorkerState | None:
    """The living worker that has the session's KV: as bound, or, after a restart, as recorded."""
    if session.binding is not None:
        return session.binding.worker if session.binding.worker.alive else None
    return state.fleet.find(session.last_decode) if session.last_decode is not None else None


def _bind(state: State, session: Session, worker: WorkerState) -> None:
    if session.binding is not None:
        if session.binding.worker is worker:
            return
        state.unbind(session)
        state.bind(session, worker, 0)
        state.counters["rebinds"] += 1
    else:
        knows = session.last_decode == worker.ref  # bound there before this coordinator started
        if not knows:
            state.unbind(session)
        state.bind(session, worker, session.num_tokens if knows else 0)


def occupy_workers(state: State, session: Session, placement: Placement) -> None:
    """Count the attempt at its workers, from now on until it ends."""
    running = session.in_flight
    assert running is not None
    running.decision = placement.decision
    target = placement.prefill or placement.decode
    target.begin_prefill(session.key, running.attempt, placement.num_new_tokens)
    placement.decode.begin_running(session.key, session.num_tokens + needed_growth(running))
    state.update_promise(session)
    state.counters["prefills_remote" if placement.prefill else "prefills_local"] += 1
