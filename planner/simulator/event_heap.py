"""The simulated clock: what happens when."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

Handler = Callable[[Any, float], None]

PROGRESS_EVERY = 20_000  # events


class EventHeap:
    """Deterministic: events of one time are handled in the order in which they were planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_planned = 0
        self._heap: list[tuple[float, int, Handler, Any]] = []

    def at(self, time: float, handler: Handler, argument: Any) -> None:
        self.num_planned += 1
        heapq.heappush(self._heap, (time, self.num_planned, handler, argument))

    def run(self, goes_on: Callable[[], bool], until_s: float, on_progress: Callable[[], object] | None = None) -> int:
        """Handle events up to `until_s`, while there are any and `goes_on()`; returns how many were handled."""
        heap, pop = self._heap, heapq.heappop
        num_events = 0
        while heap and goes_on():
            now, _, handler, argument = pop(heap)
            if now > until_s:
                break
            self.now = now
            num_events += 1
            handler(argument, now)
            if on_progress is not None and num_events % PROGRESS_EVERY == 0:
                on_progress()
        return num_events
