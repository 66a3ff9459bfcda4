"""Connections that break, stall, crawl and change bytes: KV is whole and right, or the pull fails, with a type."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from kv_pair import LARGE, SMALL, KvPair
from kv_proxy import Fault, Tamper, is_payload

from shared.core.types import Segment
from shared.errors import ErrorCode
from shared.transport.leases import LeaseEnd
from shared.transport.protocol import HEADER, Frame, FrameKind, LeaseId, encode_header

pytestmark = pytest.mark.usefixtures("nothing_leaks")

# where in which frame from the sender; the small transfer has one of payload
PLACES: dict[str, tuple[Callable[[Frame], bool], Callable[[bytes], int]]] = {
    "byte 0 of the connection": (lambda frame: frame.kind is FrameKind.WELCOME, lambda raw: 0),
    "in the header": (is_payload, lambda raw: HEADER.size // 2),
    "before the payload": (is_payload, lambda raw: HEADER.size),
    "half": (is_payload, lambda raw: len(raw) // 2),
    "before the last byte": (is_payload, lambda raw: len(raw) - 1),
    "before the trailer": (lambda frame: frame.kind is FrameKind.TRAILER, lambda raw: 0),
    "in the trailer": (lambda frame: frame.kind is FrameKind.TRAILER, lambda raw: len(raw) - 1),
}


def fault_at(place: str, fault: Fault) -> Tamper:
    is_there, offset = PLACES[place]

    def tamper(number: int, frame: Frame, raw: bytes) -> Iterable[bytes | Fault]:
        return [raw[: offset(raw)], fault] if is_there(frame) else [raw]

    return tamper


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.RESET, Fault.STALL], ids=lambda fault: fault.value)
@pytest.mark.parametrize("place", PLACES)
async def test_a_broken_connection_fails_the_pull(family: str, tmp_path: Path, place: str, fault: Fault) -> None:
    async with KvPair(family, tmp_path) as pair:
        direct = pair.endpoints
        async with pair.proxy(fault_at(place, fault)) as proxy:
            pair.endpoints = [proxy.endpoint]
            lease = pair.grant(0, 40)
            error = await pair.pull_failure(pair.request(lease, progress_timeout_s=0.3))
            assert proxy.num_faults == 1
            assert error.code is ErrorCode.KV_TRANSFER_FAILED
        if lease.end is None and place == "byte 0 of the connection":  # it was never asked for
            assert pair.leases.release(lease.lease_id, lease.generation)
        else:
            assert await pair.ended(lease) is LeaseEnd.FAILED
        pair.endpoints = direct
        await pair.assert_serves()


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.STALL], ids=lambda fault: fault.value)
async def test_a_break_in_the_middle_of_many_frames(family: str, tmp_path: Path, fault: Fault) -> None:
    """More than the sockets' buffers hold: the sender is stopped in the middle of a frame too."""

    def tamper(number: int, frame: Frame, raw: bytes) -> Iterable[bytes | Fault]:
        return [raw[: len(raw) // 2], fault] if number == 3 else [raw]

    async with KvPair(family, tmp_path, layout=LARGE) as pair, pair.proxy(tamper) as proxy:
        pair.endpoints = [proxy.endpoint]
        lease = pair.grant(0, 40 * 16)
        error = await pair.pull_failure(pair.request(lease, progress_timeout_s=0.5))
        assert proxy.num_faults == 1
        assert error.code is ErrorCode.KV_TRANSFER_FAILED
        assert await pair.ended(lease) is LeaseEnd.FAILED


@pytest.mark.parametrize("size", [1, 7])
async def test_tiny_slices_change_nothing(family: str, tmp_path: Path, size: int) -> None:
    async with (
        KvPair(family, tmp_path) as pair,
        pair.proxy(lambda number, frame, raw: [raw[at : at + size] for at in range(0, len(raw), size)]) as proxy,
    ):
        pair.endpoints = [proxy.endpoint]
        lease = pair.grant(3, 11)
        request = pair.request(lease)
        await pair.pull(request)
        pair.assert_moved(lease, request)
        assert len(proxy.frames) >= 3
        await pair.client.close()


async def test_a_crawling_peer_is_ended_by_the_deadline(family: str, tmp_path: Path) -> None:
    """Each byte is progress, so only the total deadline can end it. Other transfers are not held up."""
    crawling = asyncio.Event()

    def tamper(number: int, frame: Frame, raw: bytes) -> Iterable[bytes | Fault]:
        if not is_payload(frame):
            return [raw]
        crawling.set()
        return [raw[:100], Fault.STALL]

    async with KvPair(family, tmp_path) as pair:
        direct = pair.endpoints
        async with pair.proxy(tamper) as proxy:
            pair.endpoints = [proxy.endpoint]
            pull = pair.client.start_pull(pair.request(pair.grant(0, 40), progress_timeout_s=60, deadline_s=1.0))
            await asyncio.wait_for(crawling.wait(), 30)
            pair.endpoints = direct
            await pair.assert_serves()
            with pytest.raises(Exception, match="deadline"):
                await pull.wait()
            assert proxy.num_faults == 1


def flip(raw: bytes, at: int, mask: int = 1) -> bytes:
    return raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :]


SEGMENT_CHANGES: dict[str, Callable[[Frame, bytes], bytes]] = {
    "a payload bit": lambda frame, raw: flip(raw, HEADER.size + frame.length // 2),
    "the last payload bit": lambda frame, raw: flip(raw, len(raw) - 1, 0x80),
    "the magic": lambda frame, raw: flip(raw, 0),
    "the kind": lambda frame, raw: flip(raw, 4, 0x40),
    "the incarnation": lambda frame, raw: flip(raw, 8),
    "the lease": lambda frame, raw: flip(raw, 16),
    "the generation": lambda frame, raw: flip(raw, 24),
    "layer_start": lambda frame, raw: flip(raw, 32),
    "layer_stop": lambda frame, raw: flip(raw, 36),
    "token_start": lambda frame, raw: flip(raw, 40),
    "token_stop": lambda frame, raw: flip(raw, 44),
    "the length": lambda frame, raw: flip(raw, 48),
    "the length, hugely": lambda frame, raw: flip(raw, 55, 0x7F),
    "a header byte without meaning": lambda frame, raw: flip(raw, HEADER.size - 1),
    "sent twice": lambda frame, raw: raw + raw,
    "left out": lambda frame, raw: b"",
}


@pytest.mark.parametrize("change", SEGMENT_CHANGES)
async def test_a_changed_frame_never_passes(family: str, tmp_path: Path, change: str) -> None:
    def tamper(number: int, frame: Frame, raw: bytes) -> Iterable[bytes | Fault]:
        return [SEGMENT_CHANGES[change](frame, raw) if is_payload(frame) else raw]

    async with KvPair(family, tmp_path) as pair, pair.proxy(tamper) as proxy:
        pair.endpoints = [proxy.endpoint]
        lease = pair.grant(4, 36)
        error = await pair.pull_failure(pair.request(lease, progress_timeout_s=0.5))
        assert proxy.num_faults == 1
        assert error.code is ErrorCode.KV_TRANSFER_FAILED
        assert await pair.ended(lease) is LeaseEnd.FAILED


TRAILER_CHANGES: dict[str, Callable[[Frame, bytes], bytes]] = {
    "the lease": lambda frame, raw: flip(raw, 16),
    "the length, lying": lambda frame, raw: flip(raw, 55, 0x7F),
    "not MessagePack": lambda frame, raw: raw[: HEADER.size] + b"\xc1" * frame.length,
    "not ok": lambda frame, raw: raw.replace(b"\xa2ok\xc3", b"\xa2ok\xc2"),
    "another digest": lambda frame, raw: flip(raw, raw.index(b"\xa6digest") + 7 + 2),
    "another number of bytes": lambda frame, raw: flip(raw, raw.index(b"\xa9num_bytes") + 10 + 1),
}


@pytest.mark.parametrize("change", TRAILER_CHANGES)
async def test_a_changed_trailer_never_passes(family: str, tmp_path: Path, change: str) -> None:
    def tamper(number: int, frame: Frame, raw: bytes) -> Iterable[bytes | Fault]:
        return [TRAILER_CHANGES[change](frame, raw) if frame.kind is FrameKind.TRAILER else raw]

    async with KvPair(family, tmp_path) as pair, pair.proxy(tamper) as proxy:
        pair.endpoints = [proxy.endpoint]
        lease = pair.grant(0, 8)
        error = await pair.pull_failure(pair.request(lease, progress_timeout_s=0.5))
        assert proxy.num_faults == 1
        assert error.code is ErrorCode.KV_TRANSFER_FAILED
        assert await pair.ended(lease) is LeaseEnd.FAILED


async def test_frames_of_two_sessions_exchanged(family: str, tmp_path: Path) -> None:
    """Session A's frame, whole and unharmed, in session B's stream: only B's pull fails."""
    first: list[bytes] = []

    def tamper(number: int, frame: Frame, raw: bytes) -> Iterable[bytes | Fault]:
        if not is_payload(frame):
            return [raw]
        first.append(raw)
        return [first[0]]

    async with KvPair(family, tmp_path) as pair, pair.proxy(tamper) as proxy:
        pair.endpoints = [proxy.endpoint]
        mine, other = pair.grant(0, 8), pair.grant(0, 8)
        await pair.pull(pair.request(mine))
        error = await pair.pull_failure(pair.request(other))
        assert proxy.num_faults == 1
        assert error.code is ErrorCode.KV_TRANSFER_FAILED
        assert await pair.ended(mine) is LeaseEnd.DELIVERED
        assert await pair.ended(other) is LeaseEnd.FAILED


async def test_a_frame_outside_the_range_asked_for(family: str, tmp_path: Path) -> None:
    """The source may not write where the receiver did not ask it to."""

    def tamper(number: int, frame: Frame, raw: bytes) -> Iterable[bytes | Fault]:
        if not is_payload(frame):
            return [raw]
        outside = Segment(0, 3, 8, 12)
        length = outside.num_bytes(SMALL)
        lease = LeaseId(*frame.lease)
        if frame.kind is FrameKind.RANGES:
            return [encode_header(FrameKind.RANGES, lease, outside, frame.length) + raw[HEADER.size :]]
        return [encode_header(FrameKind.SEGMENT, lease, outside, length) + raw[HEADER.size :][:length]]

    async with KvPair(family, tmp_path) as pair, pair.proxy(tamper) as proxy:
        pair.endpoints = [proxy.endpoint]
        await pair.pull_failure(pair.request(pair.grant(0, 8)))
        assert proxy.num_faults == 1
        assert pair.target.blocks.max() == 0


@pytest.mark.parametrize("family", ["shm", "nixl"], indirect=True)
async def test_a_frame_larger_than_can_be_read_at_once(family: str, tmp_path: Path) -> None:
    """A sender of another version, or one that means harm: nothing may be read beyond what there is room for."""
    async with KvPair(family, tmp_path, layout=LARGE) as pair:
        lane = pair.lanes[0].find(family)
        assert lane is not None
        lane.chunk_bytes *= 2
        lease = pair.grant(0, 40 * 16)
        error = await pair.pull_failure(pair.request(lease))
        assert "too many" in error.message
        assert await pair.ended(lease) is LeaseEnd.FAILED
        assert pair.target.blocks.max() == 0
        lane.chunk_bytes //= 2
        await pair.assert_serves()
