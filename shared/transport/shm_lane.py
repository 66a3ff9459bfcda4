"""shm: receivers on this host map the sender's pool, read-only, and copy from it.

The memory file's descriptor goes over the Unix socket (SCM_RIGHTS) once a connection. A mapping lives as long as a
connection to its owner does, so that a worker that is gone does not keep its memory.

No wire is passed, so the digest is of a sample: a word of every few pages, enough to tell another block, or one that
has been written to, from what was leased. A digest of every byte, at both ends, would cost twice what the copy does.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from shared.errors import AmpdError, ErrorCode
from shared.transport.channel import Channel
from shared.transport.lanes import OneSidedMemory, count_frame_bytes
from shared.transport.protocol import Digest
from shared.transport.ranges import ByteRange
from shared.transport.region import map_to_read

Bytes = npt.NDArray[np.uint8]
SAMPLE_BYTES = 8
STRIDE_BYTES, LONG_STRIDE_BYTES = 4096, 16_384  # the long one for more than LONG_BYTES: whole blocks
LONG_BYTES = 4 << 20


class ShmLane:
    """See Lane. Raises AmpdError INVALID_REQUEST for a pool that is not in shared memory."""

    name = "shm"
    chunk_bytes = 64 << 20

    def __init__(self, memory: OneSidedMemory) -> None:
        if memory.region is None or not memory.region.is_shared:
            raise AmpdError(ErrorCode.INVALID_REQUEST, "KV goes by shm only from a pool in shared host memory")
        self.memory = memory
        self._region = memory.region
        self._lock = threading.Lock()
        self._mapped: weakref.WeakValueDictionary[tuple[int, int], MappedPool] = (
            weakref.WeakValueDictionary()
        )  # by file

    def add_to_digest(self, digest: Digest, views: Sequence[memoryview]) -> None:
        add_sample(digest, [np.frombuffer(view, dtype=np.uint8) for view in views])

    def suits(self, channel: Channel) -> bool:
        return channel.sock.family == socket.AF_UNIX

    def describe(self) -> bytes:
        return self._region.data.nbytes.to_bytes(8, "little")

    def hand_over(self, channel: Channel) -> None:
        channel.send_descriptor(self._region.descriptor)

    def open(self, channel: Channel, peer: tuple[str, int], description: bytes) -> MappedPool:
        descriptor = channel.receive_descriptor()
        try:
            status = os.fstat(descriptor)
            with self._lock:
                pool = self._mapped.get((status.st_dev, status.st_ino))
                if pool is None:
                    data = map_to_read(descriptor, int.from_bytes(description, "little"))
                    pool = MappedPool(data, count_frame_bytes(self.memory.layout, self.chunk_bytes))
                    self._mapped[status.st_dev, status.st_ino] = pool
            return pool
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        """Nothing is held."""


class MappedPool:
    """See RemotePool."""

    description = "shm"

    def __init__(self, data: memoryview, max_frame_bytes: int) -> None:
        self._bytes = np.frombuffer(data, dtype=np.uint8)
        self.num_bytes = data.nbytes
        self.max_frame_bytes = max_frame_bytes

    def begin(self, ranges: Sequence[ByteRange], check: Callable[[], None], *, wait: bool) -> Copying:
        return Copying([self._bytes[start:stop] for start, stop in ranges])


class Copying:
    """See Reading: copied when it is finished."""

    def __init__(self, sources: list[Bytes]) -> None:
        self._sources = sources

    def finish(self, views: Sequence[memoryview], digest: Digest) -> None:
        targets = [np.frombuffer(view, dtype=np.uint8) for view in views]
        for target, source in pair_pieces(targets, self._sources):
            np.copyto(target, source)
        add_sample(digest, targets)

    def abandon(self) -> None:
        """Nothing has begun."""


def pair_pieces(
    targets: Sequence[Bytes], sources: Sequence[Bytes], max_bytes: int = sys.maxsize
) -> Iterator[tuple[Bytes, Bytes]]:
    """Pieces of at most max_bytes, each contiguous on both sides, of two lists with equally many bytes."""
    remaining = iter(targets)
    target = next(remaining, None)
    used = 0
    for source in sources:
        start = 0
        while start < source.size:
            while target is not None and used == target.size:
                target, used = next(remaining, None), 0
            assert target is not None, "both sides have as many bytes"
            size = min(max_bytes, source.size - start, target.size - used)
            yield target[used : used + size], source[start : start + size]
            start, used = start + size, used + size


def add_sample(digest: Digest, pieces: Sequence[Bytes]) -> None:
    """The first SAMPLE_BYTES of every stride of all the bytes, however they are cut into pieces."""
    stride = STRIDE_BYTES if sum(piece.size for piece in pieces) <= LONG_BYTES else LONG_STRIDE_BYTES
    position = 0  # within a stride
    for piece in pieces:
        first = min(piece.size, -position % stride)
        if position < SAMPLE_BYTES:
            digest.update(piece[: min(first, SAMPLE_BYTES - position)].data)
        whole = (piece.size - first) // stride
        stop = first + whole * stride
        if whole:
            strides = piece[first:stop].reshape(whole, stride)
            digest.update(np.ascontiguousarray(strides.view(np.uint64)[:, 0]).data)
        rest = piece[stop:]
        digest.update(rest[:SAMPLE_BYTES].data)
        position = (position + piece.size) % stride
