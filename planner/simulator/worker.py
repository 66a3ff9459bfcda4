"""A simulated worker: continuous batching over KV memory, several equal steps at a time.

The worker runs *segments*: n steps of the same composition (the decoding batch, and for prefills one chunk each). A
segment ends at the first step after which the composition changes: a sequence finishes, a prefill is done, something
arrived. So there is no event per token. Order, chunk size and eviction are decided by the functions of shared/core that
the live worker calls.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.simulator.kv_memory import KvMemory, SimKv
from planner.simulator.rounds import SimRound
from shared.core.chunking import budget_prefill_tokens, fit_chunks, measure_stretch
from shared.core.load import WorkerLoad
from shared.core.policies import SchedulingPolicy
from shared.core.reordering import PrefillOrder, WaitingPrefill
from shared.core.step_costs import StepCosts

if TYPE_CHECKING:
    from planner.simulator.simulation import Simulation

MAX_SEGMENT_STEPS = 256
MAX_CHUNK_STEPS = 8  # attention grows with the history: the mean of so few chunks is exact enough
MAX_STAGED = 8  # remote prefills whose history is on its way or here; the others wait as metadata
DECODE_MARGIN_TOKENS = 32  # room kept for each sequence of the batch to grow
RESUME_S = 0.2
WAIT_S = 0.05


@dataclass(slots=True, eq=False)
class SimPrefill:
    """A prefill on a worker: compute positions [start, stop) of the round's session."""

    round: SimRound
    waiting: WaitingPrefill
    kv: SimKv
    stop: int
    arrival: float
    is_local: bool
    start: int = 0  # of what is computed; set when it is admitted
    is_fetching: bool = False  # its history is on its way


def _is_elsewhere(prefill: SimPrefill) -> bool:
    """Whether some of its history is to be fetched."""
    return prefill.kv.num_host_tokens > 0 or prefill.round.moved_from is not None


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


class SimWorker:
    def __init__(
        self,
        simulation: Simulation,
        index: int,
        load: WorkerLoad,
        costs: StepCosts,
        policy: SchedulingPolicy,
        *,
        host_kv_tokens: int,
        itl_slo_s: float,
        max_batch: int,
        pauses: bool,
    ) -> None:
        """`costs` are the true ones, `load` what the scheduler believes. `pauses`: a prefill's steps decode nothing."""
        self.simulation = simulation
        self.index = index
        self.load = load
        self.node = load.node
        self.costs = costs
        self.policy = policy
        self.memory = KvMemory(costs.num_kv_tokens, host_kv_tokens, policy, costs, load.worker_id)
        self.alive = True
        self.batch = 0
        self.num_context_tokens = 0
        self.tick = 0  # decode steps so far
        self.queue: list[SimPrefill] = []  # ready or restoring, by arrival
        self.admitted: dict[SimPrefill, None] = {}  # have begun: they may take room to their end
        self.unstaged: list[SimPrefill] = []  # remote ones whose history is not asked for yet
        self.num_staged = 0
        self.joining: list[SimRound] = []
        self._forced: SimPrefill | None = None  # has been given the room of all others: keeps it
        self.ttft = RollingMean(policy.window_s)
        self.itl = RollingMean(policy.window_s)
        self.num_preemptions = 0
        self.busy_s = 0.0
        self._itl_slo_s = itl_slo_s
        self._max_batch = max_batch
        self._pauses = pauses
        self._order = PrefillOrder(policy.order)
        self._staging_order = PrefillOrder(policy.order)
        self._finish: list[tuple[int, int, SimRound]] = []
        self._decoding: dict[SimRound, SimKv] = {}
        self._num_entries = 0
        self._log_ticks: list[int] = [0]  # the segment that ends at this tick ...
        self._log_steps_s: list[float] = [0.0]  # ... had steps of this duration
        self._paused_s = 0.0  # time since the last decode step that prefills alone have taken
        self._decoded_at = 0.0  # end of the last decode step
        # the running segment
        self._segment = 0  # its number: events of older ones are void
        self._is_running = False
        self._is_waiting = False
        self._started_at = 0.0
        self._step_s = 0.0
        self._num_steps = 0
        self._decodes = False
        self._chunks: list[tuple[SimPrefill, int]] = []

    # ------------------------------------------------------------------------------- arrivals

    def add_local(self, round_: SimRound, now: float) -> None:
        """A round's prefill here, where it will decode."""
        kv = self.memory.hold(round_.session)
        kv.is_resident = False
        self._decoding[round_] = kv
        self.memory.shrink(kv, min(kv.num_tokens, round_.num_prompt + round_.num_produced - 1))
        self._enqueue(self._make_prefill(round_, kv, is_local=True, now=now), now)

    def expect_remote(self, round_: SimRound) -> None:
        """A round will decode here, and is prefilled elsewhere: its KV stays."""
        kv = self._decoding[round_] = self.memory.hold(round_.session)
        kv.is_resident = False

    def add_remote(self, round_: SimRound, now: float) -> None:
        """Prefill a round that decodes elsewhere; its history is read when it is nearly its turn."""
        kv = self.memory.hold(round_.session)
        if not self.policy.keeps_resident:
            self.memory.shrink(kv, 0)
        self.memory.shrink(kv, min(kv.num_tokens, round_.num_prompt + round_.num_produced - 1))
        kv.is_resident = True
        prefill = self._make_prefill(round_, kv, is_local=False, now=now)
        self.unstaged.append(prefill)
        self.stage_next(now)

    def _make_prefill(self, round_: SimRound, kv: SimKv, *, is_local: bool, now: float) -> SimPrefill:
        waiting = WaitingPrefill(round_.key, round_.placed_at, round_.session.arrival, round_.deadline, round_.work_s)
        return SimPrefill(round_, waiting, kv, round_.num_prompt + round_.num_produced, now, is_local)

    def _enqueue(self, prefill: SimPrefill, now: float) -> None:
        self.queue.append(prefill)
        self._look_again(now)

    def _fetch(self, prefill: SimPrefill, now: float) -> bool:
        """Bring the history that is elsewhere: on the worker that the session comes from, or in host memory.

        Whether it is on its way now.
        """
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
        if not self.memory.make_room(num_tokens, now):
            return  # tried again when a step is planned
        self.memory.grow(prefill.kv, num_tokens)
        prefill.round.moved_from = None
        prefill.is_fetching = True
        prefill.round.kv_bytes_read += num_tokens * self.costs.kv_bytes_per_token
        begin = source.memory.use_host_link(theirs.num_host_tokens, now) if theirs.num_host_tokens else now
        done_at = self.simulation.links.transfer(source, self, num_tokens, begin, begin - now)
        self.simulation.at(done_at, self._moved, (prefill, source, theirs))

    def _moved(self, argument: tuple[SimPrefill, SimWorker, SimKv], now: float) -> None:
        prefill, source, theirs = argument
        is_whole = source.memory.holds(theirs)
        source.let_go(theirs, now)
        if not is_whole and self.memory.holds(prefill.kv):  # the source died: all is computed again
            self.memory.shrink(prefill.kv, 0)
        self._restored(prefill, now)

    def let_go(self, kv: SimKv, now: float) -> None:
        """A session that has moved away needs its KV here no longer."""
        self.memory.release(kv, now)
        if self.memory.holds(kv) and not kv.busy and kv.key.decode is not self:
            self.memory.forget(kv.key)
        self._look_again(now)

    def _restore(self, prefill: SimPrefill, now: float) -> None:
        kv = prefill.kv
        surplus = kv.num_tokens + kv.num_host_tokens - (prefill.stop - 1)
        if surplus > 0:  # the last token is always computed
            kv.num_host_tokens -= surplus
            self.memory.num_host_used -= surplus
        done_at = self.memory.restore(kv, now) if kv.num_host_tokens > 0 else now
        if done_at is None:
            return  # no room now: tried again when a step is planned
        prefill.is_fetching = True
        self.simulation.at(done_at, self._restored, prefill)

    def _restored(self, prefill: SimPrefill, now: float) -> None:
        prefill.is_fetching = False
        prefill.round.transfer_s += now - max(prefill.arrival, prefill.round.placed_at)
        self._look_again(now)

    # -------------------------------------------------------------------- staging (lazy read)

    def stage_next(self, now: float) -> None:
        """Read the history of the next remote prefills, while there are few here."""
        while self.unstaged and self.num_staged < MAX_STAGED:
            index = self._choose_staged(now)
            if index is None:
                if not self.admitted and self.batch == 0 and not self.queue:
                    self._abandon(self.unstaged.pop(0), now)
                    continue
                if not self._is_running:
                    self._wait_for_room(now)
                return
            prefill = self.unstaged.pop(index)
            kv, round_ = prefill.kv, prefill.round
            self._begin_prefill(prefill)
            self.num_staged += 1
            readable = round_.decode.readable_tokens(round_) if self.policy.routing.reads_history else 0
            num_pulled = max(0, min(readable, prefill.stop - 1) - kv.num_tokens)
            self.memory.grow(kv, num_pulled)
            if num_pulled:
                round_.kv_bytes_read += num_pulled * self.costs.kv_bytes_per_token
                done_at = self.simulation.links.transfer(round_.decode, self, num_pulled, now, 0.0)
                self.simulation.at(done_at, self._pulled, prefill)
            else:
                self._pulled(prefill, now)

    def _choose_staged(self, now: float) -> int | None:
        """The first in order that there is room for."""
        order = self._staging_order
        waiting = [prefill.waiting for prefill in self.unstaged]
        for index in order.order(waiting, now, self._measure_stretch(self.unstaged[0])):
            prefill = self.unstaged[index]
            missing = prefill.stop - prefill.kv.num_tokens
            needed = missing + order.count_aside(prefill.waiting)
            if self.memory.make_room(self._count_reserved() + needed, now):
                order.note_begun(prefill.waiting, missing)
                order.note_started(waiting, index)
                order.note_turn(prefill.waiting)
                return index
            if not order.may_be_passed(prefill.waiting, missing):
                break
        return None

    def readable_tokens(self, round_: SimRound) -> int:
        kv = self._decoding.get(round_)
        return kv.num_tokens if kv is not None else 0

    def _pulled(self, prefill: SimPrefill, now: float) -> None:
        if prefill not in self.admitted:  # the worker died, or the round started again elsewhere
            return
        self.queue.append(prefill)
        self._look_again(now)

    def _abandon(self, prefill: SimPrefill, now: float) -> None:
        """It does not fit here at all: the round is prefilled where it decodes."""
        self.memory.release(prefill.kv, now)
        self.simulation.prefill_refused(prefill.round, self, now)

    # -------------------------------------------------------------------------------- segments

    def join(self, round_: SimRound, now: float) -> None:
        """A round whose KV has arrived decodes from the next step on."""
        self.joining.append(round_)
        self._look_again(now)

    def _look_again(self, now: float) -> None:
        """Something changed: end the running segment at its next step, or start one."""
        if not self._is_running:
            self._start_segment(now)
            return
        num_done = int((now - self._started_at) / self._step_s) + 1
        if num_done < self._num_steps:
            self._give_back(self._num_steps - num_done)
            self._num_steps = num_done
            self._segment += 1
            self.simulation.at(self._started_at + num_done * self._step_s, self._end_segment, self._segment)

    def _give_back(self, num_steps: int) -> None:
        """Memory was taken for the whole segment as planned, and it is cut short by so many steps."""
        if self._decodes:
            self.memory.num_used -= self.batch * num_steps
        for prefill, chunk in self._chunks:
            self.memory.grow(prefill.kv, -chunk * num_steps)

    def _start_segment(self, now: float) -> None:
        if not self.alive:
            return
        for round_ in self.joining:
            self._begin_decoding(round_, now)
        self.joining.clear()
        while True:
            chunks, budget = self._plan_chunks(now) if self.queue and not self._owes_decode() else ([], 0)
            num_decoding = 0 if chunks and self._pauses else self.batch
            if num_decoding == 0 and not chunks:
                return
            num_steps = self._count_chunk_steps(chunks, budget) if chunks else MAX_SEGMENT_STEPS
            if num_decoding:
                num_steps = min(num_steps, self._next_finish() - self.tick)
            if chunks or self._fits_decodes(num_decoding, num_steps, now):
                break
            num_steps = self.memory.num_free // num_decoding
            if num_steps:
                break
            youngest = max((r for r in self._decoding if r.entry), key=lambda r: (r.sent_at, r.session.index))
            self._preempt(youngest, now)
        self._run(chunks, num_decoding, num_steps if not self._owes_decode() else 1, now)

    def _owes_decode(self) -> bool:
        """With pauses, slack-sized chunks take turns with decode steps; a fixed prefill stops the batch to its end."""
        return self._pauses and self._paused_s > 0.0 and self.batch > 0 and self.policy.chunk.chunk == "slack"

    def _next_finish(self) -> int:
        finish = self._finish
        while finish[0][2].entry != finish[0][1]:
            heapq.heappop(finish)
        return finish[0][0]

    def _fits_decodes(self, num_decoding: int, num_steps: int, now: float) -> bool:
        return self.memory.make_room(num_decoding * num_steps, now)

    def _run(self, chunks: list[tuple[SimPrefill, int]], num_decoding: int, num_steps: int, now: float) -> None:
        mean_context = self.num_context_tokens / num_decoding + num_steps / 2 if num_decoding else 0.0
        parts = [
            (prefill.kv.num_tokens + chunk * (num_steps - 1) // 2, chunk) for prefill, chunk in chunks
        ]  # the history before the chunk, in the middle step
        self._step_s = self.costs.step_s(num_decoding, mean_context, parts)
        for prefill, chunk in chunks:
            self.memory.grow(prefill.kv, chunk * num_steps)
            if prefill.round.started_at < 0.0:
                prefill.round.started_at = now
        self.memory.num_used += num_decoding * num_steps
        self._is_running = True
        self._decodes = num_decoding > 0
        self._started_at, self._num_steps, self._chunks = now, num_steps, chunks
        self._segment += 1
        self.simulation.at(now + num_steps * self._step_s, self._end_segment, self._segment)

    def _count_chunk_steps(self, chunks: list[tuple[SimPrefill, int]], budget: int) -> int:
        """Several equal steps, when one prefill fills them all."""
        if len(chunks) > 1 or chunks[0][1] < budget:
            return 1
        prefill, chunk = chunks[0]
        num_steps = min(MAX_CHUNK_STEPS, (prefill.stop - prefill.kv.num_tokens) // chunk)
        return max(1, min(num_steps, (self.memory.num_free - self.batch * num_steps) // chunk))

    def _plan_chunks(self, now: float) -> tuple[list[tuple[SimPrefill, int]], int]:
        """The prefills of the next step, in the policy's order, and what each computes."""
        chunks, budget = self._fill_budget(self._admit(now), now)
        if not chunks and self.batch == 0:
            chunks, budget = self._fill_budget(self._force_oldest(now), now)
            if not chunks and self.queue:
                self._wait_for_room(now)
        return chunks, budget

    def _wait_for_room(self, now: float) -> None:
        """Everything here waits: for KV on its way, or for room that others hold. Look again soon."""
        if not self._is_waiting:
            self._is_waiting = True
            self.simulation.at(now + WAIT_S, self._wake, None)

    def _wake(self, _: None, now: float) -> None:
        self._is_waiting = False
        self.stage_next(now)
        self._look_again(now)
        if self._is_waiting and not self._is_running:
            self._yield_room(now)

    def _yield_room(self, now: float) -> None:
        """Nothing runs, and nothing has for a while: workers may wait for each other's room. The youngest round that is
        prefilled here for another worker goes there; failing that, KV of sessions that have moved away is given up."""
        on_its_way = any(one.is_fetching for one in self.queue) or any(one not in self.queue for one in self.admitted)
        if not self.alive or on_its_way:
            return
        remote = [one.round for one in (*self.unstaged, *self.queue) if not one.is_local]
        if remote:
            youngest = max(remote, key=lambda one: (one.sent_at, one.session.index))
            self.drop(youngest, now)
            self.simulation.prefill_refused(youngest, self, now)
            return
        for session in list(self.memory.entries):
            if session.running is not None and session.running.moved_from is self:
                self.memory.forget(session)

    def _fill_budget(self, ready: list[SimPrefill], now: float) -> tuple[list[tuple[SimPrefill, int]], int]:
        if not ready:
            return [], 0
        budget = self._choose_budget(ready[0].kv.num_tokens)
        self._order.note_turn(ready[0].waiting)
        ready = ready[: max(1, self._max_batch - self.batch)]
        sizes = fit_chunks(
            self.policy.chunk,
            self.costs,
            [(prefill.kv.num_tokens, prefill.stop - prefill.kv.num_tokens) for prefill in ready],
            budget,
            batch=0 if self._pauses else self.batch,
            mean_context=self.num_context_tokens / self.batch if self.batch else 0.0,
            itl_slo_s=self._itl_slo_s,
        )
        chunks: list[tuple[SimPrefill, int]] = []
        num_tokens = self.batch
        for prefill, size in zip(ready, sizes, strict=False):
            num_tokens += size
            if not self.memory.make_room(num_tokens, now) and not self._preempt_for(prefill, num_tokens, now):
                break
            chunks.append((prefill, size))
        # a preemption may have taken a prefill that was chosen before it
        return [(prefill, size) for prefill, size in chunks if prefill in self.admitted], budget

    def _admit(self, now: float) -> list[SimPrefill]:
        """The prefills that can be computed now, in order. None begins that could not be held to its end beside those
        that have begun: half-computed prefills that wait for each other's room are how a worker collapses."""
        waiting = [prefill.waiting for prefill in self.queue]
        reserved = self._count_reserved()
        ready: list[SimPrefill] = []
        order = self._order.order(waiting, now, self._measure_stretch(self.queue[0]))
        for place, index in enumerate(order):
            prefill = self.queue[index]
            if prefill.is_fetching:
                continue
            if prefill not in self.admitted:
                missing = prefill.stop - prefill.kv.num_tokens
                needed = missing + self._order.count_aside(prefill.waiting)
                if self.memory.host_capacity and not self._order.is_oldest_aged(prefill.waiting):
                    reserved = self._displace(order[place + 1 :], reserved, needed, now)
                if not self.memory.make_room(reserved + needed, now):
                    if self._order.may_be_passed(prefill.waiting, missing):
                        continue
                    break
                self._begin_prefill(prefill)
                self._order.note_begun(prefill.waiting, missing)
                self._order.note_started(waiting, index)
                reserved += missing
            if _is_elsewhere(prefill):
                if self._fetch(prefill, now):
                    reserved = self._count_reserved()
                    continue
                if _is_elsewhere(prefill):
                    continue  # no room for it now
            ready.append(prefill)
        return ready

    def _measure_stretch(self, prefill: SimPrefill) -> float:
        """How much longer prefills take beside the batch than alone."""
        if not self.batch or self._pauses or not self._order.by_deadline:
            return 1.0
        history = prefill.kv.num_tokens
        return measure_stretch(
            self.costs, self._choose_budget(history), history, self.batch, self.num_context_tokens / self.batch
        )

    def _displace(self, behind: list[int], reserved: int, missing: int, now: float) -> int:
        """Those further behind in the order give up their room, the last first, if that is enough: their KV goes to
        host memory."""
        if self.memory.has_room(reserved + missing):
            return reserved
        yielding: list[SimPrefill] = []
        num_given = 0
        for index in reversed(behind):
            other = self.queue[index]
            is_admitted = other in self.admitted
            gives = other.stop if is_admitted else other.kv.num_tokens  # what is still to come is not reserved for it
            if not gives or not self._may_yield(other):
                continue
            yielding.append(other)
            num_given += gives
            if self.memory.has_room(reserved + missing - num_given):
                break
        else:
            return reserved
        for other in yielding:
            if other in self.admitted:
                del self.admitted[other]
            self.memory.swap_out(other.kv, now)
        return self._count_reserved()

    def _may_yield(self, prefill: SimPrefill) -> bool:
        if not prefill.is_local or prefill.is_fetching or prefill is self._forced:
            return False
        return not self._order.is_oldest_aged(prefill.waiting)

    def _count_reserved(self) -> int:
        """Room that the admitted prefills still need, and the batch for a while."""
        return sum(one.stop - one.kv.num_tokens for one in self.admitted) + self.batch * DECODE_MARGIN_TOKENS

    def _begin_prefill(self, prefill: SimPrefill) -> None:
        self.admitted[prefill] = None
        prefill.start = prefill.kv.num_tokens

    def _choose_budget(self, num_history: int) -> int:
        parameters, batch = self.policy.chunk, self.batch
        mean_context = self.num_context_tokens / batch if batch else 0.0
        itl_slo_s = self._itl_slo_s
        if self._pauses and batch:  # the chunk runs alone, between decode steps
            itl_slo_s -= self.costs.decode_step_s(batch, mean_context) / parameters.itl_share
            batch = 0
            if parameters.chunk == "slack":
                fitting = self.costs.largest_chunk(0, 0.0, num_history, parameters.itl_share * itl_slo_s)
                return max(parameters.min_chunk_tokens, min(parameters.max_prefill_tokens, fitting))
        return budget_prefill_tokens(
            parameters,
            self.costs,
            batch=batch,
            mean_context=mean_context,
            itl_slo_s=itl_slo_s,
            num_history=num_history,
        )

    def _force_oldest(self, now: float) -> list[SimPrefill]:
        """Nothing fits and nothing decodes: the oldest prefill gets the room of the younger ones, so that one goes on.

        What is on its way holds its room until it is here; then the oldest may take it. Two that fetched in turns, each
        in the other's room, would never compute anything.
        """
        if any(one.is_fetching for one in self.queue):
            return []
        for prefill in sorted(self.queue, key=lambda one: one.round.sent_at):
            missing = prefill.stop - prefill.kv.num_tokens
            if self.memory.make_room(missing, now) or self._preempt_for(prefill, missing, now):
                if prefill not in self.admitted:
                    self._begin_prefill(prefill)
                self._forced = prefill
                if _is_elsewhere(prefill):
                    self._fetch(prefill, now)
                return [] if prefill.is_fetching or _is_elsewhere(prefill) else [prefill]
        return []

    def _end_segment(self, segment: int, now: float) -> None:
        if segment != self._segment or not self.alive:
            return
        self._is_running = False
        num_steps, chunks = self._num_steps, self._chunks
        self.busy_s += now - self._started_at
        if self._decodes:
            self._advance_decodes(num_steps, now)
        elif self.batch:
            self._paused_s += now - self._started_at
        self._chunks = []
        for prefill, _ in chunks:
            if prefill.kv.num_tokens >= prefill.stop and prefill in self.queue:
                self._end_prefill(prefill, now)
            else:  # what is left of its work is what its place in the queue depends on
                left = (prefill.stop - prefill.kv.num_tokens) / max(1, prefill.stop - prefill.start)
                prefill.waiting.work_s = prefill.round.work_s * left
        self.stage_next(now)
        if not self._is_running:  # an ended round may have brought the next one, which started a segment
            self._start_segment(now)

    def _advance_decodes(self, num_steps: int, now: float) -> None:
        self.tick += num_steps
        self._decoded_at = now
        self.num_context_tokens += self.batch * num_steps
        if self._paused_s > 0.0:
            self._log(self.tick - num_steps + 1, self._step_s + self._paused_s, 1, now)
            num_steps -= 1
            self._paused_s = 0.0
        if num_steps:
            self._log(self.tick, self._step_s, num_steps, now)
        finish = self._finish
        while finish and finish[0][0] <= self.tick:
            _, entry, round_ = heapq.heappop(finish)
            if round_.entry == entry:
                self._end_round(round_, now)

    def _log(self, tick: int, step_s: float, num_steps: int, now: float) -> None:
        if self._log_steps_s[-1] == step_s:
            self._log_ticks[-1] = tick
        else:
            self._log_ticks.append(tick)
            self._log_steps_s.append(step_s)
        if self.policy.uses_windows:
            self.itl.add(now, step_s, num_steps * self.batch)
        if len(self._log_ticks) > 50_000:
            self._trim_log()

    def _trim_log(self) -> None:
        oldest = min((r.joined_tick for r in self._decoding if r.entry), default=self.tick)
        keep = max(0, bisect_right(self._log_ticks, oldest) - 1)
        del self._log_ticks[:keep], self._log_steps_s[:keep]

    # ------------------------------------------------------------------------- rounds and ends

    def _end_prefill(self, prefill: SimPrefill, now: float) -> None:
        round_ = prefill.round
        self.queue.remove(prefill)
        del self.admitted[prefill]
        if self.policy.uses_windows:
            self.ttft.add(now, now - round_.sent_at)
        if prefill.is_local:
            self.simulation.prefill_ended(round_, self, now)
            round_.num_computed = prefill.stop
            if round_.first_token_at < 0.0:
                round_.first_token_at = now
            else:
                round_.gaps.append((1, now - round_.last_token_at))
            round_.last_token_at = now
            round_.num_produced += 1
            if round_.num_produced >= round_.planned.output_tokens:
                self._end_round(round_, now)
            else:
                self._begin_decoding(round_, now)
            return
        self.num_staged -= 1
        kv = prefill.kv
        self.simulation.prefill_ended(round_, self, now)
        if self.policy.keeps_resident:
            round_.session.resident[self.load.worker_id] = kv.num_tokens
        self.simulation.hand_over(round_, self, kv, now)

    def release_remote(self, kv: SimKv, now: float) -> None:
        """The decode worker has the KV of a remote prefill: keep it as resident, or forget it."""
        if not self.policy.keeps_resident and kv.busy == 1:
            self.memory.shrink(kv, 0)
        self.memory.release(kv, now)
        self.stage_next(now)
        self._look_again(now)

    def take_kv(self, round_: SimRound, now: float) -> bool:
        """Room for what a remote prefill sends; False when there is none now."""
        kv = self._decoding[round_]
        num_missing = round_.num_prompt + max(0, round_.num_produced - 1) - kv.num_tokens
        if num_missing > 0:
            if not self.memory.make_room(num_missing, now):
                return False
            self.memory.grow(kv, num_missing)
        if kv.num_host_tokens:
            self.memory.num_host_used -= kv.num_host_tokens
            kv.num_host_tokens = 0
        return True

    def _begin_decoding(self, round_: SimRound, now: float) -> None:
        if round_ not in self._decoding:
            return
        self._num_entries += 1
        round_.entry = self._num_entries
        round_.joined_tick = self.tick
        round_.finish_tick = self.tick + round_.planned.output_tokens - round_.num_produced
        if self.batch == 0:
            self._paused_s = 0.0
        # its first gap is longer than the batch's by the wait for a step's end, and without pauses before its token
        round_.gaps.append((0, now - round_.last_token_at - self._paused_s))
        heapq.heappush(self._finish, (round_.finish_tick, round_.entry, round_))
        self.batch += 1
        self.num_context_tokens += round_.num_prompt + round_.num_produced

    def _stop_decoding(self, round_: SimRound) -> None:
        """Take a round out of the batch and account for the tokens it has produced there."""
        num_done = self.tick - round_.joined_tick
        self._collect_gaps(round_, num_done)
        if num_done:
            round_.last_token_at = self._decoded_at
        self.num_context_tokens -= round_.num_prompt + round_.num_produced + num_done
        round_.num_produced += num_done
        kv = self._decoding[round_]
        kv.num_tokens += num_done  # counted in the memory already, step by step
        round_.entry = 0
        self.batch -= 1

    def _collect_gaps(self, round_: SimRound, num_done: int) -> None:
        _, extra_s = round_.gaps.pop()  # see _begin_decoding
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

    def _end_round(self, round_: SimRound, now: float) -> None:
        if round_.entry:
            self._stop_decoding(round_)
        kv = self._decoding.pop(round_)
        round_.finished_at = now
        self.memory.release(kv, now)
        self.simulation.round_ended(round_, now)

    # ------------------------------------------------------------------------------ preemption

    def _preempt_for(self, prefill: SimPrefill, num_tokens: int, now: float) -> bool:
        """Room for a prefill at the cost of rounds that came after it, the youngest first; of none if all of them
        together have too little."""
        if self.memory.make_room(num_tokens, now):
            return True
        younger = [r for r in self._decoding if r.sent_at > prefill.round.sent_at and self._is_preemptible(r)]
        if self.memory.num_free + sum(self._count_held(r) for r in younger) < num_tokens:
            return False
        younger.sort(key=lambda r: (r.sent_at, r.session.index))
        while not self.memory.make_room(num_tokens, now):
            self._preempt(younger.pop(), now)
        return True

    def _count_held(self, round_: SimRound) -> int:
        return self._decoding[round_].num_tokens + (self.tick - round_.joined_tick if round_.entry else 0)

    def _is_preemptible(self, round_: SimRound) -> bool:
        if round_.entry:
            return True
        return any(
            one.round is round_ and one.is_local and not one.is_fetching and one.kv.num_tokens for one in self.queue
        )

    def _preempt(self, round_: SimRound, now: float) -> None:
        """Its KV goes; it is prefilled again, what it has produced included."""
        self.num_preemptions += 1
        round_.num_preemptions += 1
        kv = self._decoding[round_]
        if round_.entry:
            self._stop_decoding(round_)
            round_.attempt += 1
            round_.placed_at = now
            self.memory.swap_out(kv, now)
            prefill = self._make_prefill(round_, kv, is_local=True, now=now)
            history = kv.num_tokens + kv.num_host_tokens
            prefill.waiting.work_s = self.load.work_s(history, prefill.stop - history)
            prefill.waiting.ttft_deadline = now + 2.0 * prefill.waiting.work_s + RESUME_S
            self.queue.append(prefill)
            return
        self.memory.swap_out(kv, now)
        for prefill in self.queue:
            if prefill.round is round_:
                self.admitted.pop(prefill, None)
                prefill.waiting.work_s = round_.work_s

    # --------------------------------------------------------------------------------- failure

    def drop(self, round_: SimRound, now: float) -> None:
        """The round starts again elsewhere: its remote prefill here goes, wherever it has got to."""
        for prefill in {*self.unstaged, *self.queue, *self.admitted}:
            if prefill.round is not round_:
                continue
            if prefill in self.unstaged:
                self.unstaged.remove(prefill)
            else:
                del self.admitted[prefill]
                self.num_staged -= 1
            if prefill in self.queue:
                self.queue.remove(prefill)
            self.memory.grow(prefill.kv, -self._num_steps * sum(n for one, n in self._chunks if one is prefill))
            self._chunks = [(one, chunk) for one, chunk in self._chunks if one is not prefill]
            self.memory.release(prefill.kv, now)

    def fail(self, now: float) -> list[SimRound]:
        """The worker dies; returns the rounds that it decoded, computed or waited for."""
        if self._is_running:
            num_done = min(int((now - self._started_at) / self._step_s), self._num_steps - 1)
            self._give_back(self._num_steps - num_done)
            if self._decodes and num_done:
                self._advance_decodes(num_done, self._started_at + num_done * self._step_s)
        self.alive = False
        self._segment += 1
        self._is_running = False
        rounds = dict.fromkeys(self._decoding)
        rounds.update(dict.fromkeys(one.round for one in (*self.queue, *self.unstaged, *self.admitted)))
        for round_ in self._decoding:
            if round_.entry:
                self._stop_decoding(round_)
        for session in list(self.memory.entries):
            self.memory.forget(session)
        self._decoding.clear()
        self.queue.clear()
        self.unstaged.clear()
        self.admitted.clear()
        self.joining.clear()
        self._finish.clear()
        self.batch = self.num_context_tokens = self.num_staged = 0
        self._paused_s = 0.0
        self._forced = None
        return list(rounds)
