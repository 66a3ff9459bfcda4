"""The rounds that decode on one worker: when each ends, and how long its tokens took.

A step is the same for every sequence of the batch, so its duration is logged once, and a round's gaps are read from the
log when it leaves.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right

from planner.simulator.kv_memory import SimKv
from planner.simulator.rolling_mean import RollingMean
from planner.simulator.rounds import SimRound
from shared.core.batch_limit import Decoding, choose_batch, may_all_decode
from shared.core.policies import SchedulingPolicy
from shared.core.step_costs import StepCosts

MAX_LOG = 50_000  # durations in the step log before those that no sequence needs are dropped


class DecodeBatch:
    """`rounds`: those that decode here, or will when they have been prefilled; in the batch are those with an entry.

    What a sequence has grown by since it joined is in the memory's num_used from the start of each segment, and in its
    KV entry when it leaves.
    """

    def __init__(self, policy: SchedulingPolicy, costs: StepCosts, itl_slo_s: float, max_batch: int) -> None:
        self.rounds: dict[SimRound, SimKv] = {}
        self.joining: list[SimRound] = []  # will be in the batch from the next step on, or when it has a place
        self.size = 0
        self.num_context_tokens = 0
        self.tick = 0  # decode steps so far
        self.paused_s = 0.0  # time since the last decode step that prefills alone have taken
        self.itl = RollingMean(policy.window_s)
        self.is_limited = policy.chunk.limits_batch
        self._costs = costs
        self._itl_slo_s = itl_slo_s
        self._max_batch = max_batch
        self._uses_windows = policy.uses_windows
        self._decoded_at = 0.0  # end of the last decode step
        self._num_entries = 0
        self._finish: list[tuple[int, int, SimRound]] = []  # (tick, entry, round)
        self._log_ticks: list[int] = [0]  # the segment that ends at this tick ...
        self._log_steps_s: list[float] = [0.0]  # ... had steps of this duration

    @property
    def is_full(self) -> bool:
        return self.size >= self._max_batch

    @property
    def mean_context(self) -> float:
        return self.num_context_tokens / self.size if self.size else 0.0

    def begin_joining(self, now: float) -> None:
        """Those that are to decode do so from the next step on, as far as there are places and their objective
        allows."""
        waiting = [round_ for round_ in self.joining if round_ in self.rounds]
        self.joining.clear()
        total = self.size + len(waiting)
        num_tokens = self.num_context_tokens + sum(one.num_prompt + one.num_produced for one in waiting)
        if not self.is_limited or not total or self._has_place_for_all(total, num_tokens):
            num_places = self._max_batch - self.size
            for round_ in waiting[:num_places]:
                self.begin(round_, now)
            self.joining += waiting[num_places:]
            return
        running = [round_ for round_ in self.rounds if round_.entry]
        everyone = [*running, *waiting]
        decoding = [Decoding(one.first_token_at, self._count_produced(one), self._itl_slo_s) for one in everyone]
        fitting = choose_batch(self._costs, decoding, num_tokens / total, now)[: self._max_batch]
        chosen = {everyone[index] for index in fitting}
        for round_ in running:
            if round_ not in chosen:
                self.stop(round_)
                self.joining.append(round_)
        for round_ in waiting:
            if round_ in chosen:
                self.begin(round_, now)
            else:
                self.joining.append(round_)

    def _has_place_for_all(self, num_rounds: int, num_tokens: int) -> bool:
        fits_objective = may_all_decode(self._costs, num_rounds, num_tokens / num_rounds, self._itl_slo_s)
        return num_rounds <= self._max_batch and fits_objective

    def _count_produced(self, round_: SimRound) -> int:
        return round_.num_produced + (self.tick - round_.joined_tick if round_.entry else 0)

    def begin(self, round_: SimRound, now: float) -> None:
        """The round decodes from the next step on, if it is still to decode here."""
        if round_ not in self.rounds:
            return
        self._num_entries += 1
        round_.entry = self._num_entries
        round_.joined_tick = self.tick
        round_.finish_tick = self.tick + round_.planned.output_tokens - round_.num_produced
        if self.size == 0:
            self.paused_s = 0.0
        # its first gap is longer than the batch's by the wait for a step's end, and without pauses before its token
        round_.gaps.append((0, now - round_.last_token_at - self.paused_s))
        heapq.heappush(self._finish, (round_.finish_tick, round_.entry, round_))
        self.size += 1
        self.num_context_tokens += round_.num_prompt + round_.num_produced

    def stop(self, round_: SimRound) -> None:
        """Take a round out of the batch and account for the tokens it has produced there."""
        num_done = self.tick - round_.joined_tick
        self._collect_gaps(round_, num_done)
        if num_done:
            round_.last_token_at = self._decoded_at
        self.num_context_tokens -= round_.num_prompt + round_.num_produced + num_done
        round_.num_produced += num_done
        kv = self.rounds[round_]
        kv.num_tokens += num_done  # counted in the memory already, step by step
        round_.entry = 0
        self.size -= 1

    def _collect_gaps(self, round_: SimRound, num_done: int) -> None:
        _, extra_s = round_.gaps.pop()  # see begin
        if num_done == 0:
            return
        tick, end = round_.joined_tick, round_.joined_tick + num_done
        ticks, steps_s = self._log_ticks, self._log_steps_s
        index = bisect_right(ticks, tick)
        while tick < end:
            until = min(ticks[index], end)
            count, step_s = until - tick, steps_s[index]
            if extra_s:
                round_.gaps.append((1, step_s + extra_s))
                extra_s, count = 0.0, count - 1
            if count:
                round_.gaps.append((count, step_s))
            tick = until
            index += 1

    def clear(self) -> None:
        """The worker has died: every round stops where it is."""
        for round_ in self.rounds:
            if round_.entry:
                self.stop(round_)
        self.rounds.clear()
        self.joining.clear()
        self._finish.clear()
        self.size = self.num_context_tokens = 0
        self.paused_s = 0.0

    # ------------------------------------------------------------------------------------ steps

    def next_finish(self) -> int:
        """The tick at which the first round of the batch ends; there is one."""
        finish = self._finish
        while finish[0][2].entry != finish[0][1]:
            heapq.heappop(finish)
        return finish[0][0]

    def advance(self, num_steps: int, step_s: float, now: float) -> list[SimRound]:
        """So many steps have been taken, the last of them now; returns the rounds that have their last token."""
        self.tick += num_steps
        self._decoded_at = now
        self.num_context_tokens += self.size * num_steps
        if self.paused_s > 0.0:
            self._log(self.tick - num_steps + 1, step_s + self.paused_s, 1, now)
            num_steps -= 1
            self.paused_s = 0.0
        if num_steps:
            self._log(self.tick, step_s, num_steps, now)
        finished: list[SimRound] = []
        finish = self._finish
        while finish and finish[0][0] <= self.tick:
            _, entry, round_ = heapq.heappop(finish)
            if round_.entry == entry:
                finished.append(round_)
        return finished

    def _log(self, tick: int, step_s: float, num_steps: int, now: float) -> None:
        if self._log_steps_s[-1] == step_s:
            self._log_ticks[-1] = tick
        else:
            self._log_ticks.append(tick)
            self._log_steps_s.append(step_s)
        if self._uses_windows:
            self.itl.add(now, step_s, num_steps * self.size)
        if len(self._log_ticks) > MAX_LOG:
            self._trim_log()

    def _trim_log(self) -> None:
        oldest = min((r.joined_tick for r in self.rounds if r.entry), default=self.tick)
        keep = max(0, bisect_right(self._log_ticks, oldest) - 1)
        del self._log_ticks[:keep], self._log_steps_s[:keep]

    # ------------------------------------------------------------------------------- preemption

    def count_held(self, round_: SimRound) -> int:
        """KV tokens that the round has in device memory."""
        return self.rounds[round_].num_tokens + (self.tick - round_.joined_tick if round_.entry else 0)

    def find_youngest(self) -> SimRound:
        """Of those in the batch; there is one."""
        return max((r for r in self.rounds if r.entry), key=lambda r: (r.sent_at, r.session.index))
