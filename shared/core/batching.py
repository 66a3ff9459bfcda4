"""What goes into the next forward pass: continuous batching with chunked prefill, eviction and preemption.

Decoding sequences go first, one token each; what is left of the token budget goes to prefills, oldest first, in
chunks (Sarathi-Serve, arXiv 2403.02310). When blocks run out, idle sessions lose their KV first (least recently used
first), then the *youngest* running sequence is preempted and later computed again. The oldest sequence is never
preempted for a younger one, so something always makes progress.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from shared.core.kv_blocks import BlockAllocator
from shared.core.types import RoundKey, SessionKey
from shared.messages import SamplingParams


class SequenceState(Enum):
    WAITING_KV = "waiting_kv"  # its prefill runs on another worker; its blocks may be read or written by a transfer
    READY = "ready"  # has tokens to compute
    ENDED = "ended"


@dataclass(eq=False)
class SessionKv:
    """Tokens of one session and the KV this worker holds of them.

    Invariant: positions [0, num_kv) have valid KV in block_table; num_kv <= num_tokens.
    `tokens[0]` is at position `tokens_base` (more than 0 only for a prefill whose history was pulled as KV).
    """

    key: SessionKey
    tokens: array[int] = field(default_factory=lambda: array("i"))
    tokens_base: int = 0
    num_kv: int = 0
    block_table: list[int] = field(default_factory=list)
    last_used: float = 0.0
    sequence: Sequence | None = None
    pinned: bool = False  # a transfer reads or writes its blocks: not to be evicted even while no sequence runs

    @property
    def num_tokens(self) -> int:
        return self.tokens_base + len(self.tokens)

    @property
    def num_missing(self) -> int:
        """Tokens that are known and whose KV is not."""
        return self.num_tokens - self.num_kv


@dataclass(eq=False)
class Sequence:
    """One attempt at a round while it runs on this worker."""

    key: RoundKey
    kv: SessionKv
    sampling: SamplingParams
    output_start: int  # position of the first output token
    arrival: float
    state: SequenceState = SequenceState.READY
    preemptible: bool = True  # False: all its blocks are reserved up front, and a transfer reads them
    on_layer: Callable[[int, int, int], object] | None = None  # (layer, token_start, token_stop), in the forward thread
    num_preemptions: int = 0
    first_step_at: float | None = None


@dataclass(frozen=True, slots=True)
class PlannedItem:
    """Feed `num_tokens` tokens of the sequence from position kv.num_kv on; `samples`: none is missing after them."""

    sequence: Sequence
    num_tokens: int
    samples: bool


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
        """chunk_tokens bounds the prefill part of a step that also decodes, max_prefill_tokens of one that does not."""
        self.allocator = allocator
        self.chunk_tokens = chunk_tokens
        self.max_prefill_tokens = max_prefill_tokens
        self.max_batch = max_batch
        self.sessions: dict[SessionKey | RoundKey, SessionKv] = {}
        self.sequences: list[Sequence] = []  # by arrival
        self.num_evictions = 0
        self.num_preemptions = 0

    # ------------------------------------------------------------------ sessions and sequences

    def add(self, sequence: Sequence) -> None:
        assert sequence.kv.sequence is None, "a session runs one round at a time"
        sequence.kv.sequence = sequence
        self.sequences.append(sequence)

    def remove(self, sequence: Sequence, now: float) -> None:
        """The sequence leaves; its session keeps its KV and is idle."""
        sequence.state = SequenceState.ENDED
        self.sequences.remove(sequence)
        sequence.kv.sequence = None
        sequence.kv.last_used = now

    def drop(self, name: SessionKey | RoundKey) -> None:
        """Forget an idle session and free its blocks; unknown names are ignored."""
        kv = self.sessions.pop(name, None)
        if kv is not None:
            assert kv.sequence is None
            self.truncate(kv, 0)

    def truncate(self, kv: SessionKv, num_kv: int) -> None:
        """Forget KV from position `num_kv` on and free the blocks behind it."""
        kv.num_kv = min(kv.num_kv, num_kv)
        keep = self.allocator.blocks_for(kv.num_kv)
        surplus = kv.block_table[keep:]
        del kv.block_table[keep:]
        self.allocator.free(surplus, kv)

    def reserve(self, kv: SessionKv, num_tokens: int) -> bool:
        """Blocks for positions [0, num_tokens), idle sessions' KV evicted if need be; False when that is not enough."""
        missing = self.allocator.blocks_for(num_tokens) - len(kv.block_table)
        while missing > self.allocator.num_free:
            victim = self._idle_victim(kv)
            if victim is None:
                return False
            self.num_evictions += 1
            self.truncate(victim, 0)
        if missing > 0:
            kv.block_table += self.allocator.allocate(missing, kv)
        return True

    def reserve_preempting(self, kv: SessionKv, num_tokens: int, arrival: float) -> bool:
        """As reserve, and preempts running sequences that arrived after `arrival`, youngest first."""
        while not self.reserve(kv, num_tokens):
            victim = self._running_victim(kv, arrival)
            if victim is None:
                return False
            victim.num_preemptions += 1
            self.num_preemptions += 1
            self.truncate(victim.kv, 0)
        return True

    def _idle_victim(self, asking: SessionKv) -> SessionKv | None:
        idle = [
            kv
            for kv in self.sessions.values()
            if kv.sequence is None and not kv.pinned and kv.block_table and kv is not asking
        ]
        return min(idle, key=lambda kv: kv.last_used, default=None)

    def _running_victim(self, asking: SessionKv, arrival: float) -> Sequence | None:
        running = [
            s
            for s in self.sequences
            if s.state is SequenceState.READY
            and s.preemptible
            and s.kv.block_table
            and s.kv is not asking
            and s.arrival > arrival
        ]
        return max(running, key=lambda s: s.arrival, default=None)

    # ----------------------------------------------------------------------------- the next step

    def plan_step(self) -> list[PlannedItem]:
        """The items of the next step; every one has its blocks. Empty when nothing can run."""
        decodes = [s for s in self._ready() if s.kv.num_missing == 1][: self.max_batch]
        chosen = {id(s): PlannedItem(s, 1, True) for s in decodes if self._make_room(s, 1)}
        budget = self.chunk_tokens if chosen else self.max_prefill_tokens
        for sequence in [s for s in self._ready() if s.kv.num_missing > 1]:
            if budget == 0 or len(chosen) >= self.max_batch:
                break
            num_tokens = min(budget, sequence.kv.num_missing)
            if self._make_room(sequence, num_tokens):
                chosen[id(sequence)] = PlannedItem(sequence, num_tokens, num_tokens == sequence.kv.num_missing)
                budget -= num_tokens
        # making room for an older sequence may have preempted one chosen before: its KV is gone
        return [item for item in chosen.values() if len(item.sequence.kv.block_table) * self.allocator.block_size
                >= item.sequence.kv.num_kv + item.num_tokens]  # fmt: skip

    def num_missing_prefill_tokens(self) -> int:
        """Tokens that sequences prefilled here for their own rounds still have to compute."""
        return sum(s.kv.num_missing for s in self._ready() if s.preemptible and s.kv.num_missing > 1)

    def _ready(self) -> Iterator[Sequence]:
        return (s for s in self.sequences if s.state is SequenceState.READY and s.kv.num_missing > 0)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        kv = sequence.kv
        if kv.num_missing < num_tokens or (num_tokens == 1 and kv.num_missing != 1):
            return False  # preempted since it was listed
        return self.reserve_preempting(kv, kv.num_kv + num_tokens, sequence.arrival)

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""
        self.allocator.check_integrity()
        held = sum(len(kv.block_table) for kv in self.sessions.values())
        assert held + self.allocator.num_free == self.allocator.num_usable, "blocks held outside any session"
        for kv in self.sessions.values():
            assert kv.num_kv <= len(kv.block_table) * self.allocator.block_size
            assert kv.num_kv <= kv.num_tokens or kv.sequence is None
