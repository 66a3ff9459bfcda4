"""How a segment's bytes get from one worker's pool into another's, and which way two workers agree on.

stream   the sender writes them into the connection (TCP or a Unix socket)
shm      the receiver copies them out of the sender's pool, which it has mapped (shm_lane.py)
nixl     the receiver reads them from the sender's pool with NVIDIA's NIXL (nixl_lane.py)

With shm and nixl, which are one-sided, the connection carries everything else: tickets, leases, which byte ranges a
segment is, that they have been copied, the trailer with the digest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from shared.core.types import KvLayout, Segment
from shared.errors import AmpdError, ErrorCode, KvTransferError
from shared.transport.channel import Channel
from shared.transport.flat_memory import FlatMemory
from shared.transport.protocol import Digest, KvMemory
from shared.transport.ranges import ByteRange
from shared.transport.region import Region

STREAM = "stream"


class LaneUnusable(KvTransferError):
    """The peer's pool cannot be read by this lane. Another way may do, for the next pull: this one's ticket is used."""


class OneSidedMemory(KvMemory, Protocol):
    """A pool that can be read by address. `flat`: None where its bytes are not in Segment's order. `region`: None where
    it is not in one piece of host memory."""

    @property
    def region(self) -> Region | None: ...
    @property
    def flat(self) -> FlatMemory | None: ...
    def byte_ranges(self, block_table: Sequence[int], segment: Segment) -> list[ByteRange]: ...


class Reading(Protocol):
    """Bytes of the sender's pool on their way."""

    def finish(self, targets: Sequence[ByteRange], digest: Digest) -> None:
        """Put them there in this worker's pool, and add a sample to the digest. Raises KvTransferError, LaneUnusable if
        nothing could ever be read of the peer's; then nothing of this reading touches the pool any more."""
        ...

    def abandon(self) -> None:
        """What has been read is not wanted."""
        ...


class RemotePool(Protocol):
    """The pool of a peer, as its receivers read it; any number of threads. `memory`: into which they read."""

    memory: OneSidedMemory
    num_bytes: int
    max_frame_bytes: int  # that can be read at once
    description: str  # of the way the bytes take: for the log and the status

    def begin(self, ranges: Sequence[ByteRange], check: Callable[[], None], *, wait: bool) -> Reading | None:
        """Start to read. None: there is no room for another reading now, and `wait` is false.

        `check` raises when the pull has to stop: its deadline, no progress, cancelled.
        """
        ...


class Lane(Protocol):
    """A one-sided way, at a worker that is sender and receiver: one object for all of its connections."""

    name: str
    memory: OneSidedMemory
    chunk_bytes: int  # of a frame's payload, unless one block of one layer is larger

    def add_to_digest(self, digest: Digest, ranges: Sequence[ByteRange]) -> None:
        """Sender: of a frame's bytes, in the pool, what its receiver adds when it has them."""
        ...

    def suits(self, channel: Channel) -> bool: ...

    def describe(self) -> bytes:
        """What a receiver has to know to read this worker's pool."""
        ...

    def hand_over(self, channel: Channel) -> None:
        """Sender, after its POOL: what cannot be told in bytes."""
        ...

    def open(self, channel: Channel, peer: tuple[str, int], description: bytes) -> RemotePool:
        """Receiver, after the POOL of `peer` (worker id, incarnation). Raises KvTransferError."""
        ...

    def serving(self) -> AbstractContextManager[None]:
        """Sender, while a peer may read."""
        ...

    def close(self) -> None: ...


def count_frame_bytes(layout: KvLayout, chunk_bytes: int) -> int:
    """Of the largest frame (see split_segment): a chunk, or one block of one layer if that is more."""
    return max(chunk_bytes, 2 * layout.slot_bytes * layout.block_size)


class Lanes:
    """What one worker can do, best first. `streams`: whether bytes may go through the connection itself."""

    def __init__(self, one_sided: Sequence[Lane] = (), *, streams: bool = True) -> None:
        self._one_sided = tuple(one_sided)
        self._streams = streams

    def names(self, channel: Channel, barred: Collection[str] = ()) -> tuple[str, ...]:
        """Those that the connection allows, the barred ones last."""
        names = [lane.name for lane in self._one_sided if lane.suits(channel)]
        if self._streams:
            names.append(STREAM)
        return tuple(sorted(names, key=lambda name: name in barred))

    def choose(self, channel: Channel, offered: Sequence[str]) -> str:
        """The first of the receiver's that we have too. Raises KvTransferError that says what differs."""
        own = self.names(channel)
        for name in offered:
            if name in own:
                return name
        raise KvTransferError(
            ErrorCode.KV_LAYOUT_MISMATCH,
            f"the receiver can take KV by {', '.join(offered) or 'no way'} over this connection, the sender can give "
            f"it by {', '.join(own) or 'no way'}: start both with the same --kv-transport, or auto",
        )

    def find(self, name: str) -> Lane | None:
        """None for `stream`. Raises AmpdError MALFORMED_MESSAGE for what was not offered."""
        if name == STREAM and self._streams:
            return None
        for lane in self._one_sided:
            if lane.name == name:
                return lane
        raise AmpdError(ErrorCode.MALFORMED_MESSAGE, f"the peer chose to move KV by {name}, which was not offered")

    def close(self) -> None:
        for lane in self._one_sided:
            lane.close()
