"""KV that prefill workers keep of sessions bound elsewhere: what a session's next prefill need not pull or compute.

Entries are idle and go whenever their blocks are needed, from their tail. Who claims one says what its tokens should
be; how much of that is true is checked here.
"""

from __future__ import annotations

import zlib
from array import array
from collections import deque

from shared.core.resident_key import resident_key
from shared.core.sequences import SessionKv
from shared.core.types import RoundKey, SessionKey
from shared.engine.engine_loop import EngineLoop
from shared.messages import PrefillTask, ResidentKv, SessionRef

MAX_LOST = 4096  # remembered for the heartbeats to come


class Residents:
    """Each is in the scheduler's sessions under its resident_key, so that running work can take its blocks."""

    def __init__(self, engine: EngineLoop, *, max_residents: int) -> None:
        self._engine = engine
        self._scheduler = engine.scheduler
        self._max_residents = max_residents
        self._entries: dict[SessionKey, SessionKv] = {}
        self._lost: deque[SessionKey] = deque(maxlen=MAX_LOST)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_tokens(self) -> int:
        return sum(kv.num_kv for kv in self._entries.values())

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
        if not wanted or kv.num_kv == 0 or not self._make_room():
            scheduler.drop(name)
            return
        self.drop(session)
        del scheduler.sessions[name]
        kv.last_used = self._engine.clock()
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
        victim = self._scheduler.choose_victim(evictable, self._engine.clock())
        if victim is None:
            return False
        self.drop(victim.key)
        self._lost.append(victim.key)
        return True

    def collect_lost(self, limit: int) -> tuple[SessionRef, ...]:
        """Sessions of which nothing is left since the last call, at most `limit`; the others come next time."""
        tier = self._engine.host_tier
        for session, kv in list(self._entries.items()):
            if kv.num_kv == 0 and not kv.pinned and not (tier is not None and tier.holds(kv)):
                self.drop(session)
                self._lost.append(session)
        lost: list[SessionRef] = []
        while self._lost and len(lost) < limit:
            session = self._lost.popleft()
            if session not in self._entries:  # it may have come back
                lost.append(SessionRef(tenant=session.tenant, session=session.session))
        return tuple(lost)

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
    mine, theirs = kv.tokens[start - base :], tokens[start - cached :]
    length = min(len(mine), len(theirs))
    if mine[:length] == theirs[:length]:
        return start + length
    return start + next(index for index in range(length) if mine[index] != theirs[index])
