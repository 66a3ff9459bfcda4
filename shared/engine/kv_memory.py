"""How many KV blocks fit into a given amount of memory."""

from __future__ import annotations

from pathlib import Path

from shared.core.types import DTYPE_BYTES
from shared.engine.model_loading import choose_dtype, read_model_config


def blocks_in_memory(model_dir: Path, *, dtype: str, device: str, block_size: int, kv_memory_bytes: int) -> int:
    """Blocks of `block_size` tokens of this model's KV, all layers, in kv_memory_bytes."""
    config = read_model_config(model_dir)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = (
        2
        * int(config.num_hidden_layers)
        * int(config.num_key_value_heads)
        * int(head_dim)
        * DTYPE_BYTES[choose_dtype(device) if dtype == "auto" else dtype]
    )
    return int(kv_memory_bytes) // (bytes_per_token * block_size)
