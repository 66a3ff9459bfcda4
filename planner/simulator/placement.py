"""Where each round is prefilled: routing and admission, by the functions of shared/core, and starting again.

A round is placed once when it is sent, and again, as a new attempt, when the worker that has it refuses it or dies.
"""

from __future__ import annotations

from planner.simulator.bindings import Bindings
from planner.simulator.event_heap import EventHeap
from planner.simulator.round_book import Counters, RoundBook
from planner.simulator.rounds import SimRound
from planner.simulator.worker import SimWorker
from shared.core.leaving import route_leaving
from shared.core.patience import measure_excess_wait_s
from shared.core.policies import SchedulingPolicy
from shared.core.routing import RoutingDecision, RoutingView
from shared.messages import Slo

LOCAL_CONTROL_S = 0.002  # from the client's request to the decode worker's queue, and a token back
REMOTE_CONTROL_S = 0.004  # one hop more, and the offer


class Placement:
    def __init__(
        self,
        events: EventHeap,
        bindings: Bindings,
        book: RoundBook,
        counters: Counters,
        policy: SchedulingPolicy,
        slo: Slo,
        admission_factor: float,
        control_scale: float,
    ) -> None:
        self._events = events
        self._bindings = bindings
        self._book = book
        self._counters = counters
        self._policy = policy
        self._slo = slo
        self._admission_factor = admission_factor
        self._local_control_s = LOCAL_CONTROL_S * control_scale
        self._remote_control_s = (LOCAL_CONTROL_S + REMOTE_CONTROL_S) * control_scale

    def place(self, round_: SimRound, now: float, *, local_only: bool = False) -> None:
        """Choose where the round is prefilled and send it there; a new session that would wait too long fails."""
        if not round_.decode.load.takes_decode:
            self._leave(round_, now, local_only=local_only)
            return
        view = self._view(round_, round_.decode, now, local_only=local_only)
        decision = self._policy.route(view, self._policy.routing)
        is_new = round_.index == 0 and round_.attempt == 1
        if self._policy.admission and is_new and self._is_too_late(decision, view):
            self._counters.rejected += 1
            self._book.fail(round_, "overloaded")
            return
        if decision.moves_session:
            self._bindings.move(round_, self._bindings.by_id[decision.worker_id])
            self._counters.moves += 1
        self._begin(round_, decision, view, now)

    def _leave(self, round_: SimRound, now: float, *, local_only: bool) -> None:
        """Its worker no longer decodes: the session is bound elsewhere, and takes its KV along where the policy moves
        sessions."""
        session, home = round_.session, round_.decode
        target = self._bindings.choose(round_.num_prompt + round_.num_produced, now)
        if target is None:
            self._book.fail(round_, "no_worker")
            return
        there = self._view(round_, home, now, local_only=True)
        view = self._view(round_, target, now, local_only=local_only, without=home)
        decision = self._policy.route(view, self._policy.routing)
        with_kv = self._policy.moves_sessions and session in home.memory.entries
        if decision.moves_session:
            target = self._bindings.by_id[decision.worker_id]
        elif with_kv:
            decision = route_leaving(
                view,
                decision,
                home.load,
                num_cached_tokens=there.num_cached_tokens,
                num_restorable_tokens=there.num_restorable_tokens,
                parameters=self._policy.routing,
            )
            with_kv = decision.moves_session
        self._bindings.move(round_, target, with_kv=with_kv)
        if with_kv:
            self._counters.moves += 1
        else:
            self._counters.rebinds += 1
        self._begin(round_, decision, view, now)

    def _begin(self, round_: SimRound, decision: RoutingDecision, view: RoutingView, now: float) -> None:
        """The round goes to the workers that the decision names."""
        chosen = decision.chosen
        round_.decision = decision
        round_.num_cached = view.num_total_tokens - chosen.num_new_tokens
        round_.work_s = chosen.work_s
        round_.placed_at = now
        target = self._bindings.by_id[decision.worker_id]
        round_.decode.load.begin_round(round_.session.key, view.num_needed_tokens)
        target.load.begin_prefill(round_.session.key, chosen.num_new_tokens, chosen.work_s, view.deadline, now)
        if decision.placement == "local":
            self._counters.local += 1
            self._events.at(now + self._local_control_s, self._start_local, (round_, round_.attempt))
        else:
            self._counters.remote += 1
            self._events.at(now + self._remote_control_s, self._start_remote, (round_, round_.attempt, target))

    def _view(
        self, round_: SimRound, decode: SimWorker, now: float, *, local_only: bool, without: SimWorker | None = None
    ) -> RoutingView:
        """`without`: a worker that does not prefill it."""
        session = round_.session
        prefill = [] if local_only else self._bindings.prefill_loads_for(decode)
        if without is not None:
            prefill = [load for load in prefill if load is not without.load]
        kv = decode.memory.entries.get(session)
        total = round_.num_prompt + round_.num_produced
        cached = min(kv.num_tokens, total - 1) if kv is not None else 0
        restorable = min(cached + kv.num_host_tokens, total - 1) if kv is not None else 0
        return RoutingView(
            now=now,
            num_cached_tokens=cached,
            num_total_tokens=total,
            first_round=round_.index == 0,
            slo=self._slo,
            decode=decode.load,
            prefill_workers=prefill,
            num_restorable_tokens=restorable,
            num_needed_tokens=round_.num_prompt + round_.planned.output_tokens,
            movable=self._bindings.movable_from(decode) if self._policy.moves_sessions and not local_only else (),
            resident=session.resident,
            waited_s=now - round_.sent_at,
        )

    def _is_too_late(self, decision: RoutingDecision, view: RoutingView) -> bool:
        return measure_excess_wait_s(decision.options, self._slo, view.waited_s, self._admission_factor) > 0.0

    def _start_local(self, argument: tuple[SimRound, int], now: float) -> None:
        round_, attempt = argument
        if attempt != round_.attempt or round_.error:
            return
        round_.decode.add_local(round_, now)

    def _start_remote(self, argument: tuple[SimRound, int, SimWorker], now: float) -> None:
        round_, attempt, target = argument
        if attempt != round_.attempt or round_.error:
            return
        if not target.alive:
            self.restart(round_, target, now)
            return
        round_.decode.expect_remote(round_)
        target.add_remote(round_, now)

    # ------------------------------------------------------------------- what workers tell of it

    def note_prefilled(self, round_: SimRound, worker: SimWorker, now: float) -> None:
        """A worker's prefill is computed."""
        worker.load.end_prefill(round_.session.key, now)
        if worker is round_.decode:
            self.note_decoding(round_)

    def note_decoding(self, round_: SimRound) -> None:
        round_.decode.load.begin_decoding(round_.session.key, round_.num_prompt + round_.num_produced)

    def place_locally(self, round_: SimRound, worker: SimWorker, now: float) -> None:
        """The prefill worker cannot take it (no room): it is prefilled where it decodes."""
        self._counters.refused_prefills += 1
        worker.load.end_prefill(round_.session.key, now)
        round_.decode.stop_expecting(round_, now)
        round_.attempt += 1
        self.place(round_, now, local_only=True)

    def restart(self, round_: SimRound, dead: SimWorker, now: float) -> None:
        """`dead` has lost what it had of the round: it is placed again."""
        session = round_.session
        round_.attempt += 1
        if round_.decision is not None:
            target = self._bindings.by_id[round_.decision.worker_id]
            target.load.end_prefill(session.key, now)
            if target is not round_.decode:
                target.drop(round_, now)
        if round_.moved_from is not None:
            round_.moved_from.memory.forget(session)
            round_.moved_from = None
        if round_.decode is dead:
            session.num_promised = 0
            self._counters.rebinds += 1
            decode = self._bindings.bind(session, round_.num_prompt + round_.num_produced, now)
            if decode is None:
                self._book.fail(round_, "no_worker")
                return
            round_.decode = decode
            self._bindings.promise(session, round_.num_prompt + round_.planned.output_tokens)
        else:  # its prefill ran there
            round_.decode.stop_expecting(round_, now)
        self.place(round_, now)
