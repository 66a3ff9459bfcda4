"""KV that prefill workers keep of sessions bound elsewhere: what a session's next prefill need not pull or compute.

Entries are idle and go whenever their blocks are needed, from their tail. Who claims one says what its tokens should
be; how much of that is true is checked here.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable

from shared.core.resident_key import resident_key
from shared.core.sequences import SessionKv
from shared.core.types import RoundKey, SessionKey
from shared.engine.engine_loop import EngineLoop
from shared.messages import PrefillTask, ResidentKv


class Residents:
    """Each is in the scheduler's sessions under its resident_key, so that running work can take its blocks."""

    def __init__(
        self, engine: EngineLoop, *, max_residents: int, on_lost: Callable[[SessionKey], object] = lambda _: None
    ) -> None:
        """on_lost(session): nothing of it is left, though nobody has asked for that."""
        self._engine = engine
        self._scheduler = engine.scheduler
        self._max_residents = max_residents
        self._entries: dict[SessionKey, SessionKv] = {}
        self._on_lost = on_lost

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_tokens(self) -> int:
        return sum(kv.num_kv for kv in self._entries.values())

    @property
    def num_blocks(self) -> int:
        return sum(len(kv.block_table) for kv in self._entries.values() if not kv.pinned)

    def find(self, session: SessionKey) -> SessionKv | None:
        return self._entries.get(session)

    def take(self, kv: SessionKv, name: RoundKey) -> None:
        """The session's entry, or a new one, becomes the KV of a prefill called `name`: pinned until `keep`."""
        if self._entries.pop(kv.key, None) is not None:
            del self._scheduler.sessions[resident_key(kv.key)]
        kv.pinned = True
        self._scheduler.sessions[name] = kv

    def keep(self, kv: SessionKv, name: RoundKey, *, wanted: bool) -> None:
        """The prefill called `name` is over: its KV stays if it is `wanted` and there is room."""
        scheduler, session = self._scheduler, kv.key
        kv.pinned = False
        scheduler.truncate(kv, kv.num_kv)
        lives_here = session in scheduler.sessions  # its decode worker has KV of its own
        if not wanted or lives_here or kv.num_kv == 0 or not self._make_room():
            scheduler.drop(name)
            return
        self.drop(session)
        del scheduler.sessions[name]
        kv.last_used = self._engine.clock()
        kv.told = (kv.num_kv, 0)  # by the prefill's report
        self._entries[session] = scheduler.sessions[resident_key(session)] = kv

    def add(self, kv: SessionKv) -> bool:
        """Enter KV that is about to be pulled; False if there is no room for another entry without losing one."""
        if len(self._entries) >= self._max_residents:
            return False
        self._entries[kv.key] = self._scheduler.sessions[resident_key(kv.key)] = kv
        return True

    def drop(self, session: SessionKey) -> None:
        """Nobody needs it any more; unknown sessions are ignored."""
        if self._entries.pop(session, None) is not None:
            self._scheduler.drop(resident_key(session))
            self._engine.wake()

    def _make_room(self) -> bool:
        if len(self._entries) < self._max_residents:
            return True
        evictable = [kv for kv in self._entries.values() if not kv.pinned]
        victim = self._scheduler.memory.choose_victim(evictable, self._engine.clock())
        if victim is None:
            return False
        self.drop(victim.key)
        self._on_lost(victim.key)
        return True

    def drop_empty(self) -> None:
        """Forget the sessions of which nothing is left."""
        for session, kv in list(self._entries.items()):
            if kv.num_kv == 0 and not kv.pinned and not self._engine.count_restorable(kv):
                self.drop(session)
                self._on_lost(session)

    def hand_back(self, own: SessionKv, tokens: array[int]) -> SessionKv:
        """The session decodes here from now on, with these tokens: of the KV that it has of its own and what was kept,
        the one that goes further is its own from now on, the other is dropped."""
        session, scheduler = own.key, self._scheduler
        kv = self._entries.pop(session, None)
        if kv is None:
            return own
        name = resident_key(session)
        num_shared = count_shared_tokens(kv, tokens)
        reach = min(num_shared, kv.num_kv + self._engine.count_restorable(kv))
        own_reach = min(count_shared_tokens(own, tokens), own.num_kv + self._engine.count_restorable(own))
        if reach <= own_reach:
            scheduler.drop(name)
            return own
        del scheduler.sessions[name]
        scheduler.drop(session)
        scheduler.sessions[session] = kv
        kv.resident = False
        kv.tokens, kv.tokens_base, kv.checksum = tokens[:num_shared], 0, 0
        kv.gaps, kv.last_round = own.gaps, own.last_round
        scheduler.truncate(kv, num_shared)
        return kv

    def check_integrity(self) -> None:
        """Assert that every entry is idle, and known to the scheduler under its own name."""
        assert len(self._entries) <= self._max_residents
        for session, kv in self._entries.items():
            assert self._scheduler.sessions.get(resident_key(session)) is kv
            assert kv.resident
            assert kv.sequence is None
            assert kv.num_kv <= kv.num_tokens or kv.pinned


def is_known(kv: SessionKv, claim: ResidentKv | None) -> bool:
    """Whether the tokens that `kv` was computed from begin as `claim` says."""
    return claim is not None and kv.identify(claim.num_tokens) == (claim.num_tokens, claim.checksum)


def count_shared_tokens(kv: SessionKv, tokens: array[int]) -> int:
    """How many of `tokens`, from position 0 on, are known to be those that `kv` was computed from."""
    base = kv.tokens_base
    if base > len(tokens) or zlib.crc32(tokens[:base].tobytes()) != kv.checksum:
        return 0
    return base + _count_equal(kv.tokens, tokens[base:])


def _count_equal(mine: array[int], theirs: array[int]) -> int:
    length = min(len(mine), len(theirs))
    if mine[:length] == theirs[:length]:
        return length
    return next(index for index in range(length) if mine[index] != theirs[index])


def count_common_tokens(kv: SessionKv, task: PrefillTask, tokens: array[int]) -> int:
    """How many tokens, from position 0 on, `kv` is known to share with the task's prompt.

    `tokens` are the prompt's from task.num_cached_tokens on. Of either side the tokens before some position are known
    by their checksum alone; what is not known to be equal does not count.
    """
    cached, base = task.num_cached_tokens, kv.tokens_base
    if base <= cached:
        joined = kv.identify(cached) == (cached, task.prefix_checksum)
    else:
        bridge = tokens[: base - cached]
        joined = len(bridge) == base - cached and zlib.crc32(bridge.tobytes(), task.prefix_checksum) == kv.checksum
    if not joined:
        claim = task.resident
        return min(claim.num_tokens, cached) if claim is not None and is_known(kv, claim) else 0
    start = max(base, cached)
    return start + _count_equal(kv.tokens[start - base :], tokens[start - cached :])
