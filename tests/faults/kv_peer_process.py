"""A KV peer in a process of its own, to be killed and stopped: `python kv_peer_process.py sender|receiver JSON`.

Prints one JSON object a line. The sender leases a range and publishes its first half only. The receiver pulls what
it is told, says when the first frame has arrived, and goes on when it reads a line.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import structlog
from kv_pair import make_lanes

from shared.core.types import KvLayout, RoundKey, Segment
from shared.errors import KvTransferError
from shared.transport.client import KvClient, PullRequest
from shared.transport.lanes import Lanes
from shared.transport.leases import LeaseTable
from shared.transport.memory import HostKvMemory
from shared.transport.nixl_lane import NUM_SLOTS, NixlLane
from shared.transport.server import KvServer


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def send(options: dict[str, Any]) -> None:
    layout = KvLayout(**options["layout"])
    family, worker = options["family"], (options["worker_id"], options["incarnation"])
    memory = HostKvMemory(layout, options["num_blocks"], shared=family == "shm")
    memory.blocks.fill(9)
    lanes = make_lanes(family, memory, worker)
    leases = LeaseTable(time.monotonic)
    server = KvServer(
        memory,
        leases,
        worker_id=options["worker_id"],
        incarnation=options["incarnation"],
        secret=options["secret"].encode(),
        listen=[options["listen"]],
        lanes=lanes,
    )
    endpoints = server.start()
    num_tokens = options["num_blocks"] * layout.block_size
    lease = leases.grant(
        RoundKey(*options["key"]),
        range(options["num_blocks"]),
        0,
        num_tokens,
        ttl_s=60,
        on_end=lambda lease, end: say(ended=end.value),
        complete=False,
        num_layers=layout.num_layers,
    )
    lease.publish(Segment(0, layout.num_layers, 0, num_tokens // 2))
    say(endpoints=endpoints, lease_id=lease.lease_id, generation=lease.generation, num_tokens=num_tokens)
    sys.stdin.readline()
    server.close()
    lanes.close()


async def receive(options: dict[str, Any]) -> None:
    family, worker = options["family"], (options["worker_id"], options["incarnation"])
    memory = HostKvMemory(KvLayout(**options["layout"]), options["num_blocks"], shared=family == "shm")
    lanes = make_lanes(family, memory, worker)
    client = KvClient(memory, worker_id=worker[0], incarnation=worker[1], lanes=lanes)
    held = False

    def hold(segment: Segment) -> None:
        nonlocal held
        if not held:
            held = True
            say(arrived=True)
            sys.stdin.readline()

    request = dict(options["request"], key=RoundKey(*options["request"]["key"]), on_segment=hold)
    request["ticket"] = bytes.fromhex(request["ticket"])
    try:
        await client.start_pull(PullRequest(**request)).wait()
        say(result="complete")
    except KvTransferError as error:
        say(result=error.code.value)
    if "watch" in options:
        watch_slots(memory, lanes)
    await client.close()
    lanes.close()


def watch_slots(memory: HostKvMemory, lanes: Lanes) -> None:
    """After a failed pull: the blocks are used for something else; when told to, wait for the slots in quarantine."""
    memory.blocks.fill(3)
    lane = lanes.find("nixl")
    assert isinstance(lane, NixlLane)
    say(quarantined=NUM_SLOTS - lane.num_free_slots)
    sys.stdin.readline()
    until = time.monotonic() + 20.0
    while lane.num_free_slots < NUM_SLOTS and time.monotonic() < until:
        time.sleep(0.01)
    say(quarantined=NUM_SLOTS - lane.num_free_slots, untouched=bool((memory.blocks == 3).all()))


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    if sys.argv[1] == "sender":
        send(json.loads(sys.argv[2]))
    else:
        asyncio.run(receive(json.loads(sys.argv[2])))
