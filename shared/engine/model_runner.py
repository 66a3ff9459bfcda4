"""A model and its KV pool behind one synchronous call: `step(items)`.

    load the folder -> check that we can serve it -> pool -> forward pass (native or transformers) -> sampler

Nothing here schedules, allocates blocks or waits; the engine loop does, and calls `step` from one thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shared.core.types import KvLayout
from shared.engine.decoders import ATTENTION_BACKENDS, Decoder, build_decoder
from shared.engine.kv_pool import TORCH_DTYPES, KvPool, check_num_blocks
from shared.engine.layer_events import LayerEvents
from shared.engine.model_loading import (
    choose_dtype,
    describe_layout,
    load_model,
    read_context_limits,
    read_eos,
    read_model_config,
    refusal,
)
from shared.engine.rank_group import RankGroup
from shared.engine.sampler import sample
from shared.engine.sharded_pool import ShardedKvPool
from shared.engine.step import StepItem
from shared.engine.step_batch import build_step_batch
from shared.engine.tensor_parallel import RankSpec, check_divisible

__all__ = ["ModelRunner", "StepItem"]

log = logging.getLogger(__name__)


class ModelRunner:
    """Use `load`. Not thread-safe: one thread calls `step`, any thread may read the attributes."""

    def __init__(
        self,
        config: Any,
        decoder: Decoder,
        pool: KvPool | ShardedKvPool,
        *,
        threads: int,
        eos_token_ids: frozenset[int],
        ranks: RankGroup | None = None,
        events: LayerEvents | None = None,
    ) -> None:
        """`events`: of a device that computes behind the program's back; None: what a layer's call left is done."""
        self.pool = pool
        self.layout: KvLayout = pool.layout
        self.dtype: str = pool.layout.dtype
        self.max_context_tokens, self.vocab_size = read_context_limits(config)
        self.eos_token_ids = eos_token_ids
        self.decoder_name = decoder.name
        self._decoder = decoder
        self._threads = threads
        self._step_thread: int | None = None
        self._ranks = ranks
        self._events = events

    @classmethod
    def load(
        cls,
        model_dir: Path,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        threads: int = 1,
        num_blocks: int,
        block_size: int = 16,
        attention: str = "auto",
        shared_pool: bool = False,
        parallel_degree: int = 1,
        rank_timeout_s: float = 60.0,
    ) -> ModelRunner:
        """Load the Hugging Face folder `model_dir` (config.json and *.safetensors) for serving. shared_pool: peers on
        this host may map its KV pool to read it.

        parallel_degree: processes that hold the model together (tensor parallelism); this one starts the others, and
        must be told to `close`. rank_timeout_s: how long they wait for each other within one operation.
        Raises AmpdError(INVALID_REQUEST) that says what to change: no such folder, an unsupported architecture,
        an unknown dtype, device or attention back end, heads that cannot be split; RankFailed (a process ended).
        """
        _check_options(dtype, device, threads, block_size, attention)
        config = read_model_config(model_dir)
        dtype = choose_dtype(device) if dtype == "auto" else dtype
        torch.set_num_threads(threads)
        layout = describe_layout(model_dir, config, dtype, block_size)
        check_num_blocks(num_blocks)
        ranks: RankGroup | None = None
        pool: KvPool | ShardedKvPool
        if parallel_degree == 1:
            pool = KvPool(layout, num_blocks, device, shared=shared_pool)
            decoder = build_decoder(load_model(model_dir, config, dtype, device), pool, attention, threads)
        else:
            check_divisible(config, parallel_degree, device)
            decoder = ranks = RankGroup.start(
                RankSpec(
                    rank=0,
                    parallel_degree=parallel_degree,
                    model_dir=str(model_dir),
                    layout=layout,
                    num_blocks=num_blocks,
                    attention=attention,
                    threads=threads,
                    timeout_s=rank_timeout_s,
                )
            )
            pool = ranks.pool
        log.info("%s: %s, %s on %s", model_dir.name, decoder.name, dtype, device)
        return cls(
            config,
            decoder,
            pool,
            threads=threads,
            eos_token_ids=read_eos(model_dir, config),
            ranks=ranks,
            events=LayerEvents(torch.cuda.current_stream(device).record_event) if device.startswith("cuda") else None,
        )

    @torch.inference_mode()
    def step(self, items: Sequence[StepItem]) -> list[int | None]:
        """One forward pass over all items; for each the sampled token, or None where no sampling was asked for."""
        if self._step_thread != threading.get_ident():
            torch.set_num_threads(self._threads)  # OpenMP keeps this setting per thread
            self._step_thread = threading.get_ident()
        events = self._events
        if events is not None:
            items = [_announce_behind(events, item) for item in items]
        batch = build_step_batch(items, self.pool, self.max_context_tokens, self.vocab_size)
        logits = self._decoder.forward(batch)
        sampled = iter(sample(logits, batch.sampled_items) if batch.sampled_items else [])
        if events is not None:  # all KV is in the pool when a step returns, whether or not it has sampled
            events.announce(lambda: None)
            events.wait()
        return [None if item.sampling is None else next(sampled) for item in items]

    async def watch(self) -> None:
        """Raise RankFailed when a process of this worker's has ended; wait for ever where there are no others."""
        await (asyncio.Event().wait() if self._ranks is None else self._ranks.watch())

    def close(self) -> None:
        """End the other processes and the thread, if there are any; no step may be running."""
        if self._ranks is not None:
            self._ranks.close()
        if self._events is not None:
            self._events.close()


def _announce_behind(events: LayerEvents, item: StepItem) -> StepItem:
    on_layer = item.on_layer
    if on_layer is None:
        return item
    return replace(item, on_layer=lambda layer: events.announce(partial(on_layer, layer)))


def _check_options(dtype: str, device: str, threads: int, block_size: int, attention: str) -> None:
    if dtype != "auto" and dtype not in TORCH_DTYPES:
        raise refusal(f"dtype {dtype!r} is not one of auto, {', '.join(TORCH_DTYPES)}")
    if device != "cpu" and not device.startswith("cuda"):
        raise refusal(f"device {device!r} is not one of cpu, cuda, cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise refusal(f"device {device!r}: this machine (or this build of torch) has no CUDA; use cpu")
    if threads < 1 or block_size < 1:
        raise refusal(f"threads ({threads}) and block_size ({block_size}) must be at least 1")
    if attention not in ATTENTION_BACKENDS:
        raise refusal(f"attention {attention!r} is not one of {', '.join(ATTENTION_BACKENDS)}")
