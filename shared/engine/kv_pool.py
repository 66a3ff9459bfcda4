"""The paged KV pool: one tensor, block-major, so that a block is one contiguous range of bytes.

Who owns which block is decided elsewhere (shared/core); this file only holds the bytes. Block 0 is never
allocated: block tables are padded with it, and what is read from it is always masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shared.core.types import KvLayout, Segment
from shared.engine.device_bytes import DeviceBytes, copying
from shared.engine.host_memory import zero
from shared.errors import AmpdError, ErrorCode, KvTransferError
from shared.transport.flat_memory import FlatMemory, HostBytes
from shared.transport.ranges import ByteRange, find_ranges, slice_views
from shared.transport.region import Region, allocate_region

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KvPool:
    """`tensor` is [num_blocks, num_layers, 2 (key, value), block_size, num_kv_heads, head_dim] on `device`."""

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        device: str = "cpu",
        *,
        shared: bool = False,
        region: Region | None = None,
    ) -> None:
        """`shared`: peers on this host may map the pool to read it (CPU only). `region`: where it lies, if it is to lie
        in memory that there is already; it is zeroed."""
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
        num_bytes = num_blocks * layout.bytes_per_block
        dtype = TORCH_DTYPES[layout.dtype]
        self.region = region
        if region is None and device == "cpu":
            self.region = allocate_region(num_bytes, shared=shared)
        if self.region is not None:
            flat = zero(self.region, dtype)
        else:
            flat = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=device)
        self.tensor = flat.view(shape)
        self._bytes = flat.view(torch.uint8)
        self.flat: FlatMemory = HostBytes(self.region.data) if self.region is not None else DeviceBytes(self._bytes)

    @property
    def has_views(self) -> bool:
        """Whether segment_views works; otherwise bytes go through read_segment and write_segment."""
        return self.region is not None

    def segment_views(self, block_table: Sequence[int], segment: Segment) -> list[memoryview]:
        """Writable views of the segment's bytes, in the order Segment defines, as few ranges as possible. CPU only.

        Raises KvTransferError if the segment does not lie within the layout and `block_table`.
        """
        if self.region is None:
            raise KvTransferError(
                ErrorCode.INTERNAL, f"KV on {self.device} has no host views: use read_segment / write_segment"
            )
        return slice_views(self.region.data, self.byte_ranges(block_table, segment))

    def read_segment(self, block_table: Sequence[int], segment: Segment) -> memoryview:
        """A host copy of the segment's bytes, on any device (through pinned memory from CUDA)."""
        staging = self._staging(segment)
        offset = 0
        with copying(self._bytes.device):
            for start, stop in self.byte_ranges(block_table, segment):
                staging[offset : offset + stop - start].copy_(self._bytes[start:stop], non_blocking=True)
                offset += stop - start
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
        with copying(self._bytes.device):
            for start, stop in self.byte_ranges(block_table, segment):
                self._bytes[start:stop].copy_(staging[offset : offset + stop - start], non_blocking=True)
                offset += stop - start

    def _staging(self, segment: Segment) -> torch.Tensor:
        pinned = self.device.startswith("cuda")
        return torch.empty(segment.num_bytes(self.layout), dtype=torch.uint8, pin_memory=pinned)

    def byte_ranges(self, block_table: Sequence[int], segment: Segment) -> list[ByteRange]:
        """Byte ranges of the pool, in the order Segment defines. Raises KvTransferError as segment_views."""
        check_segment(self.layout, self.num_blocks, block_table, segment)
        return find_ranges(self.layout, block_table, segment)


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
