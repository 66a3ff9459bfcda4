"""The memory of a KV pool on the host: private, or a sealed memory file that peers on this host can map to read.

A shared region is a memfd whose size is sealed, so that no peer can make another fault by cutting it, and which nobody
but its owner can map to write (F_SEAL_FUTURE_WRITE, Linux 5.1).
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref

from shared.errors import ErrorCode, KvTransferError

HUGE_PAGE_BYTES = 2 << 20
# for the environment of a worker's process: copies from 256 KiB on leave the cache out. What is copied is not read
# soon, and with regular stores the target would be read from memory first (docs/decisions/0014-kv-lanes.md)
COPY_TUNABLE = "glibc.cpu.x86_non_temporal_threshold=0x40000"
_F_SEAL_FUTURE_WRITE = 0x0010  # the standard library has no name for it yet
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


class Region:
    """`data`: writable bytes, page-aligned. `descriptor`: the memory file, -1 if it is private; closed with this."""

    def __init__(self, data: memoryview, descriptor: int = -1) -> None:
        self.data = data
        self.descriptor = descriptor
        if descriptor >= 0:
            weakref.finalize(self, os.close, descriptor)

    @property
    def is_shared(self) -> bool:
        return self.descriptor >= 0

    @property
    def address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.data))


def allocate_region(num_bytes: int, *, shared: bool) -> Region:
    """Zeros, not touched yet. Huge pages are a request to the kernel, which may not grant it; a shared region gets them
    only where /sys/kernel/mm/transparent_hugepage/shmem_enabled says so."""
    if shared:
        descriptor = os.memfd_create("ampd-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, num_bytes)
            memory = mmap.mmap(descriptor, num_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(descriptor)
            raise
        _ask_for_huge_pages(memory, num_bytes)
        return Region(memoryview(memory), descriptor)
    if num_bytes < HUGE_PAGE_BYTES:
        return Region(memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)))
    # one page more, so that the data can start where a huge page starts
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _ask_for_huge_pages(memory, num_bytes)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE_BYTES
    return Region(memoryview(memory)[start : start + num_bytes])


def can_share() -> bool:
    """Whether this kernel has memory files that are sealed as they have to be."""
    try:
        allocate_region(mmap.PAGESIZE, shared=True)
    except OSError:
        return False
    return True


def _ask_for_huge_pages(memory: mmap.mmap, num_bytes: int) -> None:
    if num_bytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)


def map_to_read(descriptor: int, num_bytes: int) -> memoryview:
    """A peer's region, read-only. The descriptor stays the caller's. Raises KvTransferError if it is not as it has to
    be: then reading it could end this process."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        size = os.fstat(descriptor).st_size
    except OSError as error:
        raise KvTransferError(ErrorCode.KV_TRANSFER_FAILED, f"the peer's pool is no memory file: {error}") from error
    if size != num_bytes or seals & fcntl.F_SEAL_SHRINK == 0:
        raise KvTransferError(
            ErrorCode.KV_TRANSFER_FAILED,
            f"the peer's pool has {size} bytes, it told of {num_bytes}, and its seals are {seals:#x}",
        )
    try:
        return memoryview(mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ))
    except (OSError, ValueError) as error:  # no address space left; an empty file
        raise KvTransferError(ErrorCode.KV_TRANSFER_FAILED, f"the peer's pool cannot be mapped: {error}") from error
