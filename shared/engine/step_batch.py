"""What one forward pass is about: the caller's items, flattened into one row of tokens with its paging metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shared.engine.kv_pool import KvPool
from shared.engine.sharded_pool import ShardedKvPool
from shared.engine.step import StepItem


@dataclass(frozen=True, slots=True)
class StepBatch:
    """N tokens of B sequences. Item b owns the tokens [query_starts[b], query_starts[b + 1])."""

    items: Sequence[StepItem]
    token_ids: torch.Tensor  # [N] int64
    positions: torch.Tensor  # [N] int64
    write_blocks: torch.Tensor  # [N] int64: where each token's KV goes
    write_slots: torch.Tensor  # [N] int64
    query_starts: list[int]  # B + 1
    context_lengths: list[int]  # B: tokens each sequence has after this step
    query_starts_tensor: torch.Tensor  # the same two as int64 tensors, for kernels
    context_lengths_tensor: torch.Tensor
    block_tables: torch.Tensor  # [B, max blocks] int64, padded with block 0
    sampled_rows: torch.Tensor  # [number of sampled items] int64: the last token of each of them

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    @property
    def sampled_items(self) -> list[StepItem]:
        return [item for item in self.items if item.sampling is not None]

    def announce_layer(self, layer: int) -> None:
        """Tell whoever waits for this layer's KV that it is in the pool."""
        for item in self.items:
            if item.on_layer is not None:
                item.on_layer(layer)


def build_step_batch(
    items: Sequence[StepItem], pool: KvPool | ShardedKvPool, max_context_tokens: int, vocab_size: int
) -> StepBatch:
    """Flatten `items`. Raises ValueError where an item does not fit its own block table: the scheduler has a bug."""
    if not items:
        raise ValueError("a step needs at least one item")
    block_size = pool.layout.block_size
    lengths = [len(item.token_ids) for item in items]
    context_lengths = [item.start_position + length for item, length in zip(items, lengths, strict=True)]
    used_blocks = [-(-length // block_size) for length in context_lengths]
    tables = np.zeros((len(items), max(used_blocks)), dtype=np.int64)
    tokens = np.empty(sum(lengths), dtype=np.int64)
    positions = np.empty_like(tokens)
    rows = np.empty_like(tokens)
    query_starts = [0]
    for index, item in enumerate(items):
        start, stop = query_starts[-1], query_starts[-1] + lengths[index]
        _check_item(item, lengths[index], used_blocks[index], context_lengths[index], max_context_tokens)
        tables[index, : used_blocks[index]] = item.block_table[: used_blocks[index]]
        if tables[index, : used_blocks[index]].min() < 1:
            raise ValueError("block 0 is padding and belongs to no sequence")
        tokens[start:stop] = item.token_ids
        positions[start:stop] = np.arange(item.start_position, context_lengths[index])
        rows[start:stop] = index
        query_starts.append(stop)
    if tables.max() >= pool.num_blocks:
        raise ValueError(f"block {int(tables.max())} is not in the pool of {pool.num_blocks} blocks")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"a token id is outside the vocabulary of {vocab_size}")
    sampled = [query_starts[i + 1] - 1 for i, item in enumerate(items) if item.sampling is not None]

    def place(values: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(values).to(pool.device)

    return StepBatch(
        items=items,
        token_ids=place(tokens),
        positions=place(positions),
        write_blocks=place(tables[rows, positions // block_size]),
        write_slots=place(positions % block_size),
        query_starts=query_starts,
        context_lengths=context_lengths,
        query_starts_tensor=place(np.array(query_starts, dtype=np.int64)),
        context_lengths_tensor=place(np.array(context_lengths, dtype=np.int64)),
        block_tables=place(tables),
        sampled_rows=place(np.array(sampled, dtype=np.int64)),
    )


def _check_item(item: StepItem, length: int, used_blocks: int, context: int, max_context_tokens: int) -> None:
    if length < 1 or item.start_position < 0:
        raise ValueError("a step item needs at least one new token and a position >= 0")
    if context > max_context_tokens:
        raise ValueError(f"{context} tokens exceed the model's context of {max_context_tokens}")
    if len(item.block_table) < used_blocks:
        raise ValueError(f"{context} tokens need {used_blocks} blocks; the block table has {len(item.block_table)}")
