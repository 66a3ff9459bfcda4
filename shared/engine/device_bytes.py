"""Flat bytes of a torch tensor, wherever it is: what the nixl lane reads from and copies into on a device.

Not run on a GPU yet. On the CPU it does the same, which is how it is tested.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from shared.transport.flat_memory import FlatMemory, Indices, Kind


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
        with copying(self.flat.device):
            sampled = self.flat[torch.from_numpy(indices).to(self.flat.device)].cpu()
        return sampled.numpy().tobytes()

    def copy_from(self, source: FlatMemory, pieces: Sequence[tuple[int, int, int]]) -> None:
        assert isinstance(source, DeviceBytes)
        with copying(self.flat.device):
            for here, there, num_bytes in pieces:
                self.flat[here : here + num_bytes].copy_(source.flat[there : there + num_bytes], non_blocking=True)

    def allocate(self, num_bytes: int) -> DeviceBytes:
        return DeviceBytes(torch.zeros(num_bytes, dtype=torch.uint8, device=self.flat.device))


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
