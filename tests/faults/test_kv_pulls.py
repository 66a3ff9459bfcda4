"""What every KV back end must do when nothing goes wrong."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import socket
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kv_pair import LARGE, KvPair

from shared.core.types import Segment
from shared.errors import ErrorCode, KvTransferError
from shared.transport.leases import LeaseEnd
from shared.transport.nixl_agent import NixlAgent, NixlError
from shared.transport.nixl_lane import NixlLane
from shared.transport.protocol import FrameKind

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.mark.parametrize(
    ("token_start", "token_stop"),
    [(0, 1), (0, 4), (0, 64), (3, 5), (1, 3), (5, 63), (8, 61), (7, 64)],
    ids=lambda position: str(position),
)
async def test_scattered_blocks_arrive_bit_identical(
    family: str, tmp_path: Path, token_start: int, token_stop: int
) -> None:
    async with KvPair(family, tmp_path) as pair:
        lease = pair.grant(token_start, token_stop)
        request = pair.request(lease)
        result = await pair.client.start_pull(request).wait()
        pair.assert_moved(lease, request)
        assert result.num_bytes == (token_stop - token_start) * pair.layout.bytes_per_token
        assert await pair.ended(lease) is LeaseEnd.DELIVERED
        assert len(pair.leases) == 0


@pytest.mark.parametrize(("token_start", "token_stop"), [(3, 30), (11, 30), (3, 29), (12, 13)])
async def test_a_receiver_that_has_a_part_pulls_the_rest(
    token_start: int, token_stop: int, family: str, tmp_path: Path
) -> None:
    """A range within the lease, published as it would be: what was there at once, then layer by layer."""
    async with KvPair(family, tmp_path) as pair:
        lease = pair.grant(3, 30, complete=False)
        lease.publish(Segment(0, pair.layout.num_layers, 3, 17))
        for layer in range(pair.layout.num_layers):
            lease.publish(Segment(layer, layer + 1, 17, 30))
        lease.finish()
        request = replace(pair.request(lease), token_start=token_start, token_stop=token_stop)
        result = await pair.client.start_pull(request).wait()
        pair.assert_moved(lease, request)
        assert result.num_bytes == (token_stop - token_start) * pair.layout.bytes_per_token
        assert await pair.ended(lease) is LeaseEnd.DELIVERED


async def test_many_frames_arrive_bit_identical(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path, layout=LARGE) as pair:
        lease = pair.grant(5, 37 * 16 - 3)
        request = pair.request(lease)
        result = await pair.client.start_pull(request).wait()
        pair.assert_moved(lease, request)
        assert result.num_segments > 2
        assert result.lane.split()[0] == family.removesuffix("-tcp")
        if family.startswith("nixl"):
            assert "tcp" in result.lane, "what UCX took is not known"
            assert ("cma" in result.lane) == (family == "nixl"), "UCX took another way than this family is for"


async def test_layers_travel_while_the_producer_computes(family: str, tmp_path: Path) -> None:
    """The producer goes on to the next layer of a chunk only when the last one is known to have arrived."""
    async with KvPair(family, tmp_path) as pair:
        lease = pair.grant(3, 30, complete=False)
        arrived: asyncio.Queue[Segment] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        request = pair.request(
            lease, on_segment=lambda segment: loop.call_soon_threadsafe(arrived.put_nowait, segment) and None
        )
        pull = pair.client.start_pull(request)
        for token_start, token_stop in [(3, 10), (10, 24), (24, 30)]:
            for layer in range(pair.layout.num_layers):
                segment = Segment(layer, layer + 1, token_start, token_stop)
                assert lease.publish(segment)
                assert await asyncio.wait_for(arrived.get(), 30) == segment
        assert not pull.done.done()
        lease.finish()
        result = await pull.wait()
        pair.assert_moved(lease, request)
        assert 0 < result.waiting_s <= result.wall_s
        assert await pair.ended(lease) is LeaseEnd.DELIVERED


@pytest.mark.parametrize("family", ["nixl-torch"], indirect=True)
async def test_a_pool_that_torch_copies_moves_the_same_bytes(family: str, tmp_path: Path) -> None:
    """On the CPU; tests/gpu has it on a device."""
    async with KvPair(family, tmp_path, layout=LARGE) as pair:
        lease = pair.grant(5, 37 * 16 - 3)
        request = pair.request(lease)
        await pair.client.start_pull(request).wait()
        pair.assert_moved(lease, request)
        assert await pair.ended(lease) is LeaseEnd.DELIVERED


async def test_a_slow_producer_is_not_a_stalled_peer(family: str, tmp_path: Path) -> None:
    """Keep-alive frames alone outlast the progress timeout."""
    async with KvPair(family, tmp_path) as pair, pair.proxy(lambda n, frame, raw: [raw]) as proxy:
        pair.endpoints = [proxy.endpoint]
        lease = pair.grant(0, 8, complete=False)
        request = pair.request(lease, progress_timeout_s=0.4)  # the sender then says every 0.1 s that it lives
        pull = pair.client.start_pull(request)
        await proxy.wait_for_frames(lambda frames: sum(f.kind is FrameKind.KEEPALIVE for f in frames) > 10)
        lease.publish(Segment(0, 3, 0, 8))
        lease.finish()
        await pull.wait()
        pair.assert_moved(lease, request)


async def test_pulls_to_the_same_worker_share_a_connection(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path) as pair:
        for _ in range(5):
            lease = pair.grant(0, 10)
            await pair.pull(pair.request(lease))
            await pair.ended(lease)
        assert pair.server.counters["connections"] == 1
        assert pair.server.counters["delivered"] == 5


async def test_a_hundred_transfers_at_once(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path, num_blocks=400) as pair:
        leases = [pair.grant(1, 15) for _ in range(100)]
        blocks = iter(range(400))
        requests = [replace(pair.request(lease), block_table=[next(blocks) for _ in range(4)]) for lease in leases]
        await asyncio.gather(*(pair.pull(request) for request in requests))
        for lease, request in zip(leases, requests, strict=True):
            assert await pair.ended(lease) is LeaseEnd.DELIVERED
            moved = pair.target.tokens(request.block_table)[:, :, 1:15]
            assert np.array_equal(moved, pair.source.tokens(lease.block_table)[:, :, 1:15])
        assert len(pair.leases) == 0


async def test_transfers_at_once_share_fairly(family: str, tmp_path: Path) -> None:
    """Four of sixteen frames each: when the first has all of its own, each other one has a quarter at least."""
    async with KvPair(family, tmp_path, layout=LARGE, num_blocks=256) as pair:
        counts: list[list[int]] = []
        arrived = Counter[int]()
        lock = threading.Lock()

        def count(number: int, _: Segment) -> None:
            time.sleep(0.002)  # so that nobody is done before all have begun
            with lock:
                arrived[number] += 1
                counts.append([arrived[one] for one in range(4)])

        leases = [pair.grant(0, 1024, complete=False) for _ in range(4)]
        for lease in leases:
            for start in range(0, 1024, 64):
                lease.publish(Segment(0, pair.layout.num_layers, start, start + 64))
            lease.finish()
        requests = [pair.request(lease, on_segment=partial(count, number)) for number, lease in enumerate(leases)]
        tables = pair.random.permutation(256).reshape(4, 64).tolist()
        await asyncio.gather(*(pair.pull(replace(one, block_table=t)) for one, t in zip(requests, tables, strict=True)))
        assert counts[-1] == [16] * 4
        at_first_end = next(one for one in counts if 16 in one)
        assert min(at_first_end) >= 4, at_first_end


async def test_a_stalled_transfer_does_not_hold_up_others(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path) as pair:
        silent = pair.grant(0, 8, complete=False)
        pull = pair.client.start_pull(pair.request(silent))
        for _ in range(3):
            await pair.pull(pair.request(pair.grant(0, 40)))
        await pull.cancel()


async def test_more_pulls_than_threads_wait_their_turn(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path, max_concurrent=1) as pair:
        silent = pair.grant(0, 4, complete=False)
        first = pair.client.start_pull(replace(pair.request(silent), block_table=[1]))
        second = pair.client.start_pull(replace(pair.request(pair.grant(0, 4)), block_table=[2]))
        late = pair.client.start_pull(replace(pair.request(pair.grant(0, 4)), block_table=[3], deadline_s=0.05))
        dropped = pair.client.start_pull(replace(pair.request(pair.grant(0, 4)), block_table=[4]))
        await dropped.cancel()
        for pull, code in ((late, ErrorCode.KV_TRANSFER_FAILED), (dropped, ErrorCode.CANCELLED)):
            with pytest.raises(Exception, match=code.value):
                await pull.wait()
        assert not second.done.done()
        silent.publish(Segment(0, 3, 0, 4))
        silent.finish()
        await asyncio.gather(first.wait(), second.wait())
        assert pair.target.blocks[[3, 4]].max() == 0


async def test_a_pull_refused_for_want_of_a_thread_never_begins(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a pull that has failed are somebody else's: the thread of another must not take it up later."""
    async with KvPair(family, tmp_path) as pair:
        silent = pair.grant(0, 4, complete=False)
        silent.publish(Segment(0, pair.layout.num_layers, 0, 2))
        begun = asyncio.Event()
        request = pair.request(silent, on_segment=pair.on_loop(begun))
        first = pair.client.start_pull(replace(request, block_table=[1]))
        await asyncio.wait_for(begun.wait(), 30)  # both ends have their threads

        def refuse(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            refused = pair.client.start_pull(replace(pair.request(pair.grant(0, 4)), block_table=[2]))
            with pytest.raises(KvTransferError) as caught:
                await refused.wait()
        assert caught.value.code is ErrorCode.OVERLOADED
        silent.publish(Segment(0, pair.layout.num_layers, 2, 4))
        silent.finish()
        await first.wait()
        await pair.pull(replace(pair.request(pair.grant(0, 4)), block_table=[3]))
        assert not pair.target.blocks[2].any()


async def test_the_unix_socket_is_preferred_and_tcp_the_way_out(tmp_path: Path) -> None:
    async with KvPair("unix", tmp_path) as here, KvPair("tcp", tmp_path) as there:
        unix, tcp = here.endpoints[0], there.endpoints[0]
        here.endpoints = [tcp, unix]
        await here.pull(here.request(here.grant(0, 8)))
        assert "connections" not in there.server.counters
        there.endpoints = [f"unix://{tmp_path}/elsewhere.sock", tcp]  # advertised by a worker on another host
        lease = there.grant(0, 8)
        await there.pull(there.request(lease))
        await there.ended(lease)
        assert there.server.counters["delivered"] == 1


async def test_a_unix_socket_of_another_worker_is_passed_over(tmp_path: Path) -> None:
    """Two containers may have the same path for different workers."""
    async with KvPair("unix", tmp_path) as other, KvPair("tcp", tmp_path) as pair:
        other.server._worker_id = "a worker of the other container"
        pair.endpoints = [other.endpoints[0], pair.endpoints[0]]
        lease = pair.grant(0, 8)
        request = pair.request(lease)
        await pair.pull(request)
        pair.assert_moved(lease, request)


@pytest.mark.parametrize(
    ("family", "stream", "what"),
    [("shm", "unix", "mapping"), ("shm", "unix", "descriptor"), ("nixl", "tcp", "peer"), ("nixl", "tcp", "read")],
    indirect=["family"],
)
@pytest.mark.parametrize("streams", [True, False], ids=["auto", "nothing-else"])
async def test_a_pool_that_cannot_be_read_here_is_pulled_from_another_way(
    family: str, stream: str, what: str, streams: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pull fails, typed: its ticket is used. Those after it go through the connection, if they may."""

    def no_mapping(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    def no_descriptor(*args: Any) -> tuple[bytes, list[int], int, Any]:
        data, descriptors, flags, address = receive(*args)
        for descriptor in descriptors:
            os.close(descriptor)
        return data, [], flags, address

    def no_peer(*_: object) -> Any:
        raise NixlError("no such transport")

    receive = socket.recv_fds
    missing: dict[str, tuple[Any, str, Any]] = {
        "mapping": (mmap, "mmap", no_mapping),
        "descriptor": (socket, "recv_fds", no_descriptor),
        "peer": (NixlAgent, "add_peer", no_peer),
        "read": (NixlLane, "begin", no_peer),
    }

    async with KvPair(family, tmp_path, streams=streams) as pair:
        with monkeypatch.context() as patch:
            patch.setattr(*missing[what])
            failure = await pair.pull_failure(pair.request(pair.grant(0, 10)))
            assert failure.code is ErrorCode.KV_TRANSFER_FAILED
            assert failure.message.startswith(f"{family}: ")
        lease = pair.grant(0, 10)
        request = pair.request(lease)
        result = await pair.client.start_pull(request).wait()
        assert result.lane.split()[0] == (stream if streams else family)
        pair.assert_moved(lease, request)


@pytest.mark.parametrize("family", ["nixl"], indirect=True)
async def test_one_read_that_fails_where_others_have_not_changes_no_way(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise NixlError("a link went down")

    async with KvPair(family, tmp_path, streams=True) as pair:
        await pair.pull(pair.request(pair.grant(0, 8)))
        pair.client._idle_timeout_s = 0.01  # nothing of the peer's is kept meanwhile
        (server_side,) = pair.server._connections
        await asyncio.to_thread(server_side.join, 30)
        pair.lanes[1].find("nixl")._pools.clear()  # type: ignore[union-attr]
        with monkeypatch.context() as patch:
            patch.setattr(NixlLane, "begin", fail)
            failure = await pair.pull_failure(pair.request(pair.grant(0, 8)))
            assert failure.message == "nixl: a link went down"
        result = await pair.client.start_pull(pair.request(pair.grant(0, 8))).wait()
        assert result.lane.startswith(family)


async def test_idle_connections_are_closed(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path) as pair:
        pair.client._idle_timeout_s = 0.01
        await pair.pull(pair.request(pair.grant(0, 8)))
        (server_side,) = pair.server._connections
        await asyncio.to_thread(server_side.join, 30)
        assert not server_side.is_alive()
        await pair.assert_serves()


async def test_a_bug_in_on_segment_reaches_whoever_waits(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path) as pair:

        def broken(segment: Segment) -> None:
            raise ZeroDivisionError

        lease = pair.grant(0, 8)
        with pytest.raises(ZeroDivisionError):
            await pair.pull(pair.request(lease, on_segment=broken))
        assert await pair.ended(lease) is LeaseEnd.FAILED
        await pair.assert_serves()
