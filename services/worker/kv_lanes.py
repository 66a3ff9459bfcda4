"""The ways that a worker can give and take KV, by --kv-transport."""

from __future__ import annotations

import structlog

from shared.engine.engine_loop import Pool
from shared.errors import AmpdError, ErrorCode
from shared.transport.lanes import Lane, Lanes
from shared.transport.names import TransportName
from shared.transport.nixl_agent import NixlError, is_installed
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
            return Lanes([_build_nixl(pool, worker_id)], streams=False)
        case "auto" if pool.region is not None:
            return Lanes([_build_shm(pool)] if pool.region.is_shared else [])
        case "auto":
            return Lanes(_try_nixl(pool, worker_id))


def _try_nixl(pool: Pool, worker_id: str) -> list[Lane]:
    """For KV on a device, where the package is installed: the sockets' way goes through host memory."""
    if pool.flat is None or not is_installed():
        return []
    try:
        return [_build_nixl(pool, worker_id)]
    except NixlError as error:
        log.warning("kv_not_by_nixl", reason=str(error), instead="sockets, through host memory")
        return []


def _build_nixl(pool: Pool, worker_id: str) -> Lane:
    from shared.transport.nixl_lane import NixlLane  # loads UCX

    return NixlLane(pool, worker_id)


def _build_shm(pool: Pool) -> ShmLane:
    if pool.region is None:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            "--kv-transport shm is for --device cpu and --parallel-degree 1: other KV cannot be mapped as one",
        )
    return ShmLane(pool)
