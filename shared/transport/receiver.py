"""The receiving side of one pull: frames into KV blocks, each checked before its first byte is written.

Blocking; runs in a thread of its own (client.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

from shared.core.types import RoundKey, Segment
from shared.errors import AmpdError, ErrorCode, KvTransferError
from shared.transport.channel import Channel
from shared.transport.protocol import (
    KEEPALIVE_S,
    PROTOCOL_VERSION,
    Coverage,
    Digest,
    Frame,
    FrameKind,
    Hello,
    KvMemory,
    LeaseId,
    PullBody,
    Refused,
    Trailer,
    as_staged,
    check_peer,
    decode_header,
    split_segment,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PullRequest:
    """Pull KV of positions [token_start, token_stop) of `key` into `block_table` (position p in p // block_size).

    progress_timeout_s: the longest time without any byte from the source; deadline_s: for all of it, from start_pull.
    on_segment is called in the receiver's thread when a part has arrived. That part is *not verified* yet: until wait()
    has returned it may be used for nothing but watching progress.
    """

    key: RoundKey
    endpoints: Sequence[str]
    ticket: bytes
    source: str
    source_incarnation: int
    lease_id: int
    generation: int
    block_table: Sequence[int]
    token_start: int
    token_stop: int
    progress_timeout_s: float = 5.0
    deadline_s: float = 60.0
    on_segment: Callable[[Segment], None] | None = None


@dataclass(frozen=True, slots=True)
class PullResult:
    """Every byte has arrived and its digest is right.

    wall_s: from start_pull. waiting_s: the part of it in which there was nothing to send, because the producer had not
    published more. num_segments: frames received.
    """

    num_bytes: int
    wall_s: float
    waiting_s: float
    num_segments: int


def greet(channel: Channel, memory: KvMemory, worker_id: str, incarnation: int, request: PullRequest) -> None:
    """Open a new connection's conversation. Raises KvTransferError that says what differs."""
    layout = memory.layout
    mine = Hello(
        protocol=PROTOCOL_VERSION,
        worker_id=worker_id,
        incarnation=incarnation,
        layout_hash=layout.layout_hash,
        layout=layout,
        peer_id=request.source,
        peer_incarnation=request.source_incarnation,
    )
    channel.send_control(FrameKind.HELLO, mine)
    theirs = channel.receive_body(_expect(channel, channel.receive_frame(), FrameKind.WELCOME), Hello)
    check_peer(mine, theirs)


def receive_kv(channel: Channel, memory: KvMemory, request: PullRequest, started_at: float) -> PullResult:
    """Pull over a greeted connection. Raises AmpdError; then what was written to the blocks must not be used."""
    name = LeaseId(request.source_incarnation, request.lease_id, request.generation)
    channel.send_control(
        FrameKind.PULL,
        PullBody(
            ticket=request.ticket,
            key=request.key,
            token_start=request.token_start,
            token_stop=request.token_stop,
            keepalive_s=min(KEEPALIVE_S, request.progress_timeout_s / 4),
            progress_timeout_s=request.progress_timeout_s,
        ),
        name,
    )
    layout = memory.layout
    coverage = Coverage(layout.num_layers, request.token_start, request.token_stop)
    digest = Digest()
    num_bytes = num_segments = 0
    while True:
        header = channel.receive_header()
        frame = decode_header(header)
        if frame.kind is not FrameKind.REFUSED and frame.lease != name:
            raise KvTransferError(ErrorCode.KV_TRANSFER_FAILED, f"a frame of {frame.lease} came, not of {name}")
        match frame.kind:
            case FrameKind.KEEPALIVE:
                _require_length(frame, 0)
            case FrameKind.SEGMENT:
                _add(coverage, frame.segment)
                _require_length(frame, frame.segment.num_bytes(layout))
                digest.update(header)
                _receive_segment(channel, memory, request.block_table, frame.segment, digest)
                num_bytes += frame.length
                num_segments += 1
                if request.on_segment is not None:
                    request.on_segment(frame.segment)
            case FrameKind.TRAILER:
                trailer = channel.receive_body(frame, Trailer)
                break
            case FrameKind.REFUSED:
                raise channel.receive_body(frame, Refused).error()
            case FrameKind.HELLO | FrameKind.WELCOME | FrameKind.PULL | FrameKind.DELIVERED:
                raise KvTransferError(ErrorCode.KV_TRANSFER_FAILED, f"{frame.kind.name} came instead of KV")
            case _:
                assert_never(frame.kind)
    _verify(trailer, coverage, digest.digest(), num_bytes)
    channel.send_control(FrameKind.DELIVERED, lease=name)
    return PullResult(num_bytes, time.monotonic() - started_at, trailer.waiting_s, num_segments)


def _receive_segment(
    channel: Channel, memory: KvMemory, block_table: Sequence[int], segment: Segment, digest: Digest
) -> None:
    """The payload of one frame. What is staged takes no more memory than an ordinary frame, whatever the peer sends."""
    staged = as_staged(memory)
    if staged is None:
        channel.receive_into(memory.segment_views(block_table, segment), digest)
        return
    for part in split_segment(segment, memory.layout):
        data = memoryview(bytearray(part.num_bytes(memory.layout)))
        channel.receive_into([data], digest)
        staged.write_segment(block_table, part, data)


def _expect(channel: Channel, frame: Frame, kind: FrameKind) -> Frame:
    if frame.kind is FrameKind.REFUSED:
        raise channel.receive_body(frame, Refused).error()
    if frame.kind is not kind:
        raise KvTransferError(ErrorCode.KV_TRANSFER_FAILED, f"{kind.name} was due, {frame.kind.name} came")
    return frame


def _add(coverage: Coverage, segment: Segment) -> None:
    try:
        coverage.add(segment)
    except ValueError as error:
        raise KvTransferError(ErrorCode.KV_TRANSFER_FAILED, f"a segment that is not due came: {error}") from error


def _require_length(frame: Frame, length: int) -> None:
    if frame.length != length:
        raise KvTransferError(
            ErrorCode.KV_TRANSFER_FAILED, f"{frame.kind.name} claims {frame.length} bytes, it has to have {length}"
        )


def _verify(trailer: Trailer, coverage: Coverage, digest: bytes, num_bytes: int) -> None:
    if not trailer.ok:
        raise Refused(code=trailer.code, message=f"the source gave up: {trailer.message}").error()
    if not coverage.complete or trailer.num_bytes != num_bytes:
        raise KvTransferError(ErrorCode.KV_TRANSFER_FAILED, f"the transfer ended after {num_bytes} bytes of its range")
    if trailer.digest != digest:
        raise KvTransferError(
            ErrorCode.KV_TRANSFER_FAILED, "the digest is wrong: KV was damaged on the way or while it was sent"
        )


def as_transfer_error(error: AmpdError) -> KvTransferError:
    """Whatever went wrong in a pull, as the one type that its caller catches."""
    if isinstance(error, KvTransferError):
        return error
    return KvTransferError(ErrorCode.KV_TRANSFER_FAILED, error.message)
