"""Large host tensors in huge pages.

The pool and the weights are read at random and in full every step; in 4 KB pages most of those reads miss the
processor's table of pages, which in a virtual machine costs up to 24 memory accesses each.
"""

from __future__ import annotations

import mmap
import os

import torch

HUGE_PAGE_BYTES = 2 << 20


def allocate_zeros(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor of zeros whose pages are all touched, so that no page fault is left for the first request.

    Huge pages are a request to the kernel, which may not grant it; small tensors do not ask.
    """
    num_bytes = num_elements * dtype.itemsize
    if num_bytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_elements, dtype=dtype).zero_()
    # One page more, so that the tensor can start where a huge page starts.
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory` alive
    start = -whole.data_ptr() % HUGE_PAGE_BYTES
    return whole[start : start + num_bytes].view(dtype).zero_()


def create_shared_memory(name: str, num_bytes: int) -> int:
    """The descriptor of anonymous memory that processes given it map as one; gone when the last of them is.

    `name` is what /proc shows. Raises OSError.
    """
    descriptor = os.memfd_create(name)
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def map_shared_zeros(descriptor: int, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor over memory of create_shared_memory, its pages touched; for use before anything is written."""
    memory = mmap.mmap(descriptor, num_elements * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).zero_()  # keeps `memory` alive
