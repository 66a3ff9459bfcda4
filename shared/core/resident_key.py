"""The name of KV that belongs to no round: what a prefill worker keeps of a session, and what moves there ahead of a
round (the lease at the decode worker, and the ticket that the coordinator signs for its pull)."""

from __future__ import annotations

from shared.core.types import RoundKey, SessionKey

NO_ROUND = -1


def resident_key(session: SessionKey) -> RoundKey:
    return RoundKey(session.tenant, session.session, NO_ROUND, 0)
