"""Workers that take another role while the simulation runs. What they have goes on; sessions leave a worker that no
longer decodes with their next round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.simulator.bindings import Bindings
from planner.simulator.event_heap import EventHeap
from planner.simulator.round_book import Counters
from planner.simulator.worker import SimWorker
from shared.errors import AmpdError, ErrorCode
from shared.messages import Role


@dataclass(frozen=True, slots=True)
class RoleChange:
    """`worker`, an index or an id, takes `role` at `at`. An id stays what it was: prefill-000 may decode."""

    worker: int | str
    role: Role
    at: float


class RoleChanges:
    def __init__(self, events: EventHeap, workers: Sequence[SimWorker], bindings: Bindings, counters: Counters) -> None:
        self._events = events
        self._workers = workers
        self._bindings = bindings
        self._counters = counters

    def plan(self, change: RoleChange) -> None:
        """Raises AmpdError INVALID_REQUEST when there is no such worker."""
        self._events.at(change.at, self._change, (self._find(change.worker), change.role))

    def _find(self, which: int | str) -> SimWorker:
        worker = self._bindings.by_id.get(which) if isinstance(which, str) else None
        if isinstance(which, int) and 0 <= which < len(self._workers):
            worker = self._workers[which]
        if worker is None:
            known = ", ".join(f"{one.index} ({one.load.worker_id})" for one in self._workers)
            raise AmpdError(ErrorCode.INVALID_REQUEST, f"no worker {which!r} takes a role: there are {known}")
        return worker

    def _change(self, argument: tuple[SimWorker, Role], now: float) -> None:
        """Refused, as by the live coordinator, of a dead worker and where nobody would be left to decode."""
        worker, role = argument
        others = any(one.alive and one.load.takes_decode for one in self._workers if one is not worker)
        if not worker.alive or (role == "prefill" and worker.load.takes_decode and not others):
            self._counters.role_changes_refused += 1
        elif worker.load.role != role:
            worker.load.role = role
            self._bindings.refresh()
            self._counters.role_changes += 1
