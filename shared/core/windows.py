"""Statistics over the last seconds: what heartbeats carry and the paper's routing rule reads (10 s windows)."""

from __future__ import annotations

import math
from collections import deque

from shared.messages import WindowStats


class SlidingWindow:
    """Samples of the last `window_s` seconds, at most `max_samples` of them (the oldest go first)."""

    def __init__(self, window_s: float = 10.0, max_samples: int = 4096) -> None:
        if window_s <= 0 or max_samples < 1:
            raise ValueError(f"need window_s > 0 and max_samples >= 1, got {window_s} and {max_samples}")
        self._window_s = window_s
        self._samples: deque[tuple[float, float]] = deque(maxlen=max_samples)

    def add(self, now: float, value: float) -> None:
        """Add one sample. `now` must not go back."""
        self._samples.append((now, value))

    def stats(self, now: float) -> WindowStats:
        """Count, mean, median and 95th percentile (nearest rank) of the samples younger than the window."""
        oldest = now - self._window_s
        while self._samples and self._samples[0][0] <= oldest:
            self._samples.popleft()
        values = sorted(value for _, value in self._samples)
        if not values:
            return WindowStats(window_s=self._window_s)
        return WindowStats(
            window_s=self._window_s,
            count=len(values),
            mean=math.fsum(values) / len(values),
            p50=values[math.ceil(0.50 * len(values)) - 1],
            p95=values[math.ceil(0.95 * len(values)) - 1],
        )
