"""shm: receivers on this host map the sender's pool, read-only, and copy from it.

The memory file's descriptor goes over the Unix socket (SCM_RIGHTS) once a connection. A mapping lives as long as a
connection to its owner does, so that a worker that is gone does not keep its memory.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from shared.errors import AmpdError, ErrorCode
from shared.transport.channel import PIECE_BYTES, Channel
from shared.transport.lanes import OneSidedMemory
from shared.transport.protocol import Digest
from shared.transport.ranges import ByteRange
from shared.transport.region import map_to_read

Bytes = npt.NDArray[np.uint8]


class ShmLane:
    """See Lane. Raises AmpdError INVALID_REQUEST for a pool that is not in shared memory."""

    name = "shm"

    def __init__(self, memory: OneSidedMemory) -> None:
        if memory.region is None or not memory.region.is_shared:
            raise AmpdError(ErrorCode.INVALID_REQUEST, "KV goes by shm only from a pool in shared host memory")
        self.memory = memory
        self._region = memory.region
        self._lock = threading.Lock()
        self._mapped: weakref.WeakValueDictionary[tuple[int, int], MappedPool] = (
            weakref.WeakValueDictionary()
        )  # by file

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
                    pool = MappedPool(map_to_read(descriptor, int.from_bytes(description, "little")))
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

    def __init__(self, data: memoryview) -> None:
        self._bytes = np.frombuffer(data, dtype=np.uint8)
        self.num_bytes = data.nbytes

    def begin(self, ranges: Sequence[ByteRange], check: Callable[[], None], *, wait: bool) -> Copying:
        return Copying([self._bytes[start:stop] for start, stop in ranges])


class Copying:
    """See Reading: copied when it is finished."""

    def __init__(self, sources: list[Bytes]) -> None:
        self._sources = sources

    def finish(self, views: Sequence[memoryview], digest: Digest) -> None:
        """In pieces that are digested while they are in the cache."""
        for target, source in pair_pieces([np.frombuffer(view, dtype=np.uint8) for view in views], self._sources):
            np.copyto(target, source)
            digest.update(target.data)

    def abandon(self) -> None:
        """Nothing has begun."""


def pair_pieces(targets: Sequence[Bytes], sources: Sequence[Bytes]) -> Iterator[tuple[Bytes, Bytes]]:
    """Pieces of at most PIECE_BYTES, each contiguous on both sides, of two lists with equally many bytes."""
    remaining = iter(targets)
    target = next(remaining, None)
    used = 0
    for source in sources:
        start = 0
        while start < source.size:
            while target is not None and used == target.size:
                target, used = next(remaining, None), 0
            assert target is not None, "both sides have as many bytes"
            size = min(PIECE_BYTES, source.size - start, target.size - used)
            yield target[used : used + size], source[start : start + size]
            start, used = start + size, used + size
