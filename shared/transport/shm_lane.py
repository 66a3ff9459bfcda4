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
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

from shared.errors import AmpdError, ErrorCode
from shared.transport.channel import Channel
from shared.transport.copier import Copier
from shared.transport.flat_memory import HostBytes, add_sample, pair_ranges
from shared.transport.lanes import OneSidedMemory, count_frame_bytes
from shared.transport.protocol import Digest
from shared.transport.ranges import ByteRange
from shared.transport.region import map_to_read


class ShmLane:
    """See Lane. Raises AmpdError INVALID_REQUEST for a pool that is not in shared memory."""

    name = "shm"
    chunk_bytes = 64 << 20

    def __init__(self, memory: OneSidedMemory) -> None:
        if memory.region is None or not memory.region.is_shared:
            raise AmpdError(ErrorCode.INVALID_REQUEST, "KV goes by shm only from a pool in shared host memory")
        self.memory = memory
        self._region = memory.region
        self._flat = HostBytes(memory.region.data)
        self._copier = Copier("kv-shm-copy")
        self._lock = threading.Lock()
        self._mapped: weakref.WeakValueDictionary[tuple[int, int], MappedPool] = weakref.WeakValueDictionary()

    def add_to_digest(self, digest: Digest, ranges: Sequence[ByteRange]) -> None:
        add_sample(digest, self._flat, ranges)

    def suits(self, channel: Channel) -> bool:
        return channel.sock.family == socket.AF_UNIX

    def describe(self) -> bytes:
        return self._region.data.nbytes.to_bytes(8, "little")

    def hand_over(self, channel: Channel) -> None:
        channel.send_descriptor(self._region.descriptor)

    def open(self, channel: Channel, peer: tuple[str, int], description: bytes) -> MappedPool:
        descriptor = channel.receive_descriptor()
        try:
            status = os.fstat(descriptor)  # a file is known by its device and number, whatever name its owner has
            with self._lock:
                pool = self._mapped.get((status.st_dev, status.st_ino))
                if pool is None:
                    data = map_to_read(descriptor, int.from_bytes(description, "little"))
                    pool = MappedPool(
                        self.memory, self._copier, data, count_frame_bytes(self.memory.layout, self.chunk_bytes)
                    )
                    self._mapped[status.st_dev, status.st_ino] = pool
            return pool
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        self._copier.close()


class MappedPool:
    """See RemotePool."""

    description = "shm"

    def __init__(self, memory: OneSidedMemory, copier: Copier, data: memoryview, max_frame_bytes: int) -> None:
        self.memory = memory
        self._copier = copier
        self._flat = HostBytes(data)
        self.num_bytes = data.nbytes
        self.max_frame_bytes = max_frame_bytes

    def begin(self, ranges: Sequence[ByteRange], check: Callable[[], None], *, wait: bool) -> Copying:
        return Copying(self.memory, self._copier, self._flat, ranges)


class Copying:
    """See Reading: copied when it is finished."""

    def __init__(self, memory: OneSidedMemory, copier: Copier, source: HostBytes, ranges: Sequence[ByteRange]) -> None:
        self._memory = memory
        self._copier = copier
        self._source = source
        self._ranges = ranges

    def finish(self, targets: Sequence[ByteRange], digest: Digest) -> None:
        flat = self._memory.flat
        assert flat is not None, "ShmLane has looked"
        self._copier.copy(flat, self._source, pair_ranges(targets, self._ranges))
        add_sample(digest, flat, targets)

    def abandon(self) -> None:
        """Nothing has begun."""
