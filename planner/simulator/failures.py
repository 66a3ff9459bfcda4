"""Workers that die, and come back empty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.simulator.bindings import Bindings
from planner.simulator.event_heap import EventHeap
from planner.simulator.placement import Placement
from planner.simulator.round_book import Counters
from planner.simulator.rounds import SimSession
from planner.simulator.worker import SimWorker


@dataclass(frozen=True, slots=True)
class Failure:
    """The worker at `index` dies at `at` and comes back, empty, after `down_s` (None: never)."""

    index: int
    at: float
    down_s: float | None = None


class Failures:
    def __init__(
        self,
        events: EventHeap,
        workers: Sequence[SimWorker],
        sessions: Sequence[SimSession],
        bindings: Bindings,
        placement: Placement,
        counters: Counters,
    ) -> None:
        self._events = events
        self._workers = workers
        self._sessions = sessions
        self._bindings = bindings
        self._placement = placement
        self._counters = counters

    def fail(self, failure: Failure, now: float) -> None:
        """A worker dies: its rounds start again elsewhere, with what the client has seen as forced prefix."""
        worker = self._workers[failure.index]
        if not worker.alive:
            return
        self._counters.failures += 1
        rounds = worker.fail(now)
        load = worker.load
        for key in list(load.prefills):
            load.end_prefill(key, now)
        for key in list(load.decoding):
            load.end_decoding(key)
        for key in list(load.active):
            load.end_round(key)
        self._bindings.refresh()
        running = {s.running for s in self._sessions if s.running is not None and s.running.decode is worker}
        for round_ in sorted({*rounds, *running}, key=lambda one: (one.sent_at, one.session.index)):
            if round_.finished_at >= 0.0 or round_.error:
                continue
            self._placement.restart(round_, worker, now)
        for session in self._sessions:
            session.resident.pop(load.worker_id, None)
            if session.decode is worker:
                session.decode = None
        load.num_promised_tokens = load.num_sessions = 0
        if failure.down_s is not None:
            self._events.at(now + failure.down_s, self._recover, worker)

    def _recover(self, worker: SimWorker, now: float) -> None:
        worker.alive = True
        self._bindings.refresh()
