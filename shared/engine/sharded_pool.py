"""The KV pools of tensor-parallel ranks, seen as one: transfers meet the whole layout, that of a worker of one device.

Each rank holds, of every slot, the KV of its own consecutive heads. So the bytes of a whole slot are the ranks' slots
one after another, and a copy between the two forms is a strided copy a rank. Nothing here computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from shared.core.types import KvLayout, Segment
from shared.engine.kv_pool import check_num_blocks, check_segment
from shared.errors import ErrorCode, KvTransferError
from shared.transport.flat_memory import FlatMemory
from shared.transport.ranges import ByteRange
from shared.transport.region import Region

Bytes = NDArray[np.uint8]


class ShardedKvPool:
    """`regions`: of each rank, its pool's bytes, [num_blocks, num_layers, 2, block_size, slot_bytes / ranks]; zeroed.

    As with KvPool, who may touch which block is decided elsewhere; block 0 is padding.
    """

    has_views = False
    device = "cpu"
    region: Region | None = None  # in which the pool would lie as Segment orders it
    flat: FlatMemory | None = None

    def __init__(self, layout: KvLayout, num_blocks: int, regions: Sequence[Region]) -> None:
        check_num_blocks(num_blocks)
        self.layout = layout
        self.num_blocks = num_blocks
        self._shard_slot_bytes = layout.slot_bytes // len(regions)
        shape = (num_blocks, layout.num_layers, 2, layout.block_size, self._shard_slot_bytes)
        self._shards: list[Bytes] = [np.frombuffer(one.data, dtype=np.uint8).reshape(shape) for one in regions]
        for shard in self._shards:
            shard.fill(0)  # first touch here, not in the first transfer

    def segment_views(self, block_table: Sequence[int], segment: Segment) -> list[memoryview]:
        """Raises KvTransferError: a slot's bytes lie in several places."""
        raise KvTransferError(
            ErrorCode.INTERNAL, "KV of tensor-parallel ranks has no views: use read_segment / write_segment"
        )

    def byte_ranges(self, block_table: Sequence[int], segment: Segment) -> list[ByteRange]:
        """Raises KvTransferError, as segment_views."""
        raise KvTransferError(ErrorCode.INTERNAL, "KV of tensor-parallel ranks is not in one memory")

    def read_segment(self, block_table: Sequence[int], segment: Segment) -> memoryview:
        """A copy of the segment's bytes in the order Segment defines.

        Raises KvTransferError if the segment does not lie within the layout and `block_table`.
        """
        check_segment(self.layout, self.num_blocks, block_table, segment)
        staging = np.empty(segment.num_bytes(self.layout), dtype=np.uint8)
        for part, blocks, slots in self._parts(staging, block_table, segment):
            for whole, shard in zip(part, self._shards, strict=True):
                for index, block in enumerate(blocks):
                    whole[index] = shard[block, segment.layer_start : segment.layer_stop, :, slots]
        return staging.data

    def write_segment(self, block_table: Sequence[int], segment: Segment, data: bytes | bytearray | memoryview) -> None:
        """The inverse of read_segment; returns when the bytes are in every rank's pool.

        Raises KvTransferError as read_segment, and if `data` is not exactly the segment's number of bytes.
        """
        check_segment(self.layout, self.num_blocks, block_table, segment)
        source = np.frombuffer(data, dtype=np.uint8)
        if source.size != segment.num_bytes(self.layout):
            raise KvTransferError(
                ErrorCode.KV_TRANSFER_FAILED,
                f"the segment has {segment.num_bytes(self.layout)} bytes, but {source.size} were given",
            )
        for part, blocks, slots in self._parts(source, block_table, segment):
            for whole, shard in zip(part, self._shards, strict=True):
                for index, block in enumerate(blocks):
                    shard[block, segment.layer_start : segment.layer_stop, :, slots] = whole[index]

    def _parts(
        self, data: Bytes, block_table: Sequence[int], segment: Segment
    ) -> Iterator[tuple[Bytes, Sequence[int], slice]]:
        """The segment as runs of blocks of which it has the same slots, at most three: (part, blocks, slots).

        part is a view of `data`, [ranks, blocks, layers, 2, slots, slot_bytes / ranks].
        """
        size = self.layout.block_size
        num_layers = segment.layer_stop - segment.layer_start
        position, offset = segment.token_start, 0
        while position < segment.token_stop:
            index, first = divmod(position, size)
            whole_blocks = (segment.token_stop // size - index) if first == 0 else 0
            count = max(1, whole_blocks)
            last = size if whole_blocks else min(size, segment.token_stop - index * size)
            shape = (count, num_layers, 2, last - first, len(self._shards), self._shard_slot_bytes)
            num_bytes = count * num_layers * 2 * (last - first) * self.layout.slot_bytes
            part = np.moveaxis(data[offset : offset + num_bytes].reshape(shape), 4, 0)
            yield part, block_table[index : index + count], slice(first, last)
            offset += num_bytes
            position = (index + count - 1) * size + last
