"""The sending side of one pull: leased segments, as they are published. Blocking, in a thread of its connection.

The lease is checked before every frame and after the last byte: with a one-sided lane that is when the receiver has
said that it has copied it.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

from shared.core.types import KvLayout, Segment
from shared.errors import AmpdError, ErrorCode
from shared.transport.channel import Channel, ConnectionLost
from shared.transport.lanes import Lane
from shared.transport.leases import Lease, Publication
from shared.transport.protocol import (
    CHUNK_BYTES,
    Digest,
    FrameKind,
    KvMemory,
    LeaseId,
    PullBody,
    Trailer,
    as_staged,
    encode_header,
    encode_ranges,
    split_segment,
)

MAX_UNCOPIED_FRAMES = 4  # of a one-sided lane; what a receiver may still read of a lease that has ended


class SegmentSender(Protocol):
    digest: Digest
    num_bytes: int  # of payload, so far
    chunk_bytes: int  # of a frame, at most (see split_segment)

    def send(self, segment: Segment) -> None:
        """One frame. Raises ConnectionLost."""
        ...

    def finish(self) -> None:
        """Return when every frame's bytes have left the pool. Raises ConnectionLost."""
        ...


class StreamSender:
    """The payload goes into the connection."""

    chunk_bytes = CHUNK_BYTES

    def __init__(self, channel: Channel, name: LeaseId, memory: KvMemory, lease: Lease) -> None:
        self.digest = Digest()
        self.num_bytes = 0
        self._channel = channel
        self._name = name
        self._memory = memory
        self._lease = lease

    def send(self, segment: Segment) -> None:
        staged = as_staged(self._memory)
        if staged is None:
            views = self._memory.segment_views(self._lease.block_table, segment)
        else:
            views = [staged.read_segment(self._lease.block_table, segment)]
        length = segment.num_bytes(self._memory.layout)
        header = memoryview(encode_header(FrameKind.SEGMENT, self._name, segment, length))
        self._channel.send([header, *views], self.digest)
        self.num_bytes += length

    def finish(self) -> None:
        """What has been sent is the kernel's."""


class RangeSender:
    """The receiver is told where in the pool the payload lies, and says when it has it."""

    def __init__(self, channel: Channel, name: LeaseId, lane: Lane, lease: Lease) -> None:
        self.digest = Digest()
        self.num_bytes = 0
        self.chunk_bytes = lane.chunk_bytes
        self._channel = channel
        self._name = name
        self._lane = lane
        self._memory = lane.memory
        self._lease = lease
        self._uncopied: deque[Segment] = deque()

    def send(self, segment: Segment) -> None:
        while len(self._uncopied) >= MAX_UNCOPIED_FRAMES:
            self._await_copied()
        ranges = self._memory.byte_ranges(self._lease.block_table, segment)
        body = encode_ranges(ranges)
        header = encode_header(FrameKind.RANGES, self._name, segment, len(body))
        self._channel.send([memoryview(header + body)])
        self._uncopied.append(segment)
        self.digest.update(header + body)
        self._lane.add_to_digest(self.digest, ranges)
        self.num_bytes += segment.num_bytes(self._memory.layout)

    def finish(self) -> None:
        while self._uncopied:
            self._await_copied()

    def _await_copied(self) -> None:
        frame = self._channel.receive_frame()
        if (frame.kind, frame.lease, frame.segment) != (FrameKind.COPIED, self._name, self._uncopied[0]):
            raise AmpdError(ErrorCode.MALFORMED_MESSAGE, f"COPIED of {self._uncopied[0]} was due, {frame} came")
        self._uncopied.popleft()


def send_lease(
    channel: Channel, name: LeaseId, lease: Lease, body: PullBody, sender: SegmentSender, layout: KvLayout,
    keepalive_s: float,
) -> None:  # fmt: skip
    """Send what is published of the range asked for, as it is published, then the trailer.

    Raises ConnectionLost, and also if the lease ended before the last byte: the trailer has said so, and the connection
    is given up. Raises AmpdError MALFORMED_MESSAGE.
    """
    waiting_s, index = 0.0, 0
    failure: AmpdError | None = None
    try:
        while True:
            asked_at = time.perf_counter()
            found = lease.next_segment(index, keepalive_s)
            waiting_s += time.perf_counter() - asked_at
            if found is Publication.COMPLETE:
                break
            if found is Publication.PENDING:
                channel.send_control(FrameKind.KEEPALIVE, lease=name)
                continue
            index += 1
            wanted = found._replace(
                token_start=max(found.token_start, body.token_start),
                token_stop=min(found.token_stop, body.token_stop),
            )
            if wanted.token_start >= wanted.token_stop:
                continue  # the receiver has these
            for segment in split_segment(wanted, layout, sender.chunk_bytes):
                lease.check()
                sender.send(segment)
        sender.finish()
        lease.check()
    except ConnectionLost:
        raise
    except AmpdError as error:
        failure = error
    trailer = Trailer(
        ok=failure is None,
        digest=sender.digest.digest(),
        num_bytes=sender.num_bytes,
        waiting_s=waiting_s,
        code=failure.code if failure else "",
        message=failure.message[:500] if failure else "",
    )
    channel.send_control(FrameKind.TRAILER, trailer, name)
    if failure is not None:
        raise ConnectionLost(failure.code, failure.message) from failure
