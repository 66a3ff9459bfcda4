"""Flat bytes of a torch tensor, wherever it is: what the nixl lane reads from and copies into on a device.

Not run on a GPU yet. On the CPU it does the same, which is how it is tested.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from shared.transport.flat_memory import SAMPLE_BYTES, FlatMemory, Indices, Kind


class DeviceBytes:
    """See FlatMemory. `flat`: uint8, one dimension. On CUDA its work is on a stream beside that of the forward pass."""

    def __init__(self, flat: torch.Tensor) -> None:
        self.flat = flat
        self.kind: Kind = "VRAM" if flat.is_cuda else "DRAM"
        self.device_index = flat.device.index or 0

    @property
    def address(self) -> int:
        return self.flat.data_ptr()

    @property
    def num_bytes(self) -> int:
        return self.flat.numel()

    def gather(self, indices: Indices) -> bytes:
        return _gather(self.flat, indices)

    def gather_words(self, indices: Indices) -> bytes:
        whole = self.flat.numel() // SAMPLE_BYTES * SAMPLE_BYTES
        return _gather(self.flat[:whole].view(torch.int32), indices)

    def copy_from(self, source: FlatMemory, pieces: Sequence[tuple[int, int, int]]) -> None:
        assert isinstance(source, DeviceBytes)
        with copying(self.flat.device):
            for here, there, num_bytes in pieces:
                self.flat[here : here + num_bytes].copy_(source.flat[there : there + num_bytes], non_blocking=True)

    def allocate(self, num_bytes: int) -> DeviceBytes:
        return DeviceBytes(torch.zeros(num_bytes, dtype=torch.uint8, device=self.flat.device))


def _gather(elements: torch.Tensor, indices: Indices) -> bytes:
    with copying(elements.device):
        gathered = elements[torch.from_numpy(indices).to(elements.device)].cpu()
    return gathered.numpy().tobytes()


@contextlib.contextmanager
def copying(device: torch.device) -> Iterator[None]:
    """On CUDA a stream of its own: the forward pass is not waited for, since what is read has been announced, and what
    is written nobody computes with yet. All is done at the end."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
