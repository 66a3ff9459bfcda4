"""Which steps `ampd profile` measures: those that the fit needs, and others, held out, to judge it by."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from planner.fit_profile import StepShape
from shared.errors import AmpdError, ErrorCode

BLOCK_SIZE = 16
MIN_CONTEXT_TOKENS = 512
NUM_HELD_OUT, NUM_HELD_OUT_QUICK = 30, 9


@dataclass(frozen=True, slots=True)
class PointLimits:
    """What the pool and the model can hold."""

    num_kv_tokens: int
    max_context_tokens: int

    def admits(self, shape: StepShape) -> bool:
        lengths = [context + 1 for context in shape.contexts] + [history + chunk for history, chunk in shape.chunks]
        blocks = sum(-(-length // BLOCK_SIZE) for length in lengths)
        return blocks * BLOCK_SIZE <= self.num_kv_tokens and max(lengths) <= self.max_context_tokens


@dataclass(frozen=True, slots=True)
class _Axes:
    first_chunks: Sequence[int]  # at history 0
    split_chunks: Sequence[tuple[int, int]]  # (how many, of which size) in one step at history 0
    later_chunks: Sequence[int]  # at every history
    histories: Sequence[float]  # share of the longest context
    batches: Sequence[int]
    contexts: Sequence[float]  # decoding; whole numbers are tokens, the others a share of the longest context


FULL = _Axes(
    first_chunks=(1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048),
    split_chunks=((4, 16), (16, 16), (4, 64), (8, 64), (4, 128), (2, 256)),
    later_chunks=(1, 16, 64, 256, 512),
    histories=(0.125, 0.375, 0.9),
    batches=(1, 2, 4, 8, 12, 16, 24, 32, 48, 64),
    contexts=(16, 256, 1024, 0.375, 0.9),
)
QUICK = _Axes(
    first_chunks=(1, 4, 8, 16, 32, 64, 128, 256),
    split_chunks=((4, 16), (4, 64)),
    later_chunks=(16, 128),
    histories=(0.25, 0.9),
    batches=(1, 4, 8, 16, 32),
    contexts=(16, 512, 0.9),
)


def choose_training_shapes(limits: PointLimits, *, quick: bool) -> list[StepShape]:
    """Steps to fit, within the limits. Raises AmpdError INVALID_REQUEST where the limits leave no room for them."""
    _check_limits(limits)
    axes = QUICK if quick else FULL
    longest = limits.max_context_tokens
    shapes = [StepShape(chunks=((0, chunk),)) for chunk in axes.first_chunks]
    shapes += [StepShape(chunks=((0, chunk),) * count) for count, chunk in axes.split_chunks]
    shapes += [
        StepShape(chunks=((_round_to_block(share * longest), chunk),))
        for share in axes.histories
        for chunk in axes.later_chunks
    ]
    contexts = sorted({_round_to_block(c * longest) if isinstance(c, float) else c for c in axes.contexts})
    shapes += [StepShape(contexts=(context,) * batch) for batch in axes.batches for context in contexts]
    return [shape for shape in shapes if limits.admits(shape)]


def choose_held_out_shapes(limits: PointLimits, *, quick: bool, seed: int) -> list[StepShape]:
    """Random steps between the fitted ones, a third each of prefill, decode and mixed; batches of unequal contexts."""
    rng = random.Random(seed)
    axes = QUICK if quick else FULL
    largest_chunk = max(axes.later_chunks)
    shapes: list[StepShape] = []
    count = NUM_HELD_OUT_QUICK if quick else NUM_HELD_OUT
    for _ in range(100 * count):  # some draws do not fit into the pool
        if len(shapes) == count:
            break
        kind = len(shapes) % 3
        chunk = round(8 * (largest_chunk / 8) ** rng.random())
        history = rng.randrange(max(1, round(0.9 * limits.max_context_tokens) - chunk))
        batch = round(max(axes.batches) ** rng.random())
        mean = 16 * (0.6 * limits.max_context_tokens / 16) ** rng.random()
        contexts = tuple(max(1, round(mean * rng.uniform(0.5, 1.5))) for _ in range(batch))
        shape = StepShape(contexts if kind != 0 else (), ((history, chunk),) if kind != 1 else ())
        if limits.admits(shape):
            shapes.append(shape)
    return shapes


def _check_limits(limits: PointLimits) -> None:
    if limits.max_context_tokens < MIN_CONTEXT_TOKENS:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"a profile over {limits.max_context_tokens} tokens of context is too small to fit: "
            f"--max-context must be at least {MIN_CONTEXT_TOKENS}",
        )
    if limits.num_kv_tokens < limits.max_context_tokens:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"the pool holds {limits.num_kv_tokens} tokens of KV, less than one context of "
            f"{limits.max_context_tokens}: raise --kv-memory-mb or lower --max-context",
        )


def _round_to_block(tokens: float) -> int:
    return int(tokens) // BLOCK_SIZE * BLOCK_SIZE
