"""Leases on KV of this worker, and how another worker is told of one."""

from __future__ import annotations

from collections.abc import Callable

from services.worker.context import WorkerContext
from shared.core.sequences import SessionKv
from shared.core.types import RoundKey
from shared.messages import KvSource
from shared.transport.leases import Lease, LeaseEnd


def _ignore_lease_end(lease: Lease, end: LeaseEnd) -> None:
    """The session holds the blocks of its history whether anybody reads them or not."""


def grant_history(
    context: WorkerContext,
    key: RoundKey,
    kv: SessionKv,
    num_tokens: int,
    on_end: Callable[[Lease, LeaseEnd], None] = _ignore_lease_end,
) -> Lease:
    """Positions [0, num_tokens), which are there. `on_end` is called in any thread. Raises AmpdError OVERLOADED."""
    return context.leases.grant(
        key,
        tuple(kv.block_table),
        0,
        num_tokens,
        ttl_s=context.limits.lease_ttl_s,
        on_end=on_end,
        complete=True,
        num_layers=context.engine.runner.layout.num_layers,
    )


def describe_source(context: WorkerContext, lease: Lease) -> KvSource:
    """For whoever is to pull it; the coordinator adds the ticket."""
    return KvSource(
        worker_id=context.worker_id,
        incarnation=context.incarnation,
        endpoints=context.kv_endpoints,
        lease_id=lease.lease_id,
        generation=lease.generation,
        ttl_s=lease.ttl_s,
    )
