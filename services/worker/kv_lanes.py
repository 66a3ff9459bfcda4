"""The ways that a worker can give and take KV, by --kv-transport."""

from __future__ import annotations

import structlog

from shared.engine.engine_loop import Pool
from shared.errors import AmpdError, ErrorCode
from shared.transport.lanes import Lane, Lanes
from shared.transport.names import TransportName
from shared.transport.region import can_share
from shared.transport.shm_lane import ShmLane

log = structlog.get_logger(__name__)


def wants_shared_pool(transport: TransportName, device: str) -> bool:
    """Whether the KV pool should be memory that peers on this host can map."""
    if device != "cpu" or transport not in ("auto", "shm"):
        return False
    if transport == "auto" and not can_share():
        log.warning("kv_pool_not_shared", reason="this kernel has no sealed memory files: KV goes by sockets")
        return False
    return True


def build_lanes(transport: TransportName, pool: Pool, worker_id: str) -> Lanes:
    """Raises AmpdError INVALID_REQUEST for a way that this pool does not allow, or a package that is not there."""
    match transport:
        case "tcp":
            return Lanes()
        case "shm":
            return Lanes([_build_shm(pool)], streams=False)
        case "nixl":
            from shared.transport.nixl_lane import NixlLane  # loads UCX

            return Lanes([NixlLane(pool, worker_id)], streams=False)
        case "auto":
            lanes: list[Lane] = [_build_shm(pool)] if pool.region is not None and pool.region.is_shared else []
            return Lanes(lanes)


def _build_shm(pool: Pool) -> ShmLane:
    if pool.region is None:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            "--kv-transport shm is for --device cpu and --parallel-degree 1: other KV cannot be mapped as one",
        )
    return ShmLane(pool)
