"""The mean of what was seen lately: the windowed statistics that a worker's heartbeats carry."""

from __future__ import annotations

from collections import deque


class RollingMean:
    """Mean of the samples of the last `window_s` seconds."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, float, int]] = deque()
        self._total = 0.0
        self._count = 0

    def add(self, now: float, value: float, count: int = 1) -> None:
        self._samples.append((now, value * count, count))
        self._total += value * count
        self._count += count

    def mean(self, now: float) -> tuple[float, int]:
        samples = self._samples
        while samples and samples[0][0] <= now - self._window_s:
            _, total, count = samples.popleft()
            self._total -= total
            self._count -= count
        return (self._total / self._count, self._count) if self._count else (0.0, 0)
