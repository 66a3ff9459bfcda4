"""One engine, loaded to be measured, and the seconds that its steps take."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.fit_profile import StepShape
from planner.profile_points import BLOCK_SIZE
from shared.core.types import DTYPE_BYTES
from shared.engine.step import StepItem
from shared.errors import AmpdError, ErrorCode
from shared.messages import SamplingParams

if TYPE_CHECKING:
    from shared.engine.model_runner import ModelRunner

GREEDY = SamplingParams()
FILL_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    name: str
    model: str
    model_dir: Path
    dtype: str = "float32"
    threads: int = 1
    kv_memory_mb: int = 1024
    host_kv_mb: int = 0
    max_context: int
    quick: bool = False
    repeats: int = 5
    time_limit_s: float = 600.0
    seed: int = 0
    workers: int = 1  # on this machine: the others are busy meanwhile (see busy_neighbours)


class StepMeter:
    """Runs one step of a shape over random blocks of the runner's pool, which it fills once; returns seconds.

    `alone`, with one thread, they are the seconds it ran, without those it waited while other processes had its core;
    beside other workers that wait is part of what a step takes.
    """

    def __init__(self, runner: ModelRunner, threads: int, rng: random.Random, *, alone: bool = True) -> None:
        counts_running = alone and threads == 1
        self.clock_name = "thread CPU time" if counts_running else "wall"
        self.wall_s = self.running_s = 0.0
        self._clock = time.thread_time if counts_running else time.perf_counter
        self._runner = runner
        self._rng = rng
        self._blocks = list(range(1, runner.pool.num_blocks))
        fill_pool(runner, seed=rng.randrange(1 << 32))

    def __call__(self, shape: StepShape) -> float:
        """Blocks of a sequence lie scattered, as they do in a pool that has been in use."""
        self._rng.shuffle(self._blocks)
        free = iter(self._blocks)
        items = [self._build_item(context, 1, free) for context in shape.contexts]
        items += [self._build_item(history, chunk, free) for history, chunk in shape.chunks]
        wall, running = time.perf_counter(), self._clock()
        self._runner.step(items)
        elapsed_s = self._clock() - running
        self.wall_s += time.perf_counter() - wall
        self.running_s += elapsed_s
        return elapsed_s

    def _build_item(self, history: int, num_new: int, free: Any) -> StepItem:
        tokens = self._rng.choices(range(self._runner.vocab_size), k=num_new)
        table = [next(free) for _ in range(-(-(history + num_new) // BLOCK_SIZE))]
        return StepItem(tokens, history, table, GREEDY)


def fill_pool(runner: ModelRunner, seed: int) -> None:
    """Random KV in every block, the values of a real model's size: zeros may be faster than a real history."""
    values = np.random.default_rng(seed).standard_normal(FILL_BYTES // 4, dtype=np.float32)
    width = DTYPE_BYTES[runner.dtype]
    # the upper half of a float32 is the same number in bfloat16, and some number of about that size in float16
    data = np.frombuffer(
        (values if width == 4 else (values.view(np.uint32) >> 16).astype(np.uint16)).tobytes(), np.uint8
    )
    layout = runner.layout
    for block in range(1, runner.pool.num_blocks):
        target = _view_block(runner, block)
        offset = (block * layout.bytes_per_block) % max(1, data.size - layout.bytes_per_block)
        target[:] = np.resize(data[offset : offset + layout.bytes_per_block], layout.bytes_per_block)


def _view_block(runner: ModelRunner, block: int) -> Any:
    from shared.core.types import Segment

    segment = Segment(0, runner.layout.num_layers, 0, runner.layout.block_size)
    [view] = runner.pool.segment_views([block], segment)
    return np.frombuffer(view, np.uint8)


def read_longest_context(model_dir: Path) -> int:
    """Tokens that the model was made for."""
    from shared.engine.model_loading import read_model_config

    return int(read_model_config(model_dir).max_position_embeddings)


def load_runner(options: ProfileOptions) -> ModelRunner:
    # torch takes seconds to import, and lives in shared.engine alone
    from shared.engine.kv_memory import blocks_in_memory
    from shared.engine.model_runner import ModelRunner

    longest = read_longest_context(options.model_dir)
    if options.max_context > longest:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"--max-context {options.max_context} is longer than the {longest} tokens {options.model} was made for",
        )
    num_blocks = blocks_in_memory(
        options.model_dir,
        dtype=options.dtype,
        device="cpu",
        block_size=BLOCK_SIZE,
        kv_memory_bytes=options.kv_memory_mb * 1_000_000,
    )
    return ModelRunner.load(
        options.model_dir, dtype=options.dtype, threads=options.threads, num_blocks=num_blocks, block_size=BLOCK_SIZE
    )
