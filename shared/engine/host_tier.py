"""Host memory as a second tier for KV: what is evicted from the pool goes here, and comes back before the next round.

Bounded: a fixed number of buffers of one KV block each. When they are all used, the session that retention puts first
loses the tail of what it has here. Where the pool has no views the bytes pass through its staging memory; for CUDA
that has not been run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shared.core.retention import IdleKv, RetentionName, choose_victim
from shared.core.sequences import SessionKv
from shared.core.step_prediction import StepPredictor
from shared.core.types import KvLayout, Segment
from shared.transport.protocol import as_staged


class HostViews(Protocol):
    layout: KvLayout

    def segment_views(self, block_table: Sequence[int], segment: Segment) -> list[memoryview]: ...


@dataclass(eq=False)
class HostKv:
    """KV of positions [first_block * block_size, num_tokens) of one session, a buffer a block.

    `identity` is that of the tokens it was computed from (see SessionKv.identify).
    """

    first_block: int
    buffers: list[int]
    num_tokens: int
    identity: tuple[int, int]


class HostTier:
    """The LowerTier of a Scheduler. All methods but `read` are for the loop that owns the scheduler."""

    def __init__(
        self,
        pool: HostViews,
        *,
        num_blocks: int,
        retention: RetentionName = "lru",
        predictor: StepPredictor | None = None,
    ) -> None:
        """num_blocks: buffers, of the pool's bytes a block (memory is touched as they are first used)."""
        self._pool = pool
        self._staged = as_staged(pool)
        self._num_layers = pool.layout.num_layers
        self._block_size = pool.layout.block_size
        self._retention: RetentionName = retention
        self._predictor = predictor or StepPredictor()
        self._buffers = np.empty((num_blocks, pool.layout.bytes_per_block), dtype=np.uint8)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._entries: dict[SessionKv, HostKv] = {}
        self._taken: list[HostKv] = []  # being copied back
        self.num_saved_tokens = 0  # since the start
        self.num_restored_tokens = 0

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens - entry.first_block * self._block_size for entry in self._entries.values())

    def holds(self, kv: SessionKv) -> bool:
        return kv in self._entries

    def count_restorable(self, kv: SessionKv) -> int:
        entry = self._entries.get(kv)
        return entry.num_tokens - kv.num_kv if entry is not None and self._is_usable(entry, kv) else 0

    def _is_usable(self, entry: HostKv, kv: SessionKv) -> bool:
        """It goes on where the KV in the pool ends, and is of the same tokens."""
        joins = entry.first_block * self._block_size <= kv.num_kv < entry.num_tokens
        return joins and kv.identify(entry.identity[0]) == entry.identity

    # -------------------------------------------------------------------------------- from the pool

    def save(self, kv: SessionKv, num_kept: int, now: float) -> None:
        """Copy positions [num_kept, kv.num_kv), or as much from its start as there is room for."""
        first, stop = num_kept // self._block_size, -(-kv.num_kv // self._block_size)
        behind = self._entries.pop(kv, None)  # what an earlier eviction took from the session's tail
        if behind is not None and not self._continues(behind, kv, stop):
            self.release(behind)
            behind = None
        self._make_room(stop - first, now)
        if behind is not None and len(self._free) < stop - first:
            self.release(behind)  # the nearer positions are worth more: without them those behind are worth nothing
            behind = None
        count = min(stop - first, len(self._free))
        if count == 0:
            return
        buffers = [self._free.pop() for _ in range(count)]
        for index, buffer in enumerate(buffers, start=first):
            self._copy_out(kv.block_table, index, buffer)
        num_tokens = min(kv.num_kv, (first + count) * self._block_size)
        self.num_saved_tokens += num_tokens - num_kept
        if behind is None:
            self._entries[kv] = HostKv(first, buffers, num_tokens, kv.identify(num_tokens))
        else:
            self._entries[kv] = HostKv(first, buffers + behind.buffers, behind.num_tokens, behind.identity)

    def _continues(self, behind: HostKv, kv: SessionKv, stop_block: int) -> bool:
        """Whether `behind` begins where the KV to be saved ends, and is of the same tokens."""
        aligned = kv.num_kv == stop_block * self._block_size
        return aligned and behind.first_block == stop_block and kv.identify(behind.identity[0]) == behind.identity

    def _make_room(self, num_buffers: int, now: float) -> None:
        """At the cost of idle sessions: what a preempted round has here it needs soon."""
        while len(self._free) < num_buffers:
            idle = (self._describe(kv, entry) for kv, entry in self._entries.items() if kv.sequence is None)
            victim = choose_victim(idle, now, self._retention)
            if victim is None:
                return
            entry = self._entries[victim.key]
            keep = max(0, len(entry.buffers) - (num_buffers - len(self._free)))
            self._free += entry.buffers[keep:]
            del entry.buffers[keep:]
            entry.num_tokens = min(entry.num_tokens, (entry.first_block + keep) * self._block_size)
            if not entry.buffers:
                del self._entries[victim.key]

    def _describe(self, kv: SessionKv, entry: HostKv) -> IdleKv[SessionKv]:
        held = entry.num_tokens - entry.first_block * self._block_size
        restore_s = self._predictor.read_peer_s(held) if kv.resident else self._predictor.prefill_s(0, held)
        return IdleKv(kv, held, kv.last_used, kv.gaps.mean_s, restore_s)

    # -------------------------------------------------------------------------------- back to the pool

    def take(self, kv: SessionKv) -> HostKv | None:
        """What can be put behind the KV that the session has; to be ended by `release` or `put_back`."""
        entry = self._entries.pop(kv, None)
        if entry is None:
            return None
        if not self._is_usable(entry, kv):
            self.release(entry)
            return None
        self._taken.append(entry)
        return entry

    def put_back(self, kv: SessionKv, entry: HostKv) -> None:
        self._taken.remove(entry)
        self._entries[kv] = entry

    def read(self, entry: HostKv, block_table: Sequence[int], start: int, stop: int) -> None:
        """Copy the blocks of positions [start, stop) into the pool. In any thread; they must be held meanwhile."""
        for index in range(start // self._block_size, -(-stop // self._block_size)):
            self._copy_in(block_table, index, entry.buffers[index - entry.first_block])
        self.num_restored_tokens += stop - start

    def release(self, entry: HostKv) -> None:
        if entry in self._taken:
            self._taken.remove(entry)
        self._free += entry.buffers

    def drop(self, kv: SessionKv) -> None:
        entry = self._entries.pop(kv, None)
        if entry is not None:
            self.release(entry)

    # -------------------------------------------------------------------------------- bytes

    def _copy_out(self, block_table: Sequence[int], index: int, buffer: int) -> None:
        row = self._buffers[buffer]
        if self._staged is not None:
            row[:] = np.frombuffer(self._staged.read_segment(block_table, self._block(index)), np.uint8)
            return
        offset = 0
        for view in self._pool.segment_views(block_table, self._block(index)):
            row[offset : offset + view.nbytes] = np.frombuffer(view, np.uint8)
            offset += view.nbytes

    def _copy_in(self, block_table: Sequence[int], index: int, buffer: int) -> None:
        row = self._buffers[buffer]
        if self._staged is not None:
            self._staged.write_segment(block_table, self._block(index), row.data)
            return
        offset = 0
        for view in self._pool.segment_views(block_table, self._block(index)):
            np.frombuffer(view, np.uint8)[:] = row[offset : offset + view.nbytes]
            offset += view.nbytes

    def _block(self, index: int) -> Segment:
        return Segment(0, self._num_layers, index * self._block_size, (index + 1) * self._block_size)

    def check_integrity(self, sessions: Iterable[SessionKv]) -> None:
        """Assert that every buffer is free or has one holder, and every holder is a session that lives."""
        entries = [*self._entries.values(), *self._taken]
        held = [buffer for entry in entries for buffer in entry.buffers]
        assert len({*held, *self._free}) == len(held) + len(self._free) == len(self._buffers), "a host buffer is lost"
        assert self._entries.keys() <= set(sessions), "host memory is held for a session that is gone"
        for entry in entries:
            stop = (entry.first_block + len(entry.buffers)) * self._block_size
            assert entry.first_block * self._block_size < entry.num_tokens <= stop
