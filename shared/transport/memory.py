"""A KV pool in plain host memory, without torch: what the transport's own tests and benchmarks move."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.core.types import KvLayout, Segment
from shared.errors import ErrorCode, KvTransferError


class HostKvMemory:
    """KV blocks [num_blocks, num_layers, 2, block_size, slot_bytes] of bytes, zeroed and touched."""

    def __init__(self, layout: KvLayout, num_blocks: int) -> None:
        self.layout = layout
        self.blocks = np.empty((num_blocks, layout.num_layers, 2, layout.block_size, layout.slot_bytes), dtype=np.uint8)
        self.blocks.fill(0)  # first touch here, not in the first transfer
        self._bytes = self.blocks.data.cast("B")

    def tokens(self, block_table: Sequence[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """A copy of the blocks' bytes in token order: [num_layers, 2, num_tokens, slot_bytes]."""
        by_token = np.moveaxis(self.blocks[list(block_table)], 0, 2)
        return by_token.reshape(*by_token.shape[:2], -1, self.layout.slot_bytes)

    def segment_views(self, block_table: Sequence[int], segment: Segment) -> list[memoryview]:
        """See KvMemory. One view a block where the segment has all of its slots, else one a layer, key and value."""
        layout = self.layout
        plane = layout.block_size * layout.slot_bytes
        if segment.token_stop > len(block_table) * layout.block_size:
            raise KvTransferError(ErrorCode.KV_TRANSFER_FAILED, f"{segment} does not lie in {len(block_table)} blocks")
        views: list[memoryview] = []
        position = segment.token_start
        while position < segment.token_stop:
            index, first = divmod(position, layout.block_size)
            last = min(layout.block_size, segment.token_stop - index * layout.block_size)
            base = block_table[index] * layout.bytes_per_block
            if last - first == layout.block_size:
                views.append(
                    self._bytes[base + segment.layer_start * 2 * plane : base + segment.layer_stop * 2 * plane]
                )
            else:
                for row in range(2 * segment.layer_start, 2 * segment.layer_stop):
                    start = base + row * plane
                    views.append(self._bytes[start + first * layout.slot_bytes : start + last * layout.slot_bytes])
            position = index * layout.block_size + last
        return views
