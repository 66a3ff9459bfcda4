"""The lanes of one family: those, and no others."""

from __future__ import annotations

from shared.transport.lanes import Lanes
from shared.transport.memory import HostKvMemory
from shared.transport.shm_lane import ShmLane


def build_lanes(family: str, memory: HostKvMemory, worker_id: str) -> Lanes:
    if family == "shm":
        return Lanes([ShmLane(memory)], streams=False)
    if family.startswith("nixl"):
        from shared.transport.nixl_lane import NixlLane

        return Lanes([NixlLane(memory, worker_id)], streams=False)
    return Lanes()
