"""A pool's memory as flat bytes, on the host or on a device, as one-sided lanes copy and sample it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from shared.transport.protocol import Digest
from shared.transport.ranges import ByteRange
from shared.transport.region import allocate_region

Kind = Literal["DRAM", "VRAM"]  # NIXL's names
Indices = npt.NDArray[np.int64]
SAMPLE_BYTES = 4
STRIDE_BYTES, LONG_STRIDE_BYTES = 4_096, 16_384  # the long one for more than LONG_BYTES: whole blocks
LONG_BYTES = 4 << 20


class FlatMemory(Protocol):
    """`address`: of its first byte, in this process or on the device `device_index`."""

    kind: Kind
    device_index: int

    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

    def gather(self, indices: Indices) -> bytes:
        """The bytes at these places."""
        ...

    def gather_words(self, indices: Indices) -> bytes:
        """The words of SAMPLE_BYTES at these multiples of SAMPLE_BYTES."""
        ...

    def copy_from(self, source: FlatMemory, pieces: Sequence[tuple[int, int, int]]) -> None:
        """(here, there, num_bytes) each; `source` is of the same kind. All is copied on return."""
        ...

    def allocate(self, num_bytes: int) -> FlatMemory:
        """Other memory of the same kind, zeroed."""
        ...


class HostBytes:
    """See FlatMemory. `data`: writable, unless it is only a source."""

    kind: Kind = "DRAM"
    device_index = 0

    def __init__(self, data: memoryview) -> None:
        self._bytes = np.frombuffer(data, dtype=np.uint8)

    @property
    def address(self) -> int:
        return int(self._bytes.ctypes.data)

    @property
    def num_bytes(self) -> int:
        return self._bytes.size

    def gather(self, indices: Indices) -> bytes:
        return self._bytes[indices].tobytes()

    def gather_words(self, indices: Indices) -> bytes:
        whole = self._bytes.size // SAMPLE_BYTES * SAMPLE_BYTES
        return self._bytes[:whole].view(np.uint32)[indices].tobytes()

    def copy_from(self, source: FlatMemory, pieces: Sequence[tuple[int, int, int]]) -> None:
        assert isinstance(source, HostBytes)
        for here, there, num_bytes in pieces:
            np.copyto(self._bytes[here : here + num_bytes], source._bytes[there : there + num_bytes])

    def allocate(self, num_bytes: int) -> HostBytes:
        allocated = HostBytes(allocate_region(num_bytes, shared=False).data)
        allocated._bytes.fill(0)
        return allocated


def pair_ranges(targets: Sequence[ByteRange], sources: Sequence[ByteRange]) -> Iterator[tuple[int, int, int]]:
    """(place in the target, place in the source, bytes) of pieces that are contiguous on both sides. The two have
    equally many bytes."""
    remaining = iter(targets)
    start = stop = 0
    for source in sources:
        place = source.start
        while place < source.stop:
            if start == stop:
                start, stop = next(remaining)
            num_bytes = min(stop - start, source.stop - place)
            yield start, place, num_bytes
            start, place = start + num_bytes, place + num_bytes


def add_sample(digest: Digest, memory: FlatMemory, ranges: Sequence[ByteRange]) -> None:
    """The first SAMPLE_BYTES of every stride of all the ranges' bytes one after another, however they are cut."""
    starts = np.array([one.start for one in ranges], dtype=np.int64)
    lengths = np.array([one.stop - one.start for one in ranges], dtype=np.int64)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    total = int(ends[-1])
    words = np.arange(0, total, STRIDE_BYTES if total <= LONG_BYTES else LONG_STRIDE_BYTES)
    if not ((starts | lengths) % SAMPLE_BYTES).any():  # no word is cut: as always but for tiny layouts
        which = np.searchsorted(ends, words, side="right")
        digest.update(memory.gather_words((starts[which] + words - begins[which]) // SAMPLE_BYTES))
        return
    places = (words[:, None] + np.arange(SAMPLE_BYTES)).reshape(-1)
    places = places[places < total]
    which = np.searchsorted(ends, places, side="right")
    digest.update(memory.gather(starts[which] + places - begins[which]))
