"""Bringing a prefill's history to its worker: from the worker that the session has left, or from host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.simulator.event_heap import EventHeap
from planner.simulator.kv_memory import SimKv
from planner.simulator.links import Links
from planner.simulator.prefill_queue import SimPrefill

if TYPE_CHECKING:
    from planner.simulator.worker import SimWorker


class HistoryFetcher:
    def __init__(self, worker: SimWorker, events: EventHeap, links: Links) -> None:
        self._worker = worker
        self._memory = worker.memory
        self._events = events
        self._links = links

    def fetch(self, prefill: SimPrefill, now: float) -> bool:
        """Bring the history that is elsewhere. Whether it is on its way now."""
        if prefill.round.moved_from is not None:
            self._fetch_moved(prefill, prefill.round.moved_from, now)
        else:
            self._restore(prefill, now)
        return prefill.is_fetching

    def _fetch_moved(self, prefill: SimPrefill, source: SimWorker, now: float) -> None:
        theirs = source.memory.entries.get(prefill.round.session)
        if theirs is None:
            prefill.round.moved_from = None
            return
        held = prefill.kv.num_tokens + prefill.kv.num_host_tokens  # kept here of earlier rounds
        num_tokens = min(theirs.num_tokens + theirs.num_host_tokens, prefill.stop - 1) - held
        if num_tokens <= 0:
            prefill.round.moved_from = None
            source.let_go(theirs, now)
            return
        if not self._memory.make_room(num_tokens, now):
            return  # tried again when a step is planned
        self._memory.grow(prefill.kv, num_tokens)
        prefill.round.moved_from = None
        prefill.is_fetching = True
        prefill.round.kv_bytes_read += num_tokens * self._worker.costs.kv_bytes_per_token
        begin = source.memory.use_host_link(theirs.num_host_tokens, now) if theirs.num_host_tokens else now
        done_at = self._links.transfer(source, self._worker, num_tokens, begin, begin - now)
        self._events.at(done_at, self._moved, (prefill, source, theirs))

    def _moved(self, argument: tuple[SimPrefill, SimWorker, SimKv], now: float) -> None:
        prefill, source, theirs = argument
        is_whole = source.memory.holds(theirs)
        source.let_go(theirs, now)
        if not is_whole and self._memory.holds(prefill.kv):  # the source died: all is computed again
            self._memory.shrink(prefill.kv, 0)
        self._fetched(prefill, now)

    def _restore(self, prefill: SimPrefill, now: float) -> None:
        kv = prefill.kv
        surplus = kv.num_tokens + kv.num_host_tokens - (prefill.stop - 1)
        if surplus > 0:  # the last token is always computed
            kv.num_host_tokens -= surplus
            self._memory.num_host_used -= surplus
        done_at = self._memory.restore(kv, now) if kv.num_host_tokens > 0 else now
        if done_at is None:
            return  # no room now: tried again when a step is planned
        prefill.is_fetching = True
        self._events.at(done_at, self._fetched, prefill)

    def _fetched(self, prefill: SimPrefill, now: float) -> None:
        prefill.is_fetching = False
        prefill.start = prefill.kv.num_tokens
        prefill.round.transfer_s += now - max(prefill.arrival, prefill.round.placed_at)
        self._worker.segments.look_again(now)
