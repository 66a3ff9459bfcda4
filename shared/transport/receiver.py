"""The receiving side of one pull: frames into KV blocks, each checked before its first byte is written.

Blocking; runs in a thread of its own (client.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from shared.core.types import RoundKey, Segment
from shared.errors import AmpdError, ErrorCode, KvTransferError
from shared.transport.channel import Channel, ConnectionLost, Interrupt
from shared.transport.lanes import Lane, Lanes, LaneUnusable, Reading, RemotePool
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
    PoolBody,
    PullBody,
    Refused,
    Trailer,
    as_staged,
    check_peer,
    check_ranges_length,
    decode_header,
    decode_ranges,
    encode_header,
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
    published more. num_segments: frames received. lane: the way that the bytes took.
    """

    num_bytes: int
    wall_s: float
    waiting_s: float
    num_segments: int
    lane: str


@dataclass(slots=True)
class Connection:
    """A greeted connection to a sender. `pool`: what it has told of its pool with the first pull; None where bytes come
    through the connection."""

    channel: Channel
    peer: tuple[str, int]  # worker id, incarnation
    lane: Lane | None
    pool: RemotePool | None = None

    @property
    def description(self) -> str:
        """Of the way that bytes take."""
        return self.channel.description if self.pool is None else self.pool.description


def greet(
    channel: Channel,
    memory: KvMemory,
    lanes: Lanes,
    worker_id: str,
    incarnation: int,
    request: PullRequest,
    barred: Collection[str] = (),
) -> Connection:
    """Open a new connection's conversation. `barred`: lanes to be offered last. Raises KvTransferError that says what
    differs."""
    layout = memory.layout
    mine = Hello(
        protocol=PROTOCOL_VERSION,
        worker_id=worker_id,
        incarnation=incarnation,
        layout_hash=layout.layout_hash,
        layout=layout,
        peer_id=request.source,
        peer_incarnation=request.source_incarnation,
        lanes=lanes.names(channel, barred),
    )
    channel.send_control(FrameKind.HELLO, mine)
    theirs = channel.receive_body(_expect(channel, channel.receive_frame(), FrameKind.WELCOME), Hello)
    check_peer(mine, theirs)
    lane = lanes.find(theirs.lanes[0] if theirs.lanes else "")
    return Connection(channel, (theirs.worker_id, theirs.incarnation), lane)


def receive_kv(
    connection: Connection, memory: KvMemory, request: PullRequest, started_at: float, interrupt: Interrupt
) -> PullResult:
    """Pull over a greeted connection. Raises AmpdError; then what was written to the blocks must not be used."""
    channel = connection.channel
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
    if connection.lane is not None and connection.pool is None:
        frame = _expect(channel, channel.receive_frame(), FrameKind.POOL)
        body = channel.receive_body(frame, PoolBody)
        try:
            connection.pool = connection.lane.open(channel, connection.peer, body.description)
        except ConnectionLost:
            raise
        except KvTransferError as error:
            raise LaneUnusable(error.code, f"{connection.lane.name}: {error.message}") from error
    incoming = _Incoming(channel, memory, connection.pool, request, name, interrupt)
    try:
        trailer = incoming.receive()
    finally:
        incoming.abandon()
    _verify(trailer, incoming.coverage, incoming.digest.digest(), incoming.num_bytes)
    channel.send_control(FrameKind.DELIVERED, lease=name)
    return PullResult(
        incoming.num_bytes,
        time.monotonic() - started_at,
        trailer.waiting_s,
        incoming.num_segments,
        connection.description,
    )


class _Incoming:
    """What has come of one pull. Of a one-sided lane one reading is under way while the next frame is awaited."""

    def __init__(
        self,
        channel: Channel,
        memory: KvMemory,
        pool: RemotePool | None,
        request: PullRequest,
        name: LeaseId,
        interrupt: Interrupt,
    ) -> None:
        self._channel = channel
        self._memory = memory
        self._pool = pool
        self._request = request
        self._name = name
        self._interrupt = interrupt
        self.coverage = Coverage(memory.layout.num_layers, request.token_start, request.token_stop)
        self.digest = Digest()
        self.num_bytes = self.num_segments = 0
        self._reading: tuple[Segment, bytes, Reading] | None = None  # its frame's header and ranges

    def receive(self) -> Trailer:
        while True:
            if self._reading is not None and not self._channel.has_data():
                self._finish_reading()
            header = self._channel.receive_header()
            frame = decode_header(header)
            if frame.kind is not FrameKind.REFUSED and frame.lease != self._name:
                raise KvTransferError(
                    ErrorCode.KV_TRANSFER_FAILED, f"a frame of {frame.lease} came, not of {self._name}"
                )
            match frame.kind:
                case FrameKind.KEEPALIVE:
                    _require_length(frame, 0)
                case FrameKind.SEGMENT if self._pool is None:
                    self._take_payload(header, frame)
                case FrameKind.RANGES if self._pool is not None:
                    self._take_ranges(bytes(header), frame, self._pool)
                case FrameKind.TRAILER:
                    return self._channel.receive_body(frame, Trailer)
                case FrameKind.REFUSED:
                    raise self._channel.receive_body(frame, Refused).error()
                case _:
                    raise KvTransferError(ErrorCode.KV_TRANSFER_FAILED, f"{frame.kind.name} came instead of KV")

    def _take_payload(self, header: memoryview, frame: Frame) -> None:
        _add(self.coverage, frame.segment)
        _require_length(frame, frame.segment.num_bytes(self._memory.layout))
        self.digest.update(header)
        _receive_segment(self._channel, self._memory, self._request.block_table, frame.segment, self.digest)
        self._count(frame.segment)

    def _take_ranges(self, header: bytes, frame: Frame, pool: RemotePool) -> None:
        """Begin to read these, and finish the ones before."""
        segment, layout = frame.segment, self._memory.layout
        _add(self.coverage, segment)
        if segment.num_bytes(layout) > pool.max_frame_bytes:
            raise KvTransferError(
                ErrorCode.KV_TRANSFER_FAILED, f"RANGES of {segment.num_bytes(layout)} bytes: too many"
            )
        check_ranges_length(frame.length, segment, layout)
        body = bytearray(frame.length)
        self._channel.receive_into([memoryview(body)])
        ranges = decode_ranges(body, segment.num_bytes(layout), pool.num_bytes)
        started_at = time.monotonic()
        reading = pool.begin(ranges, lambda: self._check(started_at), wait=self._reading is None)
        try:
            if self._reading is not None:
                self._finish_reading()
        except BaseException:
            if reading is not None:
                reading.abandon()
            raise
        if reading is None:
            reading = pool.begin(ranges, lambda: self._check(started_at), wait=True)
        assert reading is not None
        self._reading = (segment, header + body, reading)

    def _check(self, started_at: float) -> None:
        if self._interrupt.triggered:
            raise ConnectionLost(ErrorCode.CANCELLED, "the pull was cancelled")
        self._channel.check_progress(started_at)

    def _finish_reading(self) -> None:
        assert self._reading is not None
        assert self._pool is not None
        segment, described, reading = self._reading
        self._reading = None
        self.digest.update(described)
        reading.finish(self._pool.memory.byte_ranges(self._request.block_table, segment), self.digest)
        with contextlib.suppress(ConnectionLost):  # a sender that has given up says why in the trailer
            self._channel.send([memoryview(encode_header(FrameKind.COPIED, self._name, segment, 0))])
        self._count(segment)

    def _count(self, segment: Segment) -> None:
        self.num_bytes += segment.num_bytes(self._memory.layout)
        self.num_segments += 1
        if self._request.on_segment is not None:
            self._request.on_segment(segment)

    def abandon(self) -> None:
        if self._reading is not None:
            self._reading[2].abandon()


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
