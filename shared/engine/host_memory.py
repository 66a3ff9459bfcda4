"""Large host tensors in huge pages.

The pool and the weights are read at random and in full every step; in 4 KB pages most of those reads miss the
processor's table of pages, which in a virtual machine costs up to 24 memory accesses each.
"""

from __future__ import annotations

import mmap
import os

import torch

from shared.transport.region import Region, allocate_region


def allocate_zeros(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor of zeros whose pages are all touched, so that no page fault is left for the first request."""
    return zero(allocate_region(num_elements * dtype.itemsize, shared=False), dtype)


def zero(region: Region, dtype: torch.dtype) -> torch.Tensor:
    """All of the region as a flat tensor, which keeps its memory alive."""
    return torch.frombuffer(region.data, dtype=torch.uint8).view(dtype).zero_()


def create_common_memory(name: str, num_bytes: int) -> int:
    """The descriptor of memory that processes given it all map to write; gone when the last of them is.

    `name` is what /proc shows. Raises OSError.
    """
    descriptor = os.memfd_create(name)
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def map_common_memory(descriptor: int, num_bytes: int) -> Region:
    """The memory of create_common_memory in this process. The descriptor stays the caller's."""
    return Region(memoryview(mmap.mmap(descriptor, num_bytes)))
