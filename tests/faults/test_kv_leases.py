"""Leases that end, or are kept, while their KV travels; and pulls that are stopped while it arrives."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kv_pair import LARGE, KvPair

from shared.core.types import Segment
from shared.errors import ErrorCode, KvTransferError
from shared.transport.client import Pull
from shared.transport.leases import Lease, LeaseEnd

pytestmark = pytest.mark.usefixtures("nothing_leaks")


async def start_half(pair: KvPair, **options: float) -> tuple[Lease, Pull]:
    """A pull whose first half has arrived; its producer has not published the second."""
    lease = pair.grant(0, 16, complete=False)
    arrived = asyncio.Event()
    pull = pair.client.start_pull(pair.request(lease, on_segment=pair.on_loop(arrived), **options))
    lease.publish(Segment(0, 3, 0, 8))
    await asyncio.wait_for(arrived.wait(), 30)
    return lease, pull


async def start_and_hold(pair: KvPair) -> tuple[Lease, Pull, asyncio.Event]:
    """A pull of 20 MiB, more than the sockets hold, whose receiver waits after its first frame for the event."""
    lease = pair.grant(0, 80 * 16)
    arrived, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold(segment: Segment) -> None:
        loop.call_soon_threadsafe(arrived.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(30)

    pull = pair.client.start_pull(pair.request(lease, on_segment=hold))
    await asyncio.wait_for(arrived.wait(), 30)
    return lease, pull, go_on


def publish_rest(lease: Lease) -> None:
    lease.publish(Segment(0, 3, 8, 16))
    lease.finish()


async def failure(pull: Pull) -> KvTransferError:
    with pytest.raises(KvTransferError) as caught:
        await pull.wait()
    return caught.value


def release(pair: KvPair, lease: Lease) -> None:
    assert pair.leases.release(lease.lease_id, lease.generation)


def expire(pair: KvPair, lease: Lease) -> None:
    pair.clock.now += lease.ttl_s
    assert pair.leases.expire() == 1


def fail(pair: KvPair, lease: Lease) -> None:
    lease.fail("the forward pass was preempted")


ENDINGS: dict[LeaseEnd, Callable[[KvPair, Lease], None]] = {
    LeaseEnd.RELEASED: release,
    LeaseEnd.EXPIRED: expire,
    LeaseEnd.FAILED: fail,
}


@pytest.mark.parametrize("end", ENDINGS)
async def test_a_lease_that_ends_during_its_pull_fails_it(family: str, tmp_path: Path, end: LeaseEnd) -> None:
    async with KvPair(family, tmp_path) as pair:
        lease, pull = await start_half(pair)
        ENDINGS[end](pair, lease)
        assert pair.ends[lease.key] == [end]  # the owner may reuse its blocks now
        pair.source.blocks.fill(0)
        assert not lease.publish(Segment(0, 3, 8, 16))
        lease.finish()
        error = await failure(pull)
        assert error.code is ErrorCode.KV_LEASE_INVALID
        assert end.value in error.message
        assert pair.ends[lease.key] == [end]
        assert len(pair.leases) == 0
        await pair.assert_serves()


async def test_the_producers_reason_reaches_the_receiver(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path) as pair:
        lease, pull = await start_half(pair)
        fail(pair, lease)
        assert "the forward pass was preempted" in (await failure(pull)).message


async def test_a_ttl_that_nobody_swept_still_ends_the_pull(family: str, tmp_path: Path) -> None:
    """The check after the last byte does not depend on expire() being called in time."""
    async with KvPair(family, tmp_path) as pair:
        lease, pull = await start_half(pair)
        pair.clock.now += lease.ttl_s
        publish_rest(lease)
        assert (await failure(pull)).code is ErrorCode.KV_LEASE_INVALID
        assert await pair.ended(lease) is LeaseEnd.EXPIRED


async def test_a_renewed_lease_outlives_its_ttl(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path) as pair:
        lease, pull = await start_half(pair)
        for _ in range(4):
            pair.clock.now += 0.9 * lease.ttl_s
            pair.leases.renew(lease.lease_id, lease.generation)
            assert pair.leases.expire() == 0
        publish_rest(lease)
        await pull.wait()
        assert await pair.ended(lease) is LeaseEnd.DELIVERED


async def test_blocks_reused_while_a_frame_is_under_way_are_never_accepted(family: str, tmp_path: Path) -> None:
    """The owner overwrites its blocks after the release; the sender is blocked in the middle of a large transfer."""
    async with KvPair(family, tmp_path, layout=LARGE, num_blocks=80) as pair:
        lease, pull, go_on = await start_and_hold(pair)
        release(pair, lease)
        pair.source.blocks.fill(0)
        go_on.set()
        assert (await failure(pull)).code is ErrorCode.KV_LEASE_INVALID
        assert pair.ends[lease.key] == [LeaseEnd.RELEASED]


async def test_after_delivery_nothing_is_left_to_end(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path) as pair:
        lease = pair.grant(0, 8)
        await pair.pull(pair.request(lease))
        assert await pair.ended(lease) is LeaseEnd.DELIVERED
        assert not pair.leases.release(lease.lease_id, lease.generation)
        with pytest.raises(Exception, match="no lease"):
            pair.leases.renew(lease.lease_id, lease.generation)
        pair.clock.now += 1000
        assert pair.leases.expire() == 0
        assert pair.ends[lease.key] == [LeaseEnd.DELIVERED]


async def test_the_owner_may_reuse_blocks_from_on_end(family: str, tmp_path: Path) -> None:
    """on_end takes no lock of the table with it: granting again from inside it works."""
    async with KvPair(family, tmp_path) as pair:
        granted: list[Lease] = []

        def grant_again(lease: Lease, end: LeaseEnd) -> None:
            granted.append(pair.grant(0, 4))

        lease = pair.leases.grant(
            pair.grant(0, 4).key, [0], 0, 4, ttl_s=5, on_end=grant_again, complete=True, num_layers=3
        )
        assert pair.leases.release(lease.lease_id, lease.generation)
        await pair.pull(pair.request(granted[0]))


# ------------------------------------------------------------------------------------------ cancel


async def test_a_cancelled_pull_no_longer_touches_its_blocks(family: str, tmp_path: Path) -> None:
    """What is written into the blocks right after cancel() stays, however much the sender had still to send."""
    async with KvPair(family, tmp_path, layout=LARGE, num_blocks=80) as pair:
        lease, pull, go_on = await start_and_hold(pair)
        cancelling = asyncio.create_task(pull.cancel())
        await asyncio.sleep(0)
        assert pull.interrupt.triggered
        assert not cancelling.done()  # the receiver's thread still holds the memory
        go_on.set()
        await cancelling
        assert (await failure(pull)).code is ErrorCode.CANCELLED
        pair.target.blocks.fill(7)
        assert await pair.ended(lease) is LeaseEnd.FAILED  # the sender has noticed
        await pair.client.close()
        assert np.all(pair.target.blocks == 7)


async def test_cancel_while_the_producer_is_silent(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path) as pair:
        lease, pull = await start_half(pair)
        await pull.cancel()
        await pull.cancel()
        assert (await failure(pull)).code is ErrorCode.CANCELLED
        pair.target.blocks.fill(7)
        assert await pair.ended(lease) is LeaseEnd.FAILED  # noticed at the next keep-alive
        assert np.all(pair.target.blocks == 7)
        await pair.assert_serves()


async def test_cancel_while_connecting(tmp_path: Path) -> None:
    """A listener that accepts nothing and whose queue is full: connect() hangs until cancel() shuts the socket."""
    async with KvPair("tcp", tmp_path) as pair:
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            fillers = [socket.socket() for _ in range(3)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
            endpoint = f"tcp://127.0.0.1:{full.getsockname()[1]}"
            pull = pair.client.start_pull(replace(pair.request(pair.grant(0, 4)), endpoints=[endpoint]))
            await pull.cancel()
            assert (await failure(pull)).code is ErrorCode.CANCELLED
            for filler in fillers:
                filler.close()


async def test_cancel_after_the_end_changes_nothing(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path) as pair:
        lease = pair.grant(0, 8)
        pull = pair.client.start_pull(pair.request(lease))
        result = await pull.wait()
        await pull.cancel()
        assert await pull.wait() == result
        await pair.ended(lease)
        await pair.assert_serves()
        assert pair.server.counters["connections"] == 1  # the kept connection was not shut


async def test_a_cancelled_waiter_does_not_stop_the_pull(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path) as pair:
        lease, pull = await start_half(pair)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pull.wait(), 0.01)
        publish_rest(lease)
        await pull.wait()


@pytest.mark.parametrize("side", ["client", "server"])
async def test_closing_either_side_ends_its_transfers(family: str, tmp_path: Path, side: str) -> None:
    async with KvPair(family, tmp_path) as pair:
        lease, pull = await start_half(pair)
        if side == "client":
            await pair.client.close()
            assert (await failure(pull)).code is ErrorCode.CANCELLED
            with pytest.raises(Exception, match="closed"):
                pair.client.start_pull(pair.request(pair.grant(0, 4)))
        else:
            await asyncio.to_thread(pair.server.close)
            assert (await failure(pull)).code is ErrorCode.KV_TRANSFER_FAILED
        assert await pair.ended(lease) is LeaseEnd.FAILED
