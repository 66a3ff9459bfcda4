"""A session bound to this worker, and the loan of its KV to another worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from services.worker.context import WorkerContext
from services.worker.kv_leases import describe_source, grant_history
from services.worker.runs import Run
from shared.core.resident_key import resident_key
from shared.core.sequences import SessionKv
from shared.core.types import SessionKey
from shared.errors import AmpdError, ErrorCode
from shared.messages import GrantHistory, HistoryGranted
from shared.transport.leases import Lease, LeaseEnd


@dataclass(eq=False)
class HeldSession:
    """The lock keeps commands about one session in order."""

    kv: SessionKv
    run: Run | None = None
    lent: Lease | None = None  # to the worker that the session moves to
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


async def lend_kv(context: WorkerContext, held: HeldSession, message: GrantHistory) -> HistoryGranted:
    """A lease on what is here of an idle session's KV; a lease granted before ends. With `hold` host memory is brought
    back first and nothing is evicted while the lease lives; else the lease ends before any of its blocks is given up.

    Raises AmpdError KV_LEASE_INVALID when nothing is here, OVERLOADED.
    """
    kv = held.kv
    if message.hold:
        await context.engine.restore(kv, min(message.num_tokens, kv.num_tokens))
    num_tokens = min(message.num_tokens, kv.num_kv)
    if num_tokens == 0:
        raise AmpdError(ErrorCode.KV_LEASE_INVALID, "the session's KV has been evicted")
    if kv.revoke_lease is not None:
        kv.revoke_lease()  # one at a time: a repeated command gets a new one
    key = resident_key(SessionKey(message.tenant, message.session))
    lease = grant_history(context, key, kv, num_tokens, _lease_end_handler(context, held))
    kv.num_leased = num_tokens
    kv.revoke_lease = partial(context.leases.release, lease.lease_id, lease.generation)
    kv.lent = message.hold
    held.lent = lease if message.hold else None
    return HistoryGranted(num_tokens=num_tokens, history=describe_source(context, lease))


def _lease_end_handler(context: WorkerContext, held: HeldSession) -> Callable[[Lease, LeaseEnd], None]:
    """The transport may call it from one of its threads."""
    loop, kv = asyncio.get_running_loop(), held.kv

    def take_back(lease: Lease) -> None:
        if held.lent is lease:
            held.lent, kv.lent = None, False
            context.engine.wake()

    def on_end(lease: Lease, _: LeaseEnd) -> None:
        loop.call_soon_threadsafe(take_back, lease)

    return on_end
