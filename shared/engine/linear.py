"""Linear layers with packed weights: what a decode step spends most of its time in.

Several layers that read the same input (query, key and value; gate and up) become one, by packing their panels one
behind the other. Activations are float32 with float32 and with bfloat16 weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from shared.engine.host_memory import allocate_zeros
from shared.engine.native import PANEL


def round_up(size: int) -> int:
    """`size` outputs take up whole panels."""
    return -(-size // PANEL) * PANEL


class PackedLinear:
    """out = x W^T + bias, the outputs of each part starting at a multiple of 16 columns."""

    def __init__(self, kernels: ctypes.CDLL, parts: Sequence[torch.nn.Linear], threads: int) -> None:
        """Takes the weights out of `parts`, which would otherwise keep the model in memory twice."""
        self._kernels = kernels
        self._threads = threads
        self.inputs = parts[0].in_features
        self.outputs = sum(round_up(part.out_features) for part in parts)
        dtype = parts[0].weight.dtype
        self._is_bf16 = int(dtype is torch.bfloat16)
        self._packed = allocate_zeros(self.outputs * self.inputs, dtype)
        has_bias = any(part.bias is not None for part in parts)
        self._bias = torch.zeros(self.outputs) if has_bias else None
        start = 0
        for part in parts:
            weight = part.weight.detach().contiguous()
            target = self._packed[start * self.inputs :]
            kernels.ampd_pack(
                weight.data_ptr(), part.out_features, self.inputs, target.data_ptr(), self._is_bf16, threads
            )
            if part.bias is not None and self._bias is not None:
                self._bias[start : start + part.out_features] = part.bias.detach().float()
            part.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
            start += round_up(part.out_features)

    def apply(self, x: torch.Tensor, out: torch.Tensor, *, accumulate: bool = False) -> torch.Tensor:
        """Fill (or, with `accumulate`, add to) `out` [N, outputs] from `x` [N, >= inputs]; both float32."""
        self._kernels.ampd_linear(
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            self._packed.data_ptr(),
            self._is_bf16,
            None if self._bias is None else self._bias.data_ptr(),
            self.inputs,
            self.outputs,
            out.data_ptr(),
            out.stride(0),
            int(accumulate),
            self._threads,
        )
        return out
