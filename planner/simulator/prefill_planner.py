"""Which prefills a worker's next step computes, and how much of each.

Order, budget and chunk size are decided by the functions of shared/core that the live worker calls.
"""

from __future__ import annotations

from planner.simulator.decode_batch import DecodeBatch
from planner.simulator.history_fetcher import HistoryFetcher
from planner.simulator.kv_memory import KvMemory
from planner.simulator.preemption import Preemption
from planner.simulator.prefill_queue import PrefillQueue, SimPrefill
from shared.core.chunk_prediction import predict_stretch
from shared.core.chunking import ChunkParameters, fit_chunks
from shared.core.decoding_rounds import DecodingRounds
from shared.core.pace import choose_pace
from shared.core.policies import SchedulingPolicy
from shared.core.reordering import AgedRoom, PrefillOrder
from shared.core.slack_saving import SlackSaver
from shared.core.step_costs import StepCosts

Chunk = tuple[SimPrefill, int]  # so many tokens of it
NOBODY = DecodingRounds(0, 0.0, 0.0)


class PrefillPlanner:
    """`pauses`: a prefill's steps decode nothing."""

    def __init__(
        self,
        queue: PrefillQueue,
        batch: DecodeBatch,
        memory: KvMemory,
        fetcher: HistoryFetcher,
        preemption: Preemption,
        costs: StepCosts,
        policy: SchedulingPolicy,
        *,
        itl_slo_s: float,
        max_batch: int,
        pauses: bool,
    ) -> None:
        self._queue = queue
        self._batch = batch
        self._memory = memory
        self._fetcher = fetcher
        self._preemption = preemption
        self._costs = costs
        self._policy = policy
        self.room = AgedRoom()  # of the worker's memory, whoever takes from it
        self._order = PrefillOrder(policy.order, self.room)
        self._saver = SlackSaver()
        self._num_steps_alike = 0  # that the last budget holds for; 0: any number
        self._forced: SimPrefill | None = None  # has been given the room of all others: keeps it
        self._itl_slo_s = itl_slo_s
        self._max_batch = max_batch
        self._pauses = pauses

    def plan(self, now: float) -> tuple[list[Chunk], int, int]:
        """The prefills of the next step, in the policy's order, and what each computes; the step's budget; and how many
        such steps there are to be at most (0: as many as the caller likes)."""
        self._num_steps_alike = 0
        chunks, budget = self._fill_budget(self._admit(now), now)
        if not chunks and self._batch.size == 0:
            chunks, budget = self._fill_budget(self._force_oldest(now), now)
        return chunks, budget, self._num_steps_alike

    def clear(self) -> None:
        """The worker has died."""
        self._forced = None
        self.room = AgedRoom()
        self._order = PrefillOrder(self._policy.order, self.room)

    # -------------------------------------------------------------------------------- admission

    def _admit(self, now: float) -> list[SimPrefill]:
        """The prefills that can be computed now, in order. None begins that could not be held to its end beside those
        that have begun: half-computed prefills that wait for each other's room are how a worker collapses."""
        queue = self._queue
        waiting = [prefill.waiting for prefill in queue.waiting]
        reserved = queue.count_reserved(self._batch.size)
        ready: list[SimPrefill] = []
        order = self._order.order(waiting, now, self.measure_stretch())
        for place, index in enumerate(order):
            prefill = queue.waiting[index]
            if prefill.is_fetching:
                continue
            if prefill not in queue.admitted:
                missing = prefill.num_missing
                needed = missing + self._order.count_aside(prefill.waiting)
                if self._memory.host_capacity and not self._order.is_oldest_aged(prefill.waiting):
                    reserved = self._displace(order[place + 1 :], reserved, needed, now)
                if not self._memory.make_room(reserved + needed, now):
                    if self._order.may_be_passed(prefill.waiting, missing):
                        continue
                    break
                queue.begin(prefill)
                self._order.note_begun(prefill.waiting, missing)
                self._order.note_started(waiting, index)
                reserved += missing
            if prefill.is_elsewhere:
                if self._fetcher.fetch(prefill, now):
                    reserved = queue.count_reserved(self._batch.size)
                    continue
                if prefill.is_elsewhere:
                    continue  # no room for it now
            ready.append(prefill)
        return ready

    def _displace(self, behind: list[int], reserved: int, missing: int, now: float) -> int:
        """Those further behind in the order give up their room, the last first, if that is enough: their KV goes to
        host memory."""
        if self._memory.has_room(reserved + missing):
            return reserved
        queue = self._queue
        yielding: list[SimPrefill] = []
        num_given = 0
        for index in reversed(behind):
            other = queue.waiting[index]
            is_admitted = other in queue.admitted
            gives = other.stop if is_admitted else other.kv.num_tokens  # what is still to come is not reserved for it
            if not gives or not self._may_yield(other):
                continue
            yielding.append(other)
            num_given += gives
            if self._memory.has_room(reserved + missing - num_given):
                break
        else:
            return reserved
        for other in yielding:
            self._preemption.displace(other, now)
        return queue.count_reserved(self._batch.size)

    def _may_yield(self, prefill: SimPrefill) -> bool:
        if not prefill.is_local or prefill.is_fetching or prefill is self._forced:
            return False
        return not self._order.is_oldest_aged(prefill.waiting)

    def _force_oldest(self, now: float) -> list[SimPrefill]:
        """Nothing fits and nothing decodes: the oldest prefill gets the room of the younger ones, so that one goes on.

        What is on its way holds its room until it is here; then the oldest may take it. Two that fetched in turns, each
        in the other's room, would never compute anything.
        """
        queue = self._queue
        if any(one.is_fetching for one in queue.waiting):
            return []
        for prefill in sorted(queue.waiting, key=lambda one: one.round.sent_at):
            missing = prefill.num_missing
            if self._memory.make_room(missing, now) or self._preemption.make_room(prefill, missing, now):
                if prefill not in queue.admitted:
                    queue.begin(prefill)
                self._forced = prefill
                if prefill.is_elsewhere:
                    self._fetcher.fetch(prefill, now)
                return [] if prefill.is_fetching or prefill.is_elsewhere else [prefill]
        return []

    # ----------------------------------------------------------------------------------- budget

    def _fill_budget(self, ready: list[SimPrefill], now: float) -> tuple[list[Chunk], int]:
        if not ready:
            return [], 0
        parameters = self._choose_pace(ready, now)
        budget = self._choose_budget(ready, parameters)
        if not budget:
            return [], 0
        self._order.note_turn(ready[0].waiting)
        ready = ready[: max(1, self._max_batch - self._batch.size)]
        sizes = fit_chunks(
            parameters,
            self._costs,
            [(prefill.kv.num_tokens, prefill.num_missing) for prefill in ready],
            budget,
            NOBODY if self._pauses else self._measure_decoding(),
            time_left_s=[prefill.waiting.ttft_deadline - now for prefill in ready],
        )
        chunks: list[Chunk] = []
        num_tokens = self._batch.size
        for prefill, size in zip(ready, sizes, strict=False):
            num_tokens += size
            if not self._memory.make_room(num_tokens, now) and not self._preemption.make_room(prefill, num_tokens, now):
                break
            chunks.append((prefill, size))
        # a preemption may have taken a prefill that was chosen before it
        return [(prefill, size) for prefill, size in chunks if prefill in self._queue.admitted], budget

    def _choose_pace(self, ready: list[SimPrefill], now: float) -> ChunkParameters:
        if self._pauses:
            return self._policy.chunk
        return choose_pace(
            self._policy.chunk,
            self._costs,
            self._measure_decoding(),
            [prefill.waiting for prefill in (*self._queue.unstaged, *self._queue.waiting) if not prefill.is_fetching],
            now,
            num_history=ready[0].kv.num_tokens,
            num_waiting=sum(prefill.num_missing for prefill in ready),
        )

    def _choose_budget(self, ready: list[SimPrefill], parameters: ChunkParameters) -> int:
        num_history = ready[0].kv.num_tokens
        beside = self._measure_decoding()
        if self._pauses and beside.batch:  # the chunk runs alone, between decode steps
            if parameters.chunk == "slack":
                decode_s = self._costs.decode_step_s(beside.batch, beside.mean_context)
                limit_s = parameters.itl_share * beside.itl_slo_s - decode_s
                fitting = self._costs.largest_chunk(0, 0.0, num_history, limit_s)
                return max(parameters.min_chunk_tokens, min(parameters.max_prefill_tokens, fitting))
            beside = NOBODY
        budget, self._num_steps_alike = self._saver.choose_budget(
            parameters,
            self._costs,
            beside,
            step=self._batch.tick,
            num_history=num_history,
            num_waiting=sum(prefill.num_missing for prefill in ready),
        )
        return budget

    def is_aged_turn(self, prefill: SimPrefill) -> bool:
        """It runs out of order, for one step."""
        return self._order.is_oldest_aged(prefill.waiting) and len(self._queue.waiting) > 1

    def measure_stretch(self) -> float:
        """How much longer prefills take beside the batch than alone."""
        if not self._batch.size or self._pauses or not self._order.by_deadline:
            return 1.0
        return predict_stretch(self._policy.chunk, self._costs, self._measure_decoding())

    def _measure_decoding(self) -> DecodingRounds:
        return DecodingRounds(self._batch.size, self._batch.mean_context, self._itl_slo_s)
