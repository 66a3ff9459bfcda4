"""Prefills of rounds that decode on other workers: a few at a time have their history read and room kept for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.simulator.event_heap import EventHeap
from planner.simulator.links import Links
from planner.simulator.prefill_planner import PrefillPlanner
from planner.simulator.prefill_queue import PrefillQueue, SimPrefill
from shared.core.chunking import may_stage
from shared.core.policies import SchedulingPolicy
from shared.core.reordering import PrefillOrder

if TYPE_CHECKING:
    from planner.simulator.worker import SimWorker


class RemotePrefills:
    def __init__(
        self,
        worker: SimWorker,
        queue: PrefillQueue,
        planner: PrefillPlanner,
        policy: SchedulingPolicy,
        events: EventHeap,
        links: Links,
    ) -> None:
        self.unstaged = queue.unstaged
        self._worker = worker
        self._memory = worker.memory
        self._queue = queue
        self._planner = planner
        self._order = PrefillOrder(policy.order, planner.room)
        self._chunk = policy.chunk
        self._reads_history = policy.routing.reads_history
        self._events = events
        self._links = links
        self._staged: dict[SimPrefill, int] = {}  # with the tokens that each computes

    def add(self, prefill: SimPrefill, now: float) -> None:
        self.unstaged.append(prefill)
        self.stage_next(now)

    def stage_next(self, now: float) -> None:
        """Read the history of the next ones, while there are few here."""
        worker, queue = self._worker, self._queue
        while self.unstaged and may_stage(self._chunk, len(self._staged), sum(self._staged.values())):
            index = self._choose_next(now)
            if index is None:
                if not queue.admitted and worker.batch.size == 0 and not queue.waiting:
                    refused = self.unstaged.pop(0)
                    self._order.forget(refused.waiting)
                    worker.refuse(refused, now)
                    continue
                if worker.segments.running is None:
                    worker.wait_for_room(now)
                return
            prefill = self.unstaged.pop(index)
            queue.begin(prefill)
            self._read_history(prefill, now)

    def _choose_next(self, now: float) -> int | None:
        """The first in order that there is room for."""
        order = self._order
        waiting = [prefill.waiting for prefill in self.unstaged]
        for index in order.order(waiting, now, self._planner.measure_stretch()):
            prefill = self.unstaged[index]
            missing = prefill.num_missing
            needed = missing + order.count_aside(prefill.waiting)
            if self._memory.make_room(self._queue.count_reserved(self._worker.batch.size) + needed, now):
                order.note_begun(prefill.waiting, missing)
                order.note_started(waiting, index)
                order.note_turn(prefill.waiting, prefill.waiting.work_s)
                return index
            if not order.may_be_passed(prefill.waiting, missing):
                break
        return None

    def _read_history(self, prefill: SimPrefill, now: float) -> None:
        """What the decode worker has of it, and this one has not."""
        kv, round_, decode = prefill.kv, prefill.round, prefill.round.decode
        readable = decode.count_readable(round_) if self._reads_history else 0
        num_pulled = max(0, min(readable, prefill.stop - 1) - kv.num_tokens)
        self._memory.grow(kv, num_pulled)
        self._staged[prefill] = prefill.num_missing
        if not num_pulled:
            self._pulled(prefill, now)
            return
        round_.kv_bytes_read += num_pulled * self._worker.costs.kv_bytes_per_token
        done_at = self._links.transfer(decode, self._worker, num_pulled, now, 0.0)
        self._events.at(done_at, self._pulled, prefill)

    def _pulled(self, prefill: SimPrefill, now: float) -> None:
        if prefill not in self._queue.admitted:  # the worker died, or the round started again elsewhere
            return
        self._queue.waiting.append(prefill)
        self._worker.segments.look_again(now)

    def end(self, prefill: SimPrefill) -> None:
        """One that was staged has been computed: the next may be."""
        del self._staged[prefill]

    def drop(self, prefill: SimPrefill) -> None:
        """It starts again elsewhere, wherever it has got to here."""
        if prefill in self.unstaged:
            self.unstaged.remove(prefill)
            self._order.forget(prefill.waiting)
        else:
            del self._queue.admitted[prefill]
            del self._staged[prefill]
        if prefill in self._queue.waiting:
            self._queue.waiting.remove(prefill)

    def clear(self) -> None:
        self.unstaged.clear()
        self._staged.clear()
        self._order = PrefillOrder(self._order.parameters, self._planner.room)
