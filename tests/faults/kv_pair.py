"""A KV sender and a KV receiver in this process, over real sockets: what the fault tests act on."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kv_proxy import FaultProxy, Tamper

from shared.core.types import KvLayout, RoundKey, Segment
from shared.engine.device_bytes import DeviceBytes
from shared.errors import KvTransferError
from shared.transport.client import KvClient, PullRequest
from shared.transport.lanes import Lanes
from shared.transport.leases import Lease, LeaseEnd, LeaseTable
from shared.transport.memory import HostKvMemory
from shared.transport.nixl_lane import NixlLane
from shared.transport.protocol import CHUNK_BYTES
from shared.transport.server import KvServer
from shared.transport.shm_lane import ShmLane
from shared.transport.tickets import TicketClaims, mint

SECRET = b"the ticket secret of these tests"
SMALL = KvLayout("model", 3, 2, 8, 4, "float32")  # 1.5 KiB a block
LARGE = KvLayout("model", 4, 8, 64, 16, "float32")  # 256 KiB a block
SENDER, RECEIVER = ("sender", 11), ("receiver", 22)  # worker id, incarnation

ON_UNIX_SOCKETS = ("unix", "shm")
UCX_OVER_TCP = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}  # read when an agent is made


def make_lanes(family: str, memory: HostKvMemory, worker: tuple[str, int], *, streams: bool = False) -> Lanes:
    """Of a worker that can do nothing else, but for streams if it may."""
    match family:
        case "shm":
            shm = ShmLane(memory)
            shm.chunk_bytes = CHUNK_BYTES  # as many frames as the others have
            return Lanes([shm], streams=streams)
        case "nixl" | "nixl-torch":
            if family == "nixl-torch":  # as a pool on a device is copied and sampled
                memory.flat = DeviceBytes(torch.frombuffer(memory.region.data, dtype=torch.uint8))  # type: ignore[assignment]
            return Lanes([NixlLane(memory, worker[0], chunk_bytes=CHUNK_BYTES)], streams=streams)
        case "nixl-tcp":  # as between hosts without RDMA: a read goes on only with its sender's help
            with pytest.MonkeyPatch.context() as patch:
                for name, value in UCX_OVER_TCP.items():
                    patch.setenv(name, value)
                return make_lanes("nixl", memory, worker, streams=streams)
        case _:
            return Lanes()


class ManualClock:
    """Monotonic seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class KvPair:
    """`source` has random bytes; `target` starts as zeros. Leases live by `clock`."""

    def __init__(
        self,
        family: str,
        folder: Path,
        *,
        layout: KvLayout = SMALL,
        num_blocks: int = 40,
        target_layout: KvLayout | None = None,
        max_concurrent: int = 32,
        max_connections: int = 256,
        handshake_timeout_s: float = 5.0,
        streams: bool = False,
    ) -> None:
        self.layout = layout
        self.family = family
        self.folder = folder
        self.source = HostKvMemory(layout, num_blocks, shared=family == "shm")
        self.target = HostKvMemory(target_layout or layout, num_blocks, shared=family == "shm")
        self.lanes = [
            make_lanes(family, memory, worker, streams=streams)
            for memory, worker in ((self.source, SENDER), (self.target, RECEIVER))
        ]
        self.random = np.random.default_rng(5)
        self.source.blocks[:] = self.random.integers(1, 256, self.source.blocks.shape, dtype=np.uint8)
        self.clock = ManualClock()
        self.leases = LeaseTable(self.clock)
        self.ends: dict[RoundKey, list[LeaseEnd]] = {}
        self._end_events: dict[RoundKey, asyncio.Event] = {}
        self._loop = asyncio.get_running_loop()
        self._next_round = 0
        self.server = KvServer(
            self.source,
            self.leases,
            worker_id=SENDER[0],
            incarnation=SENDER[1],
            secret=SECRET,
            listen=[f"unix://{folder}/kv.sock" if family in ON_UNIX_SOCKETS else "tcp://127.0.0.1:0"],
            lanes=self.lanes[0],
            max_connections=max_connections,
            handshake_timeout_s=handshake_timeout_s,
        )
        self.endpoints: Sequence[str] = self.server.start()
        self.client = KvClient(
            self.target,
            worker_id=RECEIVER[0],
            incarnation=RECEIVER[1],
            lanes=self.lanes[1],
            max_concurrent=max_concurrent,
        )

    async def __aenter__(self) -> KvPair:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await asyncio.to_thread(self.server.close)
        for lanes in self.lanes:
            lanes.close()

    def proxy(self, tamper: Tamper) -> FaultProxy:
        """Between the two; it has to be entered, and its endpoint asked for."""
        return FaultProxy(self.endpoints[0], tamper, folder=self.folder if self.family == "shm" else None)

    # ------------------------------------------------------------------------------------- leases

    def block_table(self, num_tokens: int) -> list[int]:
        """Blocks for that many tokens, anywhere in the pool, in any order."""
        num_blocks = -(-num_tokens // self.layout.block_size)
        return [int(block) for block in self.random.permutation(len(self.source.blocks))[:num_blocks]]

    def grant(
        self,
        token_start: int,
        token_stop: int,
        *,
        complete: bool = True,
        ttl_s: float = 10.0,
        key: RoundKey | None = None,
    ) -> Lease:
        self._next_round += 1
        key = key or RoundKey("tenant", "session", self._next_round, 1)
        ended = self._end_events[key] = asyncio.Event()
        self.ends[key] = []

        def on_end(lease: Lease, end: LeaseEnd) -> None:
            self.ends[key].append(end)
            with suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(ended.set)

        return self.leases.grant(
            key,
            self.block_table(token_stop),
            token_start,
            token_stop,
            ttl_s=ttl_s,
            on_end=on_end,
            complete=complete,
            num_layers=self.layout.num_layers,
        )

    async def ended(self, lease: Lease) -> LeaseEnd:
        """How the lease ended, once it has; its owner heard of it exactly once."""
        await asyncio.wait_for(self._end_events[lease.key].wait(), 30)
        (end,) = self.ends[lease.key]
        return end

    # -------------------------------------------------------------------------------------- pulls

    def claims(self, lease: Lease) -> TicketClaims:
        return TicketClaims(
            key=lease.key,
            source=SENDER[0],
            source_incarnation=SENDER[1],
            destination=RECEIVER[0],
            destination_incarnation=RECEIVER[1],
            max_bytes=(lease.token_stop - lease.token_start) * self.layout.bytes_per_token,
            ttl_s=60.0,
            nonce=secrets.token_bytes(16),
        )

    def request(
        self,
        lease: Lease,
        *,
        claims: TicketClaims | None = None,
        secret: bytes = SECRET,
        on_segment: Callable[[Segment], None] | None = None,
        progress_timeout_s: float = 20.0,
        deadline_s: float = 60.0,
    ) -> PullRequest:
        return PullRequest(
            key=lease.key,
            endpoints=self.endpoints,
            ticket=mint(secret, claims or self.claims(lease)),
            source=SENDER[0],
            source_incarnation=SENDER[1],
            lease_id=lease.lease_id,
            generation=lease.generation,
            block_table=self.block_table(lease.token_stop),
            token_start=lease.token_start,
            token_stop=lease.token_stop,
            progress_timeout_s=progress_timeout_s,
            deadline_s=deadline_s,
            on_segment=on_segment,
        )

    def on_loop(self, event: asyncio.Event) -> Callable[[Segment], None]:
        """An on_segment that sets an event of the test's loop."""
        return lambda segment: self._loop.call_soon_threadsafe(event.set) and None

    async def pull(self, request: PullRequest) -> None:
        await self.client.start_pull(request).wait()

    async def pull_failure(self, request: PullRequest) -> KvTransferError:
        try:
            await self.pull(request)
        except KvTransferError as error:
            return error
        raise AssertionError("the pull succeeded")

    def assert_moved(self, lease: Lease, request: PullRequest) -> None:
        """Every byte asked for is where the receiver's block table says, and no other byte has changed."""
        expected = np.zeros_like(self.target.blocks)
        for position in range(request.token_start, request.token_stop):
            index, slot = divmod(position, self.layout.block_size)
            sent = self.source.blocks[lease.block_table[index], :, :, slot]
            expected[request.block_table[index], :, :, slot] = sent
        assert np.array_equal(self.target.blocks, expected)

    async def assert_serves(self) -> None:
        """A new pull from the same server to the same receiver succeeds."""
        lease = self.grant(0, self.layout.block_size)
        await self.pull(replace(self.request(lease), block_table=[0]))
        assert np.array_equal(self.target.blocks[0], self.source.blocks[lease.block_table[0]])
        assert await self.ended(lease) is LeaseEnd.DELIVERED
