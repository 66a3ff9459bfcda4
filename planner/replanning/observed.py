"""The workload of the last minutes, as the program wants it: rounds that were seen, by session."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from planner.planning.workload_model import RoundShape, WorkloadModel

WINDOW_S = 120.0
MAX_ROUNDS = 20_000  # remembered at most: above that the window is shorter
MIN_ROUNDS = 50  # before anything is said about the workload


@dataclass(frozen=True, slots=True)
class SeenRound:
    session: str
    ended_at: float
    shape: RoundShape
    on_time: bool = True


class ObservedWorkload:
    """A sliding window over ended rounds. Pure: times are arguments.

    A session of which only some rounds lie in the window is a shorter session there, so that tokens and work per second
    are those observed; rates of sessions are those of such parts.
    """

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._rounds: deque[SeenRound] = deque(maxlen=MAX_ROUNDS)
        self._began_at: float | None = None

    def add(self, session: str, shape: RoundShape, now: float, *, on_time: bool = True) -> None:
        if self._began_at is None:
            self._began_at = now
        self._rounds.append(SeenRound(session, now, shape, on_time))

    def model(self, now: float) -> WorkloadModel | None:
        """None as long as too little has been seen."""
        self._forget(now)
        if len(self._rounds) < MIN_ROUNDS or self._began_at is None:
            return None
        parts: dict[str, list[RoundShape]] = {}
        for one in self._rounds:
            parts.setdefault(one.session, []).append(one.shape)
        is_full = len(self._rounds) == MAX_ROUNDS
        since = self._rounds[0].ended_at if is_full else max(self._began_at, now - self._window_s)
        seen_s = now - since
        if seen_s <= 0.0:
            return None
        return WorkloadModel(
            sessions=tuple(tuple(shapes) for shapes in parts.values()), sessions_per_s=len(parts) / seen_s
        )

    def attainment(self, now: float) -> float:
        """Share of the rounds that met their objectives; 1 where there are none."""
        self._forget(now)
        return sum(one.on_time for one in self._rounds) / len(self._rounds) if self._rounds else 1.0

    def _forget(self, now: float) -> None:
        while self._rounds and self._rounds[0].ended_at < now - self._window_s:
            self._rounds.popleft()
