"""The KV memory of one worker: which session holds which blocks, and whose KV goes when there is no room.

Idle sessions lose the tail of their KV (retention.py chooses whose), to the lower tier if there is one. What running
sequences lose is preemption.py's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from shared.core.kv_blocks import BlockAllocator
from shared.core.retention import IdleKv, RetentionName, choose_victim
from shared.core.sequences import SessionKv
from shared.core.step_prediction import StepPredictor
from shared.core.types import RoundKey, SessionKey

EVICTION_BLOCKS = 8  # a victim loses its tail in pieces of so many blocks: not one by one, step after step


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


class KvMemory:
    """Invariant: every block is free, or in the table of one of `sessions`. `follow` says whose KV goes."""

    def __init__(self, allocator: BlockAllocator) -> None:
        self.allocator = allocator
        self.sessions: dict[SessionKey | RoundKey, SessionKv] = {}
        self.lower_tier: LowerTier | None = None
        self.num_evictions = 0
        self.follow("lru", StepPredictor())

    def follow(self, retention: RetentionName, predictor: StepPredictor) -> None:
        self.retention: RetentionName = retention
        self.predictor = predictor

    # --------------------------------------------------------------------------- taking and giving

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
            idle = self.list_idle(kv) if evict else []
            if missing + num_aside > self.allocator.num_free + sum(len(victim.block_table) for victim in idle):
                return False
            while missing > self.allocator.num_free:
                victim = self.choose_victim(idle, now)
                assert victim is not None
                self.evict(victim, missing - self.allocator.num_free, now)
                if not victim.block_table:
                    idle.remove(victim)
        kv.block_table += self.allocator.allocate(missing, kv)
        return True

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

    def give_up(self, kv: SessionKv, num_kept: int, now: float) -> None:
        """As truncate, to the lower tier if there is one; num_kept is a multiple of the block size."""
        if self.lower_tier is not None and kv.num_kv > num_kept:
            self.lower_tier.save(kv, num_kept, now)
        self.truncate(kv, num_kept)

    def drop(self, name: SessionKey | RoundKey) -> None:
        """Forget an idle session and free its blocks; unknown names are ignored."""
        kv = self.sessions.pop(name, None)
        if kv is not None:
            assert kv.sequence is None
            self.truncate(kv, 0)
            if self.lower_tier is not None:
                self.lower_tier.drop(kv)

    # ------------------------------------------------------------------------------ whose KV goes

    def list_idle(self, asking: SessionKv) -> list[SessionKv]:
        """Who may lose KV to the one that asks."""
        return [
            kv
            for kv in self.sessions.values()
            if kv.sequence is None and not kv.pinned and not kv.lent and kv.block_table and kv is not asking
        ]

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

    def evict(self, victim: SessionKv, num_blocks: int, now: float) -> None:
        """Free at least `num_blocks` blocks from the tail of an idle session, or all it has."""
        num_blocks += -num_blocks % EVICTION_BLOCKS
        keep = max(0, len(victim.block_table) - num_blocks) * self.allocator.block_size
        self.num_evictions += 1
        self.give_up(victim, keep, now)

    # -------------------------------------------------------------- what a session's prefill lacks

    def count_missing_blocks(self, kv: SessionKv) -> int:
        """To the end of its tokens."""
        return max(0, self.allocator.blocks_for(kv.num_tokens) - len(kv.block_table))

    def count_restorable(self, kv: SessionKv) -> int:
        """Of its missing tokens, those that the lower tier has; not the last token: its logits are wanted."""
        if self.lower_tier is None:
            return 0
        return max(0, min(self.lower_tier.count_restorable(kv), kv.num_missing - 1))

    def predict_s(self, kv: SessionKv) -> float:
        """Until its KV is complete: what can be restored is, the rest is computed."""
        num_restorable = self.count_restorable(kv)
        compute_s = self.predictor.prefill_s(kv.num_kv + num_restorable, kv.num_missing - num_restorable)
        return compute_s + (self.predictor.read_host_s(num_restorable) if num_restorable else 0.0)

    def predict_work_s(self, kv: SessionKv) -> float:
        """Of the worker's time: the fixed part of a step is not each prefill's own."""
        num_restorable = self.count_restorable(kv)
        return self.predictor.work_s(kv.num_kv + num_restorable, kv.num_missing - num_restorable)

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
