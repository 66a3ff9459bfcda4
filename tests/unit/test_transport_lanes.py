"""Ways to move KV: which one two workers choose, what a shared pool lets a peer do, and what its digest sees."""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.core.types import KvLayout, Segment
from shared.engine.device_bytes import DeviceBytes
from shared.errors import AmpdError, ErrorCode, KvTransferError
from shared.transport.channel import Channel
from shared.transport.flat_memory import (
    LONG_BYTES,
    LONG_STRIDE_BYTES,
    SAMPLE_BYTES,
    STRIDE_BYTES,
    FlatMemory,
    HostBytes,
    add_sample,
    pair_ranges,
)
from shared.transport.lanes import Lanes
from shared.transport.memory import HostKvMemory
from shared.transport.nixl_agent import read_ucx_lanes
from shared.transport.protocol import Digest, check_ranges_length, decode_ranges, encode_ranges
from shared.transport.ranges import ByteRange, find_ranges
from shared.transport.region import allocate_region, map_to_read
from shared.transport.shm_lane import ShmLane

LAYOUT = KvLayout("m", 3, 2, 8, 4, "float32")


@pytest.fixture(params=[socket.AF_UNIX, socket.AF_INET], ids=["unix", "tcp"])
def channel(request: pytest.FixtureRequest) -> Iterator[Channel]:
    if request.param == socket.AF_UNIX:
        ours, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs = listener.accept()[0]
    with ours, theirs:
        yield Channel(ours, progress_timeout_s=1.0, deadline_s=1.0)


# ------------------------------------------------------------------------------------- negotiation


def test_the_receivers_best_that_the_sender_has(channel: Channel) -> None:
    shm = ShmLane(HostKvMemory(LAYOUT, 4, shared=True))
    auto, sockets, mapped = Lanes([shm]), Lanes(), Lanes([shm], streams=False)
    on_unix = channel.sock.family == socket.AF_UNIX
    best = "shm" if on_unix else "stream"
    assert auto.choose(channel, auto.names(channel)) == best
    assert auto.choose(channel, sockets.names(channel)) == "stream"
    assert sockets.choose(channel, auto.names(channel)) == "stream"
    assert auto.find("shm") is shm
    assert auto.find("stream") is None
    with pytest.raises(KvTransferError, match=r"take KV by stream .* give it by (shm|no way)") as refused:
        mapped.choose(channel, sockets.names(channel))
    assert refused.value.code is ErrorCode.KV_LAYOUT_MISMATCH
    with pytest.raises(AmpdError, match="was not offered"):
        sockets.find("shm")
    with pytest.raises(AmpdError, match="was not offered"):
        mapped.find("stream")


def test_shm_wants_a_pool_that_can_be_mapped() -> None:
    with pytest.raises(AmpdError, match="shared host memory"):
        ShmLane(HostKvMemory(LAYOUT, 4))


# ----------------------------------------------------------------------------------- shared memory


def test_a_peer_can_read_a_shared_region_and_nothing_else() -> None:
    region = allocate_region(3 * mmap.PAGESIZE, shared=True)
    region.data[5] = 7
    mapped = map_to_read(region.descriptor, region.data.nbytes)
    assert mapped.readonly
    assert mapped[5] == 7
    region.data[5] = 8
    assert mapped[5] == 8
    with pytest.raises(PermissionError):
        mmap.mmap(region.descriptor, region.data.nbytes)  # to write
    with pytest.raises(PermissionError):
        os.ftruncate(region.descriptor, mmap.PAGESIZE)
    with pytest.raises(PermissionError):
        fcntl.fcntl(region.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_what_could_end_the_reader_is_not_mapped() -> None:
    """A file that its owner may cut while we read it, one of another size, and what is no memory file at all."""
    unsealed = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, mmap.PAGESIZE)
    region = allocate_region(mmap.PAGESIZE, shared=True)
    end, other = os.pipe()
    for descriptor, num_bytes in ((unsealed, mmap.PAGESIZE), (region.descriptor, 2 * mmap.PAGESIZE), (end, 0)):
        with pytest.raises(KvTransferError, match="pool"):
            map_to_read(descriptor, num_bytes)
    for descriptor in (unsealed, end, other):
        os.close(descriptor)


def test_a_region_closes_its_file() -> None:
    region = allocate_region(mmap.PAGESIZE, shared=True)
    descriptor = region.descriptor
    os.fstat(descriptor)
    del region
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


# ------------------------------------------------------------------------------------------ ranges


@given(st.permutations(range(6)), st.integers(0, 22), st.integers(1, 24), st.integers(0, 2), st.integers(1, 3))
def test_ranges_are_the_views_bytes(blocks: list[int], start: int, length: int, first: int, layers: int) -> None:
    memory = HostKvMemory(LAYOUT, 6)
    memory.blocks[:] = np.random.default_rng(1).integers(0, 256, memory.blocks.shape, dtype=np.uint8)
    segment = Segment(first, min(3, first + layers), start, min(24, start + length))
    ranges = find_ranges(LAYOUT, blocks, segment)
    by_token = memory.tokens(blocks)[segment.layer_start : segment.layer_stop, :, start : segment.token_stop]
    read = b"".join(bytes(memory.region.data[one.start : one.stop]) for one in ranges)
    assert len(read) == segment.num_bytes(LAYOUT)
    assert sorted(read) == sorted(by_token.tobytes())
    assert read == b"".join(memory.segment_views(blocks, segment))
    assert decode_ranges(encode_ranges(ranges), len(read), memory.region.data.nbytes) == ranges
    check_ranges_length(len(encode_ranges(ranges)), segment, LAYOUT)


@pytest.mark.parametrize(
    "ranges",
    [[(0, 0)], [(8, 4)], [(0, 16), (90, 106)], [(0, 8)], [(2**64 - 1, 15)], [(0, 16), (2**63, 2**63)]],
    ids=str,
)
def test_ranges_that_are_not_in_the_pool_are_refused(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(KvTransferError):
        decode_ranges(np.array(ranges, dtype="<u8").tobytes(), 32, 100)


@pytest.mark.parametrize("length", [0, 8, 24, 16 * 1_000, 2**64 - 1])
def test_a_length_that_no_ranges_have_is_refused_before_room_is_made(length: int) -> None:
    with pytest.raises(KvTransferError):
        check_ranges_length(length, Segment(0, 3, 0, 4), LAYOUT)


# ------------------------------------------------------------------------------ copies and samples

CUTS = st.lists(st.integers(0, 3 * STRIDE_BYTES), max_size=8)
DATA = np.random.default_rng(3).integers(0, 256, 3 * STRIDE_BYTES + 100, dtype=np.uint8)


def cut(places: list[int], size: int) -> list[ByteRange]:
    edges = [0, *sorted(places), size]
    return [ByteRange(start, stop) for start, stop in itertools.pairwise(edges) if start < stop]


def flat_memories(data: bytes) -> list[FlatMemory]:
    """The same bytes, as the host and as torch have them."""
    return [HostBytes(memoryview(bytearray(data))), DeviceBytes(torch.frombuffer(bytearray(data), dtype=torch.uint8))]


def sample(cuts: list[int], data: bytes = DATA.tobytes()) -> bytes:
    digests = []
    for memory in flat_memories(data):
        digest = Digest()
        add_sample(digest, memory, cut(cuts, len(data)))
        digests.append(digest.digest())
    assert digests[0] == digests[1]
    return digests[0]


@given(CUTS)
def test_a_sample_does_not_depend_on_how_the_bytes_are_cut(cuts: list[int]) -> None:
    assert sample(cuts) == sample([])


@given(CUTS, st.integers(0, 3), st.integers(0, SAMPLE_BYTES - 1))
def test_a_sample_sees_every_page(cuts: list[int], stride: int, at: int) -> None:
    changed = bytearray(DATA.tobytes())
    changed[stride * STRIDE_BYTES + at] ^= 1
    assert sample(cuts, bytes(changed)) != sample(cuts)


def test_a_sample_of_much_has_longer_strides() -> None:
    data = bytes(LONG_BYTES + LONG_STRIDE_BYTES)
    changed = bytearray(data)
    changed[3 * LONG_STRIDE_BYTES] = 1
    assert sample([5, 70_000], data) == sample([], data) != sample([1_000_000], bytes(changed))


@given(CUTS, CUTS)
def test_copies_go_where_they_belong(first: list[int], second: list[int]) -> None:
    size = DATA.size
    pieces = list(pair_ranges(cut(first, size), cut(second, size)))
    assert sum(num_bytes for _, _, num_bytes in pieces) == size
    for source in flat_memories(DATA.tobytes()):
        target = source.allocate(size)
        target.copy_from(source, pieces)
        assert target.gather(np.arange(size)) == DATA.tobytes()
        shifted = source.allocate(size)
        shifted.copy_from(source, list(pair_ranges([ByteRange(50, size)], [ByteRange(0, 30), ByteRange(80, size)])))
        assert shifted.gather(np.arange(size)) == bytes(50) + DATA[:30].tobytes() + DATA[80:].tobytes()


def test_ranges_join_where_blocks_lie_side_by_side() -> None:
    assert find_ranges(LAYOUT, [2, 3, 1], Segment(0, 3, 0, 12)) == [
        ByteRange(2 * LAYOUT.bytes_per_block, 4 * LAYOUT.bytes_per_block),
        ByteRange(LAYOUT.bytes_per_block, 2 * LAYOUT.bytes_per_block),
    ]


def test_the_lanes_that_ucx_says_it_has_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest: what a peer's connection has got, after what UCX has for itself."""
    monkeypatch.setenv("UCX_LOG_FILE", str(tmp_path / "ucx.log"))
    assert "unknown" in read_ucx_lanes()
    line = "[1.2] [vm:9:0] ucp_worker.c:1997 UCX  INFO    w {} cfg#{} rma_am(tcp/lo)  am({})  ka(tcp/lo)\n"
    text = line.format("self", 0, "tcp/lo") + line.format("intra-node", 1, "tcp/lo cma/memory")
    (tmp_path / "ucx.log").write_text(text)
    assert read_ucx_lanes() == "rma_am(tcp/lo) am(tcp/lo cma/memory) ka(tcp/lo)"
