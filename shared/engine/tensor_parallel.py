"""What every rank of a tensor-parallel worker does alike: join the group, hold its heads, run its share of a layer.

transformers splits the weights by its plan for the architecture (query, key, value and the first feed-forward layers
by output, the second ones by input); torch.distributed sums over the ranks. A rank's attention sees its own heads only.
"""

from __future__ import annotations

import dataclasses
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed

from shared.core.types import KvLayout
from shared.engine.decoders import build_shard_decoder
from shared.engine.kv_pool import KvPool
from shared.engine.model_loading import load_model, read_model_config, refusal
from shared.engine.transformers_decoder import TransformersDecoder
from shared.transport.region import Region

LOOPBACK = "lo"


class RankSpec(msgspec.Struct, frozen=True):
    """All that a rank has to know. layout and num_blocks: of the whole worker's KV pool."""

    rank: int
    parallel_degree: int
    model_dir: str
    layout: KvLayout
    num_blocks: int
    attention: str
    threads: int
    timeout_s: float  # how long a rank waits for the others within one collective operation
    store_path: str = ""  # a file by which the ranks find each other

    @property
    def shard_layout(self) -> KvLayout:
        return dataclasses.replace(self.layout, num_kv_heads=self.layout.num_kv_heads // self.parallel_degree)

    @property
    def shard_bytes(self) -> int:
        return self.num_blocks * self.shard_layout.bytes_per_block


def check_divisible(config: Any, parallel_degree: int, device: str) -> None:
    """Raise AmpdError INVALID_REQUEST if the model cannot be split over so many ranks on `device`."""
    if parallel_degree < 1:
        raise refusal(f"--parallel-degree must be at least 1, not {parallel_degree}")
    if device != "cpu" or torch.accelerator.is_available():
        raise refusal(
            f"--parallel-degree {parallel_degree} runs on the CPU of a machine without an accelerator so far: "
            "use --parallel-degree 1, or --device cpu with CUDA_VISIBLE_DEVICES= (empty)"
        )
    heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
    if heads % parallel_degree or kv_heads % parallel_degree:
        fitting = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and heads % n == 0]
        raise refusal(
            f"{heads} query heads and {kv_heads} KV heads cannot be split over {parallel_degree} ranks: "
            f"choose --parallel-degree from {', '.join(map(str, fitting))}"
        )
    plan = getattr(config, "base_model_tp_plan", None) or {}
    if any(plan.get(f"layers.*.self_attn.{name}_proj") != "colwise" for name in "qkv"):
        raise refusal(
            f"transformers has no plan that splits the heads of {config.model_type!r} models: use --parallel-degree 1"
        )


def join_group(spec: RankSpec) -> None:
    """Make torch's default process group of all ranks; returns once all of them have joined.

    Raises RuntimeError (torch.distributed's errors are such) if they do not within spec.timeout_s.
    """
    # gloo listens where the host's name resolves to, which other hosts may reach, unless it is told an interface
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{spec.store_path}",
        rank=spec.rank,
        world_size=spec.parallel_degree,
        timeout=timedelta(seconds=spec.timeout_s),
    )


def load_shard(spec: RankSpec, region: Region) -> TransformersDecoder:
    """This rank's weights, and its pool in `region`. All ranks must have joined."""
    model_dir = Path(spec.model_dir)
    model = load_model(
        model_dir, read_model_config(model_dir), spec.layout.dtype, "cpu", parallel_degree=spec.parallel_degree
    )
    pool = KvPool(spec.shard_layout, spec.num_blocks, region=region)
    return build_shard_decoder(model, pool, spec.attention, spec.threads)
