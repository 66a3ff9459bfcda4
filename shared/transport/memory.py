"""A KV pool in plain host memory, without torch: what the transport's own tests and benchmarks move."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.core.types import KvLayout, Segment
from shared.errors import ErrorCode, KvTransferError
from shared.transport.flat_memory import HostBytes
from shared.transport.ranges import ByteRange, find_ranges, slice_views
from shared.transport.region import allocate_region


class HostKvMemory:
    """KV blocks [num_blocks, num_layers, 2, block_size, slot_bytes] of bytes, zeroed and touched.

    `shared`: peers on this host may map them to read.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, *, shared: bool = False) -> None:
        self.layout = layout
        self.region = allocate_region(num_blocks * layout.bytes_per_block, shared=shared)
        self.flat = HostBytes(self.region.data)
        shape = (num_blocks, layout.num_layers, 2, layout.block_size, layout.slot_bytes)
        self.blocks = np.frombuffer(self.region.data, dtype=np.uint8).reshape(shape)
        self.blocks.fill(0)  # first touch here, not in the first transfer

    def tokens(self, block_table: Sequence[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """A copy of the blocks' bytes in token order: [num_layers, 2, num_tokens, slot_bytes]."""
        by_token = np.moveaxis(self.blocks[list(block_table)], 0, 2)
        return by_token.reshape(*by_token.shape[:2], -1, self.layout.slot_bytes)

    def byte_ranges(self, block_table: Sequence[int], segment: Segment) -> list[ByteRange]:
        if segment.token_stop > len(block_table) * self.layout.block_size:
            raise KvTransferError(ErrorCode.KV_TRANSFER_FAILED, f"{segment} does not lie in {len(block_table)} blocks")
        return find_ranges(self.layout, block_table, segment)

    def segment_views(self, block_table: Sequence[int], segment: Segment) -> list[memoryview]:
        return slice_views(self.region.data, self.byte_ranges(block_table, segment))
