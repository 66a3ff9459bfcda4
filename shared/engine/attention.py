"""Attention over the paged pool: interchangeable back ends behind one method.

The new tokens' KV is already in the pool when `attend` is called, so a back end only reads: for the query at
position p of a sequence, the keys at positions [0, p]. All of them give the same result up to rounding.
"""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch
import torch.nn.functional as F

from shared.engine.kv_pool import KvPool
from shared.engine.step_batch import StepBatch


class AttentionBackend(Protocol):
    name: str

    def attend(self, layer: int, queries: torch.Tensor, pool: KvPool, batch: StepBatch, scaling: float) -> torch.Tensor:
        """Attention output [N, query heads, head_dim] of `queries` [N, query heads, head_dim] in the pool's dtype."""


def write_kv(layer: int, keys: torch.Tensor, values: torch.Tensor, pool: KvPool, batch: StepBatch) -> None:
    """Put the step's new `keys` and `values`, [N, kv heads, head_dim] each, into the pool."""
    plane = pool.tensor[:, layer]
    plane[batch.write_blocks, 0, batch.write_slots] = keys.to(plane.dtype)
    plane[batch.write_blocks, 1, batch.write_slots] = values.to(plane.dtype)


class SdpaAttention:
    """One scaled_dot_product_attention a sequence, over keys and values gathered from its blocks: the reference."""

    name = "sdpa"

    def attend(self, layer: int, queries: torch.Tensor, pool: KvPool, batch: StepBatch, scaling: float) -> torch.Tensor:
        output = torch.empty_like(queries)
        for index in range(len(batch.items)):
            attend_one(index, layer, queries, output, pool, batch, scaling)
        return output


class PaddedAttention:
    """Sequences that decode one token are gathered into one padded batch; the others go one by one."""

    name = "padded"

    def attend(self, layer: int, queries: torch.Tensor, pool: KvPool, batch: StepBatch, scaling: float) -> torch.Tensor:
        output = torch.empty_like(queries)
        decoding = []
        for index in range(len(batch.items)):
            if batch.query_starts[index + 1] - batch.query_starts[index] == 1:
                decoding.append(index)
            else:
                attend_one(index, layer, queries, output, pool, batch, scaling)
        if decoding:
            rows = [batch.query_starts[index] for index in decoding]
            output[rows] = _attend_padded(decoding, layer, queries[rows], pool, batch, scaling)
        return output


class NativeAttention:
    """The C++ kernel: reads the blocks where they lie, prefill and decode in one call. CPU, float32 and bfloat16."""

    name = "native"

    def __init__(self, kernels: ctypes.CDLL, threads: int) -> None:
        self.kernels = kernels
        self._threads = threads

    def attend(self, layer: int, queries: torch.Tensor, pool: KvPool, batch: StepBatch, scaling: float) -> torch.Tensor:
        wide = queries.float().flatten(1)
        output = torch.empty_like(wide)
        self.attend_into(layer, wide, output, pool, batch, scaling)
        return output.view(queries.shape).to(queries.dtype)

    def attend_into(
        self,
        layer: int,
        queries: torch.Tensor,
        output: torch.Tensor,
        pool: KvPool,
        batch: StepBatch,
        scaling: float,
    ) -> None:
        """`queries` and `output` are float32 [N, query heads * head_dim]; rows may be strided."""
        keys = pool.tensor[:, layer]
        layout = pool.layout
        self.kernels.ampd_attention(
            queries.data_ptr(),
            queries.stride(0),
            output.data_ptr(),
            output.stride(0),
            keys.data_ptr(),
            int(keys.dtype is torch.bfloat16),
            keys.stride(0),
            keys.stride(1),
            batch.block_tables.data_ptr(),
            batch.block_tables.stride(0),
            batch.query_starts_tensor.data_ptr(),
            batch.context_lengths_tensor.data_ptr(),
            len(batch.items),
            queries.shape[1] // layout.head_dim,
            layout.num_kv_heads,
            layout.head_dim,
            layout.block_size,
            scaling,
            self._threads,
        )


def attend_one(
    index: int,
    layer: int,
    queries: torch.Tensor,
    output: torch.Tensor,
    pool: KvPool,
    batch: StepBatch,
    scaling: float,
) -> None:
    """Fill the rows of `output` that belong to item `index`."""
    rows = slice(batch.query_starts[index], batch.query_starts[index + 1])
    context = batch.context_lengths[index]
    blocks = batch.block_tables[index, : -(-context // pool.layout.block_size)]
    gathered = pool.tensor[blocks, layer]  # [blocks, 2, block_size, kv heads, head_dim]
    keys = gathered[:, 0].flatten(0, 1)[:context].transpose(0, 1)
    values = gathered[:, 1].flatten(0, 1)[:context].transpose(0, 1)
    item_queries = queries[rows].transpose(0, 1)
    num_new = item_queries.shape[1]
    mask = None
    if 1 < num_new < context:
        mask = torch.ones(num_new, context, dtype=torch.bool, device=queries.device).tril(context - num_new)
    result = F.scaled_dot_product_attention(
        item_queries[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=num_new == context and num_new > 1,
        scale=scaling,
        enable_gqa=item_queries.shape[0] != keys.shape[0],
    )
    output[rows] = result[0].transpose(0, 1)


def _attend_padded(
    indices: list[int], layer: int, queries: torch.Tensor, pool: KvPool, batch: StepBatch, scaling: float
) -> torch.Tensor:
    """Single-token queries [B, query heads, head_dim] of the items `indices`, as one padded batch."""
    num_kv_heads, block_size = pool.layout.num_kv_heads, pool.layout.block_size
    contexts = torch.tensor([batch.context_lengths[index] for index in indices], device=queries.device)
    tables = batch.block_tables[indices, : -(-int(contexts.max()) // block_size)]
    gathered = pool.tensor[tables, layer]  # [B, blocks, 2, block_size, kv heads, head_dim]: a copy
    written = torch.arange(tables.shape[1] * block_size, device=queries.device) < contexts[:, None]
    # A masked key has weight 0, but 0 x NaN is NaN: slots that nobody wrote yet must not be multiplied.
    gathered.masked_fill_(~written.view(len(indices), -1, 1, block_size, 1, 1), 0)
    keys = gathered[:, :, 0].flatten(1, 2).transpose(1, 2)
    values = gathered[:, :, 1].flatten(1, 2).transpose(1, 2)
    # The query heads that share a KV head stand where query positions would: no copy of the keys per head.
    grouped = queries.view(len(indices), num_kv_heads, -1, pool.layout.head_dim)
    result = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=written[:, None, None, :], scale=scaling)
    return result.flatten(1, 2)
