"""The pools of several ranks as one: the bytes of a transfer do not tell how a worker splits its heads."""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.worker.kv_lanes import build_lanes
from shared.core.types import KvLayout, RoundKey, Segment
from shared.engine.kv_pool import KvPool
from shared.engine.sharded_pool import ShardedKvPool
from shared.errors import AmpdError, KvTransferError
from shared.transport.channel import Channel
from shared.transport.client import KvClient, PullRequest
from shared.transport.lanes import STREAM
from shared.transport.leases import LeaseTable
from shared.transport.protocol import CHUNK_BYTES, KvMemory
from shared.transport.region import allocate_region
from shared.transport.server import KvServer
from shared.transport.tickets import TicketClaims, mint

LAYOUT = KvLayout(model="m", num_layers=3, num_kv_heads=4, head_dim=4, block_size=4, dtype="float32")
NUM_BLOCKS = 12
SECRET = b"the ticket secret of these tests"


def make_sharded(layout: KvLayout, num_blocks: int, num_ranks: int) -> tuple[ShardedKvPool, list[torch.Tensor]]:
    """The pool, and of each rank what it computes with: [num_blocks, layers, 2, block_size, its heads, head_dim]."""
    shape = (num_blocks, layout.num_layers, 2, layout.block_size, layout.num_kv_heads // num_ranks, layout.head_dim)
    regions = [
        allocate_region(num_blocks * layout.bytes_per_block // num_ranks, shared=False) for _ in range(num_ranks)
    ]
    pool = ShardedKvPool(layout, num_blocks, regions)
    return pool, [torch.frombuffer(region.data, dtype=torch.float32).view(shape) for region in regions]


def filled_pair(num_ranks: int) -> tuple[KvPool, ShardedKvPool, list[torch.Tensor]]:
    """The same random KV in one pool, and split by heads over the ranks' pools."""
    whole = KvPool(LAYOUT, NUM_BLOCKS)
    whole.tensor.copy_(torch.randn(whole.tensor.shape, generator=torch.Generator().manual_seed(3)))
    sharded, shards = make_sharded(LAYOUT, NUM_BLOCKS, num_ranks)
    for shard, part in zip(shards, whole.tensor.chunk(num_ranks, dim=4), strict=True):
        shard.copy_(part)
    return whole, sharded, shards


@st.composite
def segments(draw: st.DrawFn) -> tuple[list[int], Segment]:
    table = draw(st.permutations(range(1, NUM_BLOCKS)))[:6]
    token_start = draw(st.integers(0, 23))
    layer_start = draw(st.integers(0, 2))
    segment = Segment(
        layer_start, draw(st.integers(layer_start + 1, 3)), token_start, draw(st.integers(token_start + 1, 24))
    )
    return list(table), segment


@given(segments(), st.sampled_from([1, 2, 4]))
def test_reading_gives_the_bytes_of_an_unsplit_pool(case: tuple[list[int], Segment], num_ranks: int) -> None:
    table, segment = case
    whole, sharded, _ = filled_pair(num_ranks)
    assert bytes(sharded.read_segment(table, segment)) == bytes(whole.read_segment(table, segment))


@given(segments(), st.sampled_from([1, 2, 4]))
def test_writing_changes_what_it_changes_in_an_unsplit_pool(case: tuple[list[int], Segment], num_ranks: int) -> None:
    table, segment = case
    whole, sharded, shards = filled_pair(num_ranks)
    data = random.Random(1).randbytes(segment.num_bytes(LAYOUT))
    whole.write_segment(table, segment, data)
    sharded.write_segment(table, segment, data)
    together = torch.cat(shards, dim=4)
    assert torch.equal(together.view(torch.uint8), whole.tensor.view(torch.uint8))


def test_what_does_not_fit_is_refused() -> None:
    _, sharded, _ = filled_pair(2)
    good = Segment(0, 3, 0, 8)
    for table, segment in (([1], good), ([0, 1], good), ([1, NUM_BLOCKS], good), ([1, 2], Segment(0, 4, 0, 8))):
        with pytest.raises(KvTransferError):
            sharded.read_segment(table, segment)
        with pytest.raises(KvTransferError):
            sharded.write_segment(table, segment, bytes(segment.num_bytes(LAYOUT)))
    with pytest.raises(KvTransferError, match="were given"):
        sharded.write_segment([1, 2], good, b"short")
    with pytest.raises(KvTransferError, match="read_segment"):
        sharded.segment_views([1, 2], good)
    with pytest.raises(AmpdError, match="at least 2 blocks"):
        make_sharded(LAYOUT, 1, 2)


def test_it_is_offered_to_no_way_that_reads_by_address() -> None:
    """By `auto` it goes through connections; who asks for shared memory is told why not."""
    _, sharded, _ = filled_pair(2)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours, progress_timeout_s=1.0, deadline_s=1.0)
        assert build_lanes("auto", sharded, "w").names(channel) == (STREAM,)
    with pytest.raises(AmpdError, match="--parallel-degree 1"):
        build_lanes("shm", sharded, "w")


async def pull(source: KvMemory, target: KvMemory, folder: Path, tables: tuple[list[int], list[int]], stop: int) -> int:
    """Move positions [0, stop) from the source's blocks to the target's over a real socket; the number of bytes."""
    leases, key = LeaseTable(time.monotonic), RoundKey("t", "s", 0, 1)
    lease = leases.grant(
        key,
        tables[0],
        0,
        stop,
        ttl_s=30.0,
        on_end=lambda lease, end: None,
        complete=True,
        num_layers=source.layout.num_layers,
    )
    server = KvServer(source, leases, worker_id="a", incarnation=1, secret=SECRET, listen=[f"unix://{folder}/a.sock"])
    client = KvClient(target, worker_id="b", incarnation=2)
    claims = TicketClaims(
        key=key,
        source="a",
        source_incarnation=1,
        destination="b",
        destination_incarnation=2,
        max_bytes=1 << 30,
        ttl_s=30.0,
        nonce=secrets.token_bytes(16),
    )
    try:
        request = PullRequest(
            key=key,
            endpoints=server.start(),
            ticket=mint(SECRET, claims),
            source="a",
            source_incarnation=1,
            lease_id=lease.lease_id,
            generation=lease.generation,
            block_table=tables[1],
            token_start=0,
            token_stop=stop,
        )
        result = await asyncio.wait_for(client.start_pull(request).wait(), 20)
    finally:
        await client.close()
        server.close()
    return result.num_bytes


@pytest.mark.parametrize(("num_source", "num_target"), [(1, 2), (2, 1), (2, 4), (2, 2)])
async def test_bytes_are_the_same_after_the_transport(num_source: int, num_target: int, tmp_path: Path) -> None:
    layout = KvLayout(model="m", num_layers=4, num_kv_heads=4, head_dim=128, block_size=16, dtype="float32")
    num_tokens = 20 * layout.block_size + 5
    tables = (random.Random(1).sample(range(1, 30), 21), random.Random(2).sample(range(1, 30), 21))
    assert num_tokens * layout.bytes_per_token > CHUNK_BYTES, "more than one frame"
    segment = Segment(0, layout.num_layers, 0, num_tokens)
    data = np.random.default_rng(7).integers(0, 256, segment.num_bytes(layout), dtype=np.uint8).tobytes()
    source, target = (
        KvPool(layout, 30) if num_ranks == 1 else make_sharded(layout, 30, num_ranks)[0]
        for num_ranks in (num_source, num_target)
    )
    source.write_segment(tables[0], segment, data)
    assert await pull(source, target, tmp_path, tables, num_tokens) == len(data)
    assert bytes(target.read_segment(tables[1], segment)) == data
