"""The paged KV pool: one tensor, block-major, so that a block is one contiguous range of bytes.

Who owns which block is decided elsewhere (shared/core); this file only holds the bytes. Block 0 is never
allocated: block tables are padded with it, and what is read from it is always masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from shared.core.types import DTYPE_BYTES, KvLayout, Segment
from shared.engine.host_memory import allocate_zeros
from shared.errors import AmpdError, ErrorCode, KvTransferError

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KvPool:
    """`tensor` is [num_blocks, num_layers, 2 (key, value), block_size, num_kv_heads, head_dim] on `device`."""

    def __init__(
        self, layout: KvLayout, num_blocks: int, device: str = "cpu", *, memory: torch.Tensor | None = None
    ) -> None:
        """memory: where the pool lies, zeroed, one dimension of the layout's dtype; None: allocate it on `device`."""
        check_num_blocks(num_blocks)
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        shape = (
            num_blocks,
            layout.num_layers,
            2,
            layout.block_size,
            layout.num_kv_heads,
            layout.head_dim,
        )
        num_elements = num_blocks * layout.bytes_per_block // DTYPE_BYTES[layout.dtype]
        dtype = TORCH_DTYPES[layout.dtype]
        if memory is not None:
            flat = memory
        elif device == "cpu":
            flat = allocate_zeros(num_elements, dtype)
        else:
            flat = torch.zeros(num_elements, dtype=dtype, device=device)
        self.tensor = flat.view(shape)
        self._bytes = flat.view(torch.uint8)
        self._host_view = _view_bytes(self._bytes) if device == "cpu" else None

    @property
    def has_views(self) -> bool:
        """Whether segment_views works; otherwise bytes go through read_segment and write_segment."""
        return self._host_view is not None

    def segment_views(self, block_table: Sequence[int], segment: Segment) -> list[memoryview]:
        """Writable views of the segment's bytes, in the order Segment defines, as few ranges as possible. CPU only.

        Raises KvTransferError if the segment does not lie within the layout and `block_table`.
        """
        if self._host_view is None:
            raise KvTransferError(
                ErrorCode.INTERNAL, f"KV on {self.device} has no host views: use read_segment / write_segment"
            )
        view = self._host_view
        return [view[start:stop] for start, stop in self._byte_ranges(block_table, segment)]

    def read_segment(self, block_table: Sequence[int], segment: Segment) -> memoryview:
        """A host copy of the segment's bytes, on any device (through pinned memory from CUDA)."""
        staging = self._staging(segment)
        offset = 0
        for start, stop in self._byte_ranges(block_table, segment):
            staging[offset : offset + stop - start].copy_(self._bytes[start:stop], non_blocking=True)
            offset += stop - start
        self._finish_copies()
        return _view_bytes(staging)

    def write_segment(self, block_table: Sequence[int], segment: Segment, data: bytes | bytearray | memoryview) -> None:
        """The inverse of read_segment; returns when the bytes are in the pool.

        Raises KvTransferError if `data` is not exactly the segment's number of bytes.
        """
        source = memoryview(data).cast("B")
        staging = self._staging(segment)
        if source.nbytes != staging.numel():
            raise KvTransferError(
                ErrorCode.KV_TRANSFER_FAILED,
                f"the segment has {staging.numel()} bytes, but {source.nbytes} were given",
            )
        _view_bytes(staging)[:] = source
        offset = 0
        for start, stop in self._byte_ranges(block_table, segment):
            self._bytes[start:stop].copy_(staging[offset : offset + stop - start], non_blocking=True)
            offset += stop - start
        self._finish_copies()

    def _staging(self, segment: Segment) -> torch.Tensor:
        pinned = self.device.startswith("cuda")
        return torch.empty(segment.num_bytes(self.layout), dtype=torch.uint8, pin_memory=pinned)

    def _finish_copies(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.current_stream(torch.device(self.device)).synchronize()

    def _byte_ranges(self, block_table: Sequence[int], segment: Segment) -> list[tuple[int, int]]:
        """Byte ranges of the pool in canonical order; a range that starts where the last one stops is joined to it."""
        check_segment(self.layout, self.num_blocks, block_table, segment)
        ranges: list[tuple[int, int]] = []
        for start, stop in self._walk(block_table, segment):
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            else:
                ranges.append((start, stop))
        return ranges

    def _walk(self, block_table: Sequence[int], segment: Segment) -> Iterator[tuple[int, int]]:
        layout = self.layout
        plane_bytes = layout.block_size * layout.slot_bytes  # the keys, or the values, of one block in one layer
        layer_bytes = 2 * plane_bytes
        position = segment.token_start
        while position < segment.token_stop:
            first_slot = position % layout.block_size
            block_start = position - first_slot
            stop_slot = min(layout.block_size, segment.token_stop - block_start)
            base = block_table[block_start // layout.block_size] * layout.bytes_per_block
            if stop_slot - first_slot == layout.block_size:
                yield base + segment.layer_start * layer_bytes, base + segment.layer_stop * layer_bytes
            else:
                for plane in range(2 * segment.layer_start, 2 * segment.layer_stop):
                    start = base + plane * plane_bytes
                    yield start + first_slot * layout.slot_bytes, start + stop_slot * layout.slot_bytes
            position = block_start + stop_slot


def check_num_blocks(num_blocks: int) -> None:
    if num_blocks < 2:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"a KV pool needs at least 2 blocks (block 0 is padding), not {num_blocks}",
        )


def check_segment(layout: KvLayout, num_blocks: int, block_table: Sequence[int], segment: Segment) -> None:
    """Raise KvTransferError if the segment does not lie within the layout, `block_table` and the pool's blocks."""
    capacity = len(block_table) * layout.block_size
    if not 0 <= segment.layer_start < segment.layer_stop <= layout.num_layers:
        raise KvTransferError(
            ErrorCode.KV_TRANSFER_FAILED,
            f"layers [{segment.layer_start}, {segment.layer_stop}) are not within [0, {layout.num_layers})",
        )
    if not 0 <= segment.token_start < segment.token_stop <= capacity:
        raise KvTransferError(
            ErrorCode.KV_TRANSFER_FAILED,
            f"tokens [{segment.token_start}, {segment.token_stop}) are not within the {len(block_table)} blocks "
            f"({capacity} tokens) of the block table",
        )
    used = block_table[segment.token_start // layout.block_size : -(-segment.token_stop // layout.block_size)]
    if min(used) < 1 or max(used) >= num_blocks:
        raise KvTransferError(
            ErrorCode.KV_TRANSFER_FAILED,
            f"the block table names blocks outside [1, {num_blocks})",
        )


def _view_bytes(host_tensor: torch.Tensor) -> memoryview:
    """A writable view of a host tensor of bytes."""
    array: Any = host_tensor.numpy()  # numpy's own types do not say that an array is a buffer
    return memoryview(array)
