"""One sequence's part of a forward pass. No torch here: engines that only keep time use it too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared.messages import SamplingParams


@dataclass(frozen=True, slots=True)
class StepItem:
    """`token_ids` are the n >= 1 tokens to feed; KV of [0, start_position) is in the pool already.

    block_table covers start_position + n tokens. sampling None: no logits are wanted (a chunk that is not the last).
    output_index is the index of the output token to sample: the draw depends on (sampling.seed, output_index) alone.
    on_layer(layer) is called once the layer's new KV is in the pool, in layer order: in the forward thread, or, where a
    device computes behind its back, in one that waits for the device. All have been made when the step returns.
    """

    token_ids: Sequence[int]
    start_position: int
    block_table: Sequence[int]
    sampling: SamplingParams | None
    output_index: int = 0
    on_layer: Callable[[int], None] | None = None
