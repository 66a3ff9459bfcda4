"""What goes into the next forward pass: continuous batching with chunked prefill, eviction and preemption.

Decoding sequences go first, one token each (decode_choice.py); the token budget beside them (chunking.py) goes to
prefills in chunks, in the order of reordering.py, once they may begin (prefill_admission.py). When blocks run out, idle
sessions lose the tail of their KV first (kv_memory.py), then a running sequence is preempted (preemption.py). A
decoding sequence is never preempted for a younger one to decode, and the oldest prefill takes its room from the younger
ones when nothing else could go on, so something always makes progress.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from math import inf

from shared.core.chunk_prediction import predict_stretch
from shared.core.chunking import ChunkParameters, fit_chunks
from shared.core.decode_choice import choose_decodes, measure_decoding
from shared.core.kv_blocks import BlockAllocator
from shared.core.kv_memory import KvMemory
from shared.core.pace import choose_pace
from shared.core.preemption import Behind, Preemption, nobody
from shared.core.prefill_admission import PrefillAdmission, has_begun
from shared.core.reordering import AgedRoom, OrderParameters, PrefillOrder, WaitingPrefill
from shared.core.retention import RetentionName
from shared.core.sequences import PlannedItem, Sequence, SequenceState, SessionKv
from shared.core.slack_saving import SlackSaver
from shared.core.step_prediction import StepPredictor
from shared.core.types import RoundKey, SessionKey


class Scheduler:
    """The sessions and sequences of one worker, and the choice of the next step. Not thread-safe."""

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        chunk_tokens: int = 128,
        max_prefill_tokens: int = 512,
        max_batch: int = 64,
    ) -> None:
        """chunk_tokens bounds the prefill part of a step that also decodes (where chunks are of fixed size),
        max_prefill_tokens of one that does not. `follow` sets the rest; until then: FCFS, fixed chunks, LRU."""
        self.allocator = allocator
        self.memory = KvMemory(allocator)
        self.sessions = self.memory.sessions
        self.sequences: list[Sequence] = []  # by arrival
        self.preemption = Preemption(self.memory, self.sequences)
        self.max_batch = max_batch
        self._sizes = ChunkParameters(chunk_tokens=chunk_tokens, max_prefill_tokens=max_prefill_tokens)
        self.room = AgedRoom()  # of the pool: shared by whoever else orders prefills that take from it
        self.order = PrefillOrder(OrderParameters(order="fcfs"), self.room)
        self._saver = SlackSaver()
        self._num_steps = 0  # planned so far
        self.list_unstaged: Callable[[], Iterable[WaitingPrefill]] = tuple  # for other workers, not sequences yet
        self.follow(ChunkParameters(), OrderParameters(order="fcfs"), "lru", StepPredictor())
        self._restores: list[Sequence] = []  # to be begun

    def follow(
        self, chunk: ChunkParameters, order: OrderParameters, retention: RetentionName, predictor: StepPredictor
    ) -> None:
        """Schedule by these; the sizes of fixed chunks stay those of the constructor."""
        sizes = self._sizes
        self.chunk = replace(
            chunk,
            chunk_tokens=sizes.chunk_tokens,
            max_prefill_tokens=sizes.max_prefill_tokens,
            min_chunk_tokens=min(chunk.min_chunk_tokens, sizes.max_prefill_tokens),
        )
        self.room.leave(self.order)
        self.order = PrefillOrder(order, self.room)
        self.predictor = predictor
        self.memory.follow(retention, predictor)
        self._admission = PrefillAdmission(self.memory, self.preemption, self.order, self.sequences)

    # ------------------------------------------------------------------ sessions and sequences

    def add(self, sequence: Sequence) -> None:
        kv = sequence.kv
        assert kv.sequence is None, "a session runs one round at a time"
        if sequence.key.round > kv.last_round >= 0:
            kv.gaps.add(max(0.0, sequence.arrival - kv.last_used))
        kv.last_round = sequence.key.round
        kv.sequence = sequence
        self.sequences.append(sequence)

    def remove(self, sequence: Sequence, now: float) -> None:
        """The sequence leaves; its session keeps its KV and is idle."""
        sequence.state = SequenceState.ENDED
        self.sequences.remove(sequence)
        self.order.forget(sequence.waiting)
        sequence.kv.sequence = None
        sequence.kv.last_used = now

    def reserve(
        self, kv: SessionKv, num_tokens: int, *, now: float = 0.0, evict: bool = True, num_aside: int = 0
    ) -> bool:
        """As KvMemory.reserve: from what no running sequence holds."""
        return self.memory.reserve(kv, num_tokens, now=now, evict=evict, num_aside=num_aside)

    def truncate(self, kv: SessionKv, num_kv: int) -> None:
        self.memory.truncate(kv, num_kv)

    def drop(self, name: SessionKey | RoundKey) -> None:
        self.memory.drop(name)

    # ----------------------------------------------------------------------------- the next step

    def plan_step(self, now: float = 0.0) -> list[PlannedItem]:
        """The items of the next step; every one has its blocks. Empty when nothing can run."""
        self._num_steps += 1
        decodes = self._choose_decodes(now)
        chosen = {id(s): PlannedItem(s, 1, True) for s in decodes if self._make_room(s, 1, now)}
        waiting = [s for s in self._ready() if s.kv.num_missing > 1]
        prefills = self._order_prefills(waiting, now)
        pace = self._choose_pace([item.sequence for item in chosen.values()], prefills, now)
        budget = self._budget(pace, [item.sequence for item in chosen.values()], prefills)
        may_begin = True
        for place, sequence in enumerate(prefills):
            if budget == 0 or len(chosen) >= self.max_batch:
                break
            if not (may_begin or has_begun(sequence)):
                continue
            behind = partial(self._admission.list_behind, prefills, place)
            if not self._admission.admit(sequence, behind, now):
                may_begin = self._admission.may_others_begin(sequence)
                continue
            budget -= self._plan_prefill(sequence, budget, behind, chosen, now)
        if not chosen and prefills and not any(s.state is SequenceState.RESTORING for s in self.sequences):
            self._force_oldest(prefills, budget, chosen, now)
        # making room for an older sequence may have preempted one chosen before: its KV is gone
        planned = [item for item in chosen.values() if len(item.sequence.kv.block_table) * self.allocator.block_size
                   >= item.sequence.kv.num_kv + item.num_tokens]  # fmt: skip
        planned = self._fit(pace, planned, now)
        self._note_started(planned, waiting, now)
        computed = {id(item.sequence) for item in planned}
        first = next((sequence for sequence in prefills if id(sequence) in computed), None)
        if first is not None:  # one without a place in the batch, or without room, keeps its turn
            self.order.note_turn(first.as_waiting())
        return planned

    def _ready(self) -> Iterator[Sequence]:
        return (s for s in self.sequences if s.state is SequenceState.READY and s.kv.num_missing > 0)

    def _choose_decodes(self, now: float) -> list[Sequence]:
        ready = [s for s in self._ready() if s.kv.num_missing == 1]
        return choose_decodes(ready, self.chunk, self.predictor.costs, max_batch=self.max_batch, now=now)

    def _order_prefills(self, prefills: list[Sequence], now: float) -> list[Sequence]:
        queue = [sequence.as_waiting() for sequence in prefills]
        for sequence, place in zip(prefills, queue, strict=True):
            place.work_s = self.memory.predict_work_s(sequence.kv)
        return [prefills[index] for index in self.order.order(queue, now, self.measure_stretch())]

    def _choose_pace(self, decodes: list[Sequence], prefills: list[Sequence], now: float) -> ChunkParameters:
        if not prefills:
            return self.chunk
        return choose_pace(
            self.chunk,
            self.predictor.costs,
            measure_decoding(decodes),
            [*(sequence.as_waiting() for sequence in prefills), *self.list_unstaged()],
            now,
            num_history=prefills[0].kv.num_kv,
            num_waiting=sum(sequence.kv.num_missing for sequence in prefills),
        )

    def _budget(self, pace: ChunkParameters, decodes: list[Sequence], prefills: list[Sequence]) -> int:
        if not prefills:
            return 0
        budget, _ = self._saver.choose_budget(
            pace,
            self.predictor.costs,
            measure_decoding(decodes),
            step=self._num_steps,
            num_history=prefills[0].kv.num_kv,
            num_waiting=sum(sequence.kv.num_missing for sequence in prefills),
        )
        return budget

    def _plan_prefill(
        self, sequence: Sequence, budget: int, behind: Behind, chosen: dict[int, PlannedItem], now: float
    ) -> int:
        """Plan the next chunk, or first to bring back its KV; how many tokens of the budget that takes."""
        kv = sequence.kv
        if num_restorable := self.memory.count_restorable(kv):
            if self.preemption.reserve(kv, kv.num_kv + num_restorable, sequence.arrival, now=now, behind=behind):
                sequence.state = SequenceState.RESTORING
                self._restores.append(sequence)
            return 0
        num_tokens = min(budget, kv.num_missing)
        if not self._make_room(sequence, num_tokens, now, behind):
            return 0
        chosen[id(sequence)] = PlannedItem(sequence, num_tokens, num_tokens == kv.num_missing)
        return num_tokens

    def _make_room(self, sequence: Sequence, num_tokens: int, now: float, behind: Behind = nobody) -> bool:
        kv = sequence.kv
        if kv.num_missing < num_tokens or (num_tokens == 1 and kv.num_missing != 1):
            return False  # preempted since it was listed
        return self.preemption.reserve(kv, kv.num_kv + num_tokens, sequence.arrival, now=now, behind=behind)

    def _force_oldest(self, prefills: list[Sequence], budget: int, chosen: dict[int, PlannedItem], now: float) -> None:
        """Nothing else can go on: the oldest prefill gets the room of the younger ones."""
        oldest = min(prefills, key=lambda s: s.arrival)
        if self.preemption.reserve(oldest.kv, oldest.kv.num_tokens, oldest.arrival, now=now):
            oldest.admitted = True
            self._plan_prefill(oldest, budget, nobody, chosen, now)

    def _fit(self, pace: ChunkParameters, planned: list[PlannedItem], now: float) -> list[PlannedItem]:
        """The step as a whole keeps to the batch's slack, and to its prefills' deadlines: the last of them give way."""
        prefills = [item for item in planned if item.num_tokens > 1]
        if len(prefills) < 2:
            return planned
        chunks = fit_chunks(
            pace,
            self.predictor.costs,
            [(item.sequence.kv.num_kv, item.num_tokens) for item in prefills],
            sum(item.num_tokens for item in prefills),
            measure_decoding(item.sequence for item in planned if item.num_tokens == 1),
            time_left_s=[item.sequence.as_waiting().ttft_deadline - now if item.samples else inf for item in prefills],
        )
        kept = [item for item in planned if item.num_tokens == 1]
        for item, chunk in zip(prefills, chunks, strict=False):
            whole = chunk == item.num_tokens
            kept.append(item if whole else PlannedItem(item.sequence, chunk, False))
        return kept

    def _note_started(self, planned: list[PlannedItem], waiting: list[Sequence], now: float) -> None:
        """The first steps of sequences; who had come before a prefill that starts now has been passed over."""
        running = {id(item.sequence) for item in planned}
        for item in planned:
            sequence = item.sequence
            if sequence.first_step_at is None:
                sequence.first_step_at = now
                queue = [s for s in waiting if s is sequence or id(s) not in running]
                if len(queue) > 1 and sequence in queue:
                    self.order.note_started([s.as_waiting() for s in queue], queue.index(sequence))

    # -------------------------------------------------------------- what others ask about the queue

    def take_restores(self) -> list[Sequence]:
        """Sequences whose KV is to be brought back from the lower tier, into blocks that they have: it is told by
        making them READY again."""
        restores, self._restores = self._restores, []
        return restores

    def measure_stretch(self) -> float:
        """How much longer prefills take beside the sequences that decode than alone."""
        costs = self.predictor.costs
        if costs is None or not self.order.by_deadline:
            return 1.0
        beside = measure_decoding(s for s in self._ready() if s.kv.num_missing == 1)
        return predict_stretch(self.chunk, costs, beside)

    def count_promised_tokens(self) -> int:
        """KV room that prefills which have begun here still need, to their ends."""
        return self._admission.count_promised_tokens()

    def num_missing_prefill_tokens(self) -> int:
        """Tokens that sequences prefilled here for their own rounds still have to compute."""
        return sum(s.kv.num_missing for s in self._ready() if s.preemptible and s.kv.num_missing > 1)

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""
        self.memory.check_integrity()
