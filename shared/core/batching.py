"""What goes into the next forward pass: continuous batching with chunked prefill, eviction and preemption.

Decoding sequences go first, one token each; the token budget beside them (chunking.py) goes to prefills in chunks, in
the order of reordering.py. When blocks run out, idle sessions lose the tail of their KV first (retention.py chooses
whose), then a running sequence is preempted: one further behind in the order, where prefills are served by deadline, or
else the *youngest*. Its KV goes to the lower tier if there is one, and comes back from there; else it is computed
again. A decoding sequence is never preempted for a younger one to decode, and the oldest prefill takes its room from
the younger ones when nothing else could go on, so something always makes progress.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from math import inf
from typing import Protocol

from shared.core.batch_limit import Decoding, choose_batch, fits
from shared.core.chunking import ChunkParameters, budget_prefill_tokens, fit_chunks, predict_stretch
from shared.core.kv_blocks import BlockAllocator
from shared.core.reordering import AgedRoom, OrderParameters, PrefillOrder
from shared.core.retention import IdleKv, RetentionName, choose_victim
from shared.core.sequences import PlannedItem, Sequence, SequenceState, SessionKv
from shared.core.step_prediction import StepPredictor
from shared.core.types import RoundKey, SessionKey

__all__ = ["LowerTier", "PlannedItem", "Scheduler", "Sequence", "SequenceState", "SessionKv"]

EVICTION_BLOCKS = 8  # a victim loses its tail in pieces of so many blocks: not one by one, step after step
MAX_ITL_SLO_S = 3_600.0
RESUME_S = 0.2  # from now, and twice the work: when a preempted round whose client waits for its next token is due


class LowerTier(Protocol):
    """Where evicted KV goes."""

    def save(self, kv: SessionKv, num_kept: int, now: float) -> None:
        """Positions [num_kept, kv.num_kv) are about to be given up; num_kept is a multiple of the block size."""

    def drop(self, kv: SessionKv) -> None:
        """The session is forgotten."""

    def holds(self, kv: SessionKv) -> bool: ...

    def count_restorable(self, kv: SessionKv) -> int:
        """Tokens that can be put behind the KV that the session has."""

    def check_integrity(self, sessions: Iterable[SessionKv]) -> None: ...


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
        self.max_batch = max_batch
        self._sizes = ChunkParameters(chunk_tokens=chunk_tokens, max_prefill_tokens=max_prefill_tokens)
        self.room = AgedRoom()  # of the pool: shared by whoever else orders prefills that take from it
        self.order = PrefillOrder(OrderParameters(order="fcfs"), self.room)
        self.follow(ChunkParameters(), OrderParameters(order="fcfs"), "lru", StepPredictor())
        self.lower_tier: LowerTier | None = None
        self.sessions: dict[SessionKey | RoundKey, SessionKv] = {}
        self.sequences: list[Sequence] = []  # by arrival
        self.num_evictions = 0
        self.num_preemptions = 0
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
        self.retention: RetentionName = retention
        self.predictor = predictor

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

    def drop(self, name: SessionKey | RoundKey) -> None:
        """Forget an idle session and free its blocks; unknown names are ignored."""
        kv = self.sessions.pop(name, None)
        if kv is not None:
            assert kv.sequence is None
            self.truncate(kv, 0)
            if self.lower_tier is not None:
                self.lower_tier.drop(kv)

    def truncate(self, kv: SessionKv, num_kv: int) -> None:
        """Forget KV from position `num_kv` on and free the blocks behind it."""
        if kv.revoke_lease is not None and num_kv < kv.num_leased:
            revoke, kv.revoke_lease = kv.revoke_lease, None
            revoke()
        kv.num_kv = min(kv.num_kv, num_kv)
        keep = self.allocator.blocks_for(kv.num_kv)
        surplus = kv.block_table[keep:]
        del kv.block_table[keep:]
        self.allocator.free(surplus, kv)

    def reserve(
        self, kv: SessionKv, num_tokens: int, *, now: float = 0.0, evict: bool = True, num_aside: int = 0
    ) -> bool:
        """Blocks for positions [0, num_tokens), idle sessions' KV evicted if need be; False, and nothing evicted, when
        that is not enough, or would not leave room for `num_aside` tokens."""
        missing = self.allocator.blocks_for(num_tokens) - len(kv.block_table)
        if missing <= 0:
            return True
        num_aside = self.allocator.blocks_for(num_aside)
        if missing + num_aside > self.allocator.num_free:
            idle = self._idle(kv) if evict else []
            if missing + num_aside > self.allocator.num_free + sum(len(victim.block_table) for victim in idle):
                return False
            while missing > self.allocator.num_free:
                victim = self.choose_victim(idle, now)
                assert victim is not None
                self._evict(victim, missing - self.allocator.num_free, now)
                if not victim.block_table:
                    idle.remove(victim)
        kv.block_table += self.allocator.allocate(missing, kv)
        return True

    def reserve_preempting(
        self,
        kv: SessionKv,
        num_tokens: int,
        arrival: float,
        *,
        now: float = 0.0,
        behind: Callable[[], Iterator[Sequence]] = lambda: iter(()),
    ) -> bool:
        """As reserve, and preempts running sequences: those `behind` in the order, then those that arrived after
        `arrival`, youngest first."""
        while not self.reserve(kv, num_tokens, now=now):
            victim = next((s for s in behind() if s.kv is not kv), None)
            if victim is None:
                victim = max(self._preemptible(kv, arrival), key=lambda s: s.arrival, default=None)
            if victim is None:
                return False
            self._preempt(victim, now)
        return True

    def _preempt(self, victim: Sequence, now: float) -> None:
        """Its room goes to another. A round that has begun to produce is soon due again."""
        kv = victim.kv
        victim.num_preemptions += 1
        self.num_preemptions += 1
        victim.admitted = False
        if self.lower_tier is not None and kv.num_kv > 0:
            self.lower_tier.save(kv, 0, now)
        self.truncate(kv, 0)
        if victim.has_produced:
            place = victim.as_waiting()
            place.arrival = now  # it ages from here: its first token was long ago
            place.ttft_deadline = now + 2.0 * self._predict_s(victim) + RESUME_S

    def _predict_s(self, sequence: Sequence) -> float:
        """Until its prefill is computed: what can be restored is, the rest is computed."""
        kv, num_restorable = sequence.kv, self._count_restorable(sequence)
        compute_s = self.predictor.prefill_s(kv.num_kv + num_restorable, kv.num_missing - num_restorable)
        return compute_s + (self.predictor.read_host_s(num_restorable) if num_restorable else 0.0)

    def _predict_work_s(self, sequence: Sequence) -> float:
        """Of the worker's time: the fixed part of a step is not each prefill's own."""
        kv, num_restorable = sequence.kv, self._count_restorable(sequence)
        return self.predictor.work_s(kv.num_kv + num_restorable, kv.num_missing - num_restorable)

    def _count_restorable(self, sequence: Sequence) -> int:
        """All but the last token: its logits are wanted."""
        if self.lower_tier is None:
            return 0
        return max(0, min(self.lower_tier.count_restorable(sequence.kv), sequence.kv.num_missing - 1))

    def choose_victim(self, idle: Iterable[SessionKv], now: float) -> SessionKv | None:
        """Whose KV goes first; None when there is none."""
        chosen = choose_victim((self._describe_idle(kv) for kv in idle), now, self.retention)
        return chosen.key if chosen is not None else None

    def _describe_idle(self, kv: SessionKv) -> IdleKv[SessionKv]:
        if self.retention != "expected_return":
            restore_s = 0.0  # nobody asks
        elif kv.resident:
            restore_s = self.predictor.read_peer_s(kv.num_kv)
        elif self.lower_tier is not None:
            restore_s = self.predictor.read_host_s(kv.num_kv)
        else:
            restore_s = self.predictor.prefill_s(0, kv.num_kv)
        return IdleKv(kv, kv.num_kv, kv.last_used, kv.gaps.mean_s, restore_s)

    def _evict(self, victim: SessionKv, num_blocks: int, now: float) -> None:
        """Free at least `num_blocks` blocks from the tail of an idle session, or all it has."""
        num_blocks += -num_blocks % EVICTION_BLOCKS
        keep = max(0, len(victim.block_table) - num_blocks) * self.allocator.block_size
        self.num_evictions += 1
        if self.lower_tier is not None and victim.num_kv > keep:
            self.lower_tier.save(victim, keep, now)
        self.truncate(victim, keep)

    def _idle(self, asking: SessionKv) -> list[SessionKv]:
        return [
            kv
            for kv in self.sessions.values()
            if kv.sequence is None and not kv.pinned and not kv.lent and kv.block_table and kv is not asking
        ]

    def _preemptible(self, asking: SessionKv, arrival: float) -> list[Sequence]:
        return [
            s
            for s in self.sequences
            if s.state is SequenceState.READY
            and s.preemptible
            and s.kv.block_table
            and s.kv is not asking
            and s.arrival > arrival
        ]

    # ----------------------------------------------------------------------------- the next step

    def plan_step(self, now: float = 0.0) -> list[PlannedItem]:
        """The items of the next step; every one has its blocks. Empty when nothing can run."""
        decodes = self._choose_decodes(now)
        chosen = {id(s): PlannedItem(s, 1, True) for s in decodes if self._make_room(s, 1, now)}
        waiting = [s for s in self._ready() if s.kv.num_missing > 1]
        prefills = self._order_prefills(waiting, now)
        budget = self._budget([item.sequence for item in chosen.values()], prefills)
        may_begin = True
        for place, sequence in enumerate(prefills):
            if budget == 0 or len(chosen) >= self.max_batch:
                break
            if not (may_begin or _has_begun(sequence)):
                continue
            behind = partial(self._list_behind, prefills, place)
            if not self._admit(sequence, behind, now):
                num_lacking = self._count_missing(sequence) * self.allocator.block_size
                may_begin = self.order.may_be_passed(sequence.as_waiting(), num_lacking)
                continue
            budget -= self._plan_prefill(sequence, budget, behind, chosen, now)
        if not chosen and prefills and not any(s.state is SequenceState.RESTORING for s in self.sequences):
            self._force_oldest(prefills, budget, chosen, now)
        # making room for an older sequence may have preempted one chosen before: its KV is gone
        planned = [item for item in chosen.values() if len(item.sequence.kv.block_table) * self.allocator.block_size
                   >= item.sequence.kv.num_kv + item.num_tokens]  # fmt: skip
        planned = self._fit(planned, now)
        self._note_started(planned, waiting, now)
        computed = {id(item.sequence) for item in planned}
        first = next((sequence for sequence in prefills if id(sequence) in computed), None)
        if first is not None:  # one without a place in the batch, or without room, keeps its turn
            self.order.note_turn(first.as_waiting())
        return planned

    def _choose_decodes(self, now: float) -> list[Sequence]:
        """As many as their objectives allow; the last token of a prefill for another worker is not one of them."""
        ready = [s for s in self._ready() if s.kv.num_missing == 1]
        costs = self.predictor.costs
        rounds = [s for s in ready if s.preemptible]
        if costs is None or not self.chunk.limits_batch or not rounds:
            return ready[: self.max_batch]
        decoding = [_as_decoding(sequence, now) for sequence in rounds]
        mean_context = sum(s.kv.num_tokens for s in rounds) / len(rounds)
        if fits(costs, len(rounds), mean_context, self._tightest_itl_slo_s(rounds)):
            return ready[: self.max_batch]
        chosen = [rounds[index] for index in choose_batch(costs, decoding, mean_context, now)]
        return [*(s for s in ready if not s.preemptible), *chosen][: self.max_batch]

    def _order_prefills(self, prefills: list[Sequence], now: float) -> list[Sequence]:
        queue = [sequence.as_waiting() for sequence in prefills]
        for sequence, place in zip(prefills, queue, strict=True):
            place.work_s = self._predict_work_s(sequence)
        return [prefills[index] for index in self.order.order(queue, now, self.measure_stretch())]

    def measure_stretch(self) -> float:
        """How much longer prefills take beside the sequences that decode than alone."""
        costs = self.predictor.costs
        decoding = [s for s in self._ready() if s.kv.num_missing == 1 and s.preemptible]
        if costs is None or not decoding or not self.order.by_deadline:
            return 1.0
        return predict_stretch(
            self.chunk,
            costs,
            batch=len(decoding),
            mean_context=sum(s.kv.num_tokens for s in decoding) / len(decoding),
            itl_slo_s=self._tightest_itl_slo_s(decoding),
        )

    def _fit(self, planned: list[PlannedItem], now: float) -> list[PlannedItem]:
        """The step as a whole keeps to the batch's slack, and to its prefills' deadlines: the last of them give way."""
        prefills = [item for item in planned if item.num_tokens > 1]
        if len(prefills) < 2:
            return planned
        decoding = [item.sequence for item in planned if item.num_tokens == 1 and item.sequence.preemptible]
        batch = len(decoding)
        chunks = fit_chunks(
            self.chunk,
            self.predictor.costs,
            [(item.sequence.kv.num_kv, item.num_tokens) for item in prefills],
            sum(item.num_tokens for item in prefills),
            batch=batch,
            mean_context=sum(s.kv.num_tokens for s in decoding) / batch if batch else 0.0,
            itl_slo_s=self._tightest_itl_slo_s(decoding),
            time_left_s=[item.sequence.as_waiting().ttft_deadline - now if item.samples else inf for item in prefills],
        )
        kept = [item for item in planned if item.num_tokens == 1]
        for item, chunk in zip(prefills, chunks, strict=False):
            whole = chunk == item.num_tokens
            kept.append(item if whole else PlannedItem(item.sequence, chunk, False))
        return kept

    def _budget(self, decodes: list[Sequence], prefills: list[Sequence]) -> int:
        if not prefills:
            return 0
        decoding = [s for s in decodes if s.preemptible]  # not the last token of a prefill for another worker
        return self._budget_beside(decoding, prefills[0].kv.num_kv)

    def _budget_beside(self, decoding: list[Sequence], num_history: int) -> int:
        batch = len(decoding)
        return budget_prefill_tokens(
            self.chunk,
            self.predictor.costs,
            batch=batch,
            mean_context=sum(s.kv.num_tokens for s in decoding) / batch if batch else 0.0,
            itl_slo_s=self._tightest_itl_slo_s(decoding),
            num_history=num_history,
        )

    @staticmethod
    def _tightest_itl_slo_s(decoding: list[Sequence]) -> float:
        return min(MAX_ITL_SLO_S, max(0.0, min((s.itl_slo_s for s in decoding), default=MAX_ITL_SLO_S)))

    def _admit(self, sequence: Sequence, behind: Callable[[], Iterator[Sequence]], now: float) -> bool:
        """Whether a prefill may go on: it begins only with room to its end beside those that have begun. Half-computed
        prefills that wait for each other's room are how a worker collapses.

        Served by deadline, it may take the room of those behind it, if their KV has somewhere to go; served in order
        of arrival, that of all who came later.
        """
        if _has_begun(sequence):
            return True
        place = sequence.as_waiting()
        num_own = self._count_missing(sequence)
        missing = num_own + sum(map(self._count_missing, self._list_admitted()))
        missing += self.allocator.blocks_for(self.order.count_aside(place))
        room = self.allocator.num_free
        if missing > room:
            room += sum(len(kv.block_table) for kv in self._idle(sequence.kv))
        if missing > room and not self.order.by_deadline:
            room += sum(len(s.kv.block_table) for s in self._preemptible(sequence.kv, sequence.arrival))
        yielding: list[Sequence] = []
        if missing > room and self.lower_tier is not None:
            for other in behind():
                yielding.append(other)
                room += len(other.kv.block_table)
                missing -= self._count_missing(other) if other.admitted else 0
                if missing <= room:
                    break
        if missing > room:
            return False
        for other in yielding:
            self._preempt(other, now)
        sequence.admitted = True
        self.order.note_begun(place, num_own * self.allocator.block_size)
        return True

    def _count_missing(self, sequence: Sequence) -> int:
        """Blocks to the end of its prefill."""
        return max(0, self.allocator.blocks_for(sequence.kv.num_tokens) - len(sequence.kv.block_table))

    def _list_admitted(self) -> Iterator[Sequence]:
        return (s for s in self.sequences if s.admitted and s.state is not SequenceState.ENDED and s.kv.num_missing > 1)

    def count_promised_tokens(self) -> int:
        """KV room that prefills which have begun here still need, to their ends."""
        return sum(map(self._count_missing, self._list_admitted())) * self.allocator.block_size

    def _list_behind(self, prefills: list[Sequence], place: int) -> Iterator[Sequence]:
        """Prefills that may have to yield to the one at `place`, the last in the order first. The oldest that has aged
        keeps what it has, it would never get on otherwise, and takes nothing from those in time."""
        if not self.order.by_deadline or self.order.is_oldest_aged(prefills[place].as_waiting()):
            return iter(())
        return (
            other
            for other in reversed(prefills[place + 1 :])
            if other.state is SequenceState.READY
            and other.preemptible
            and other.kv.block_table
            and not self.order.is_oldest_aged(other.as_waiting())
        )

    def _plan_prefill(
        self,
        sequence: Sequence,
        budget: int,
        behind: Callable[[], Iterator[Sequence]],
        chosen: dict[int, PlannedItem],
        now: float,
    ) -> int:
        """Plan the next chunk, or first to bring back its KV; how many tokens of the budget that takes."""
        kv = sequence.kv
        if num_restorable := self._count_restorable(sequence):
            if self.reserve_preempting(kv, kv.num_kv + num_restorable, sequence.arrival, now=now, behind=behind):
                sequence.state = SequenceState.RESTORING
                self._restores.append(sequence)
            return 0
        num_tokens = min(budget, kv.num_missing)
        if not self._make_room(sequence, num_tokens, now, behind):
            return 0
        chosen[id(sequence)] = PlannedItem(sequence, num_tokens, num_tokens == kv.num_missing)
        return num_tokens

    def _force_oldest(self, prefills: list[Sequence], budget: int, chosen: dict[int, PlannedItem], now: float) -> None:
        """Nothing else can go on: the oldest prefill gets the room of the younger ones."""
        oldest = min(prefills, key=lambda s: s.arrival)
        if self.reserve_preempting(oldest.kv, oldest.kv.num_tokens, oldest.arrival, now=now):
            oldest.admitted = True
            self._plan_prefill(oldest, budget, lambda: iter(()), chosen, now)

    def take_restores(self) -> list[Sequence]:
        """Sequences whose KV is to be brought back from the lower tier, into blocks that they have: it is told by
        making them READY again."""
        restores, self._restores = self._restores, []
        return restores

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

    def num_missing_prefill_tokens(self) -> int:
        """Tokens that sequences prefilled here for their own rounds still have to compute."""
        return sum(s.kv.num_missing for s in self._ready() if s.preemptible and s.kv.num_missing > 1)

    def _ready(self) -> Iterator[Sequence]:
        return (s for s in self.sequences if s.state is SequenceState.READY and s.kv.num_missing > 0)

    def _make_room(
        self,
        sequence: Sequence,
        num_tokens: int,
        now: float,
        behind: Callable[[], Iterator[Sequence]] = lambda: iter(()),
    ) -> bool:
        kv = sequence.kv
        if kv.num_missing < num_tokens or (num_tokens == 1 and kv.num_missing != 1):
            return False  # preempted since it was listed
        return self.reserve_preempting(kv, kv.num_kv + num_tokens, sequence.arrival, now=now, behind=behind)

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""
        self.allocator.check_integrity()
        held = sum(len(kv.block_table) for kv in self.sessions.values())
        assert held + self.allocator.num_free == self.allocator.num_usable, "blocks held outside any session"
        for kv in self.sessions.values():
            assert kv.num_kv <= len(kv.block_table) * self.allocator.block_size
            assert kv.num_kv <= kv.num_tokens or kv.sequence is None
        if self.lower_tier is not None:
            self.lower_tier.check_integrity(self.sessions.values())


def _as_decoding(sequence: Sequence, now: float) -> Decoding:
    """Its first token is there since it was first ready to decode."""
    if sequence.first_token_at is None:
        sequence.first_token_at = now
    num_produced = sequence.kv.num_tokens - sequence.output_start
    return Decoding(sequence.first_token_at, num_produced, sequence.itl_slo_s)


def _has_begun(sequence: Sequence) -> bool:
    """It may take room to its end, or had all its blocks reserved before it came here."""
    return sequence.admitted or not sequence.preemptible
