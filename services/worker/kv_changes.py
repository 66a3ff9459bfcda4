"""What the coordinator is told of idle sessions' KV that went, or came back, on its own: in heartbeats, as changes.

`SessionKv.told` is what it knows: from these, or from the report that ended the session's last round here. A heartbeat
may be lost, so it is what the coordinator believes, and no more.
"""

from __future__ import annotations

from collections import deque

from shared.core.resident_key import resident_key
from shared.core.types import SessionKey
from shared.engine.engine_loop import EngineLoop
from shared.messages import KvHeld

MAX_GONE = 4096  # remembered for the heartbeats to come
NOT_TOLD = (-1, -1)


class KvChanges:
    def __init__(self, engine: EngineLoop) -> None:
        self._engine = engine
        self._gone: deque[SessionKey] = deque(maxlen=MAX_GONE)

    def note_gone(self, session: SessionKey) -> None:
        """Nothing is left of it, not even its name."""
        self._gone.append(session)

    def collect(self, limit: int) -> tuple[KvHeld, ...]:
        """Changes since the last call, at most `limit`; the others come next time."""
        sessions = self._engine.scheduler.sessions
        changes: list[KvHeld] = []
        while self._gone and len(changes) < limit:
            session = self._gone.popleft()
            if session not in sessions and resident_key(session) not in sessions:  # it may have come back
                changes.append(KvHeld(tenant=session.tenant, session=session.session, num_device_tokens=0))
        for kv in sessions.values():
            if len(changes) >= limit:
                break
            if kv.sequence is not None or kv.pinned or (kv.resident and kv.key in sessions):
                continue
            held = kv.num_kv, self._engine.count_restorable(kv)
            if held != kv.told:
                kv.told = held
                changes.append(
                    KvHeld(
                        tenant=kv.key.tenant,
                        session=kv.key.session,
                        num_device_tokens=held[0],
                        num_host_tokens=held[1],
                    )
                )
        return tuple(changes)
