"""What the planner knows of the workload: totals since the beginning, windows of the last minute, and each worker's
newest heartbeat. Pure: `now` is an argument, in monotonic seconds.
"""

from __future__ import annotations

import math

import msgspec

from shared.core.windows import SlidingWindow
from shared.messages import Heartbeat, PlannerStats, RoundObserved

WINDOW_S = 60.0
MAX_OBSERVATIONS = 65_536  # of each window: above a thousand rounds a second the oldest fall out early
WORKER_FORGOTTEN_S = 30.0  # a worker silent for this long is no longer listed
MAX_WORKERS = 1024  # a flood of worker ids cannot grow the table without end


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over every round observed, carried over restarts of the planner."""

    num_rounds: int
    num_failed: int
    num_attained: int
    num_local: int
    num_remote: int
    kv_bytes_moved: int


NOTHING_YET = Totals(num_rounds=0, num_failed=0, num_attained=0, num_local=0, num_remote=0, kv_bytes_moved=0)


class Collector:
    """Feed it heartbeats and observed rounds; ask it for `stats`."""

    def __init__(self, totals: Totals, now: float) -> None:
        self.totals = totals
        self._started = now
        self._rounds = SlidingWindow(WINDOW_S, MAX_OBSERVATIONS)
        self._input_tokens = SlidingWindow(WINDOW_S, MAX_OBSERVATIONS)
        self._output_tokens = SlidingWindow(WINDOW_S, MAX_OBSERVATIONS)
        self._delay_s = SlidingWindow(WINDOW_S, MAX_OBSERVATIONS)
        self._ttft_s = SlidingWindow(WINDOW_S, MAX_OBSERVATIONS)
        self._tpot_s = SlidingWindow(WINDOW_S, MAX_OBSERVATIONS)
        self._workers: dict[str, tuple[float, Heartbeat]] = {}

    def on_heartbeat(self, beat: Heartbeat, now: float) -> None:
        """Keep the newest of each worker: one that was overtaken on the way (same life, lower seq) is dropped."""
        known = self._workers.get(beat.worker_id)
        if known is None:
            self._forget_silent_workers(now)
            if len(self._workers) >= MAX_WORKERS:
                return
        elif known[1].incarnation == beat.incarnation and known[1].seq > beat.seq:
            return
        self._workers[beat.worker_id] = (now, beat)

    def on_round(self, observed: RoundObserved, now: float) -> None:
        """Count one ended round. One that failed has no usage: it counts as offered and not attained."""
        usage = observed.usage
        self.totals = Totals(
            num_rounds=self.totals.num_rounds + 1,
            num_failed=self.totals.num_failed + (observed.error is not None),
            num_attained=self.totals.num_attained + attains_slo(observed),
            num_local=self.totals.num_local + (usage is not None and usage.prefill == "local"),
            num_remote=self.totals.num_remote + (usage is not None and usage.prefill == "remote"),
            kv_bytes_moved=self.totals.kv_bytes_moved + (usage.kv_bytes_moved if usage is not None else 0),
        )
        self._rounds.add(now, 1.0)
        for window, value in (
            (self._input_tokens, usage.num_input_tokens if usage is not None else None),
            (self._output_tokens, usage.num_output_tokens if usage is not None else None),
            (self._delay_s, observed.delay_s),
            (self._ttft_s, observed.ttft_s),
            (self._tpot_s, observed.tpot_s),
        ):
            if value is not None and math.isfinite(value):
                window.add(now, value)

    def stats(self, now: float) -> PlannerStats:
        self._forget_silent_workers(now)
        uptime_s = now - self._started
        observed_s = min(uptime_s, WINDOW_S)
        num_recent = self._rounds.stats(now).count
        return PlannerStats(
            uptime_s=uptime_s,
            **msgspec.structs.asdict(self.totals),
            rounds_per_s=num_recent / observed_s if observed_s > 0 else 0.0,
            input_tokens=self._input_tokens.stats(now),
            output_tokens=self._output_tokens.stats(now),
            delay_s=self._delay_s.stats(now),
            ttft_s=self._ttft_s.stats(now),
            tpot_s=self._tpot_s.stats(now),
            workers=tuple(beat for _, beat in self._workers.values()),
        )

    def _forget_silent_workers(self, now: float) -> None:
        self._workers = {
            worker_id: (seen, beat)
            for worker_id, (seen, beat) in self._workers.items()
            if now - seen <= WORKER_FORGOTTEN_S
        }


def attains_slo(observed: RoundObserved) -> bool:
    """TTFT and TPOT within the objectives (docs/glossary.md). A round of one output token has no TPOT to miss."""
    return (
        observed.error is None
        and observed.ttft_s is not None
        and observed.ttft_s <= observed.slo.ttft_s
        and (observed.tpot_s is None or observed.tpot_s <= observed.slo.itl_s)
    )
