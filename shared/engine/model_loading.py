"""A Hugging Face folder: can we serve it, what does its KV look like, its weights as a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from shared.core.types import KvLayout
from shared.engine.kv_pool import TORCH_DTYPES
from shared.engine.model_fingerprint import fingerprint_model
from shared.engine.transformers_decoder import ATTENTION_NAME
from shared.errors import AmpdError, ErrorCode

transformers_logging.disable_progress_bar()  # a bar per loaded shard does not belong into a service's log


def read_model_config(model_dir: Path) -> Any:
    """The folder's config, or AmpdError(INVALID_REQUEST) that says why this folder cannot be served."""
    if not (model_dir / "config.json").is_file():
        raise refusal(f"{model_dir} has no config.json: give the folder of a Hugging Face model")
    if not any(model_dir.glob("*.safetensors")):
        raise refusal(f"{model_dir} has no *.safetensors: save the weights with safe_serialization=True")
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise refusal(f"{model_dir}/config.json cannot be read: {error}") from error
    for field in ("num_hidden_layers", "num_key_value_heads", "num_attention_heads", "max_position_embeddings"):
        if getattr(config, field, None) is None:
            raise refusal(f"{config.model_type!r} models have no {field}: only Llama-shaped decoders are supported")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if layer_types != {"full_attention"} or (window is not None and not hasattr(config, "layer_types")):
        raise refusal(
            f"this {config.model_type!r} model uses sliding-window or other partial attention ({window=}, "
            f"layer_types={sorted(layer_types)}); only full attention is supported: set sliding_window to null in "
            "config.json if the context you serve stays within the window"
        )
    return config


def describe_layout(model_dir: Path, config: Any, dtype: str, block_size: int) -> KvLayout:
    return KvLayout(
        model=fingerprint_model(model_dir),
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        block_size=block_size,
        dtype=dtype,
    )


def load_model(model_dir: Path, config: Any, dtype: str, device: str, *, parallel_degree: int = 1) -> Any:
    """The folder's transformers model with paged attention. Raises AmpdError if weights are missing or broken.

    parallel_degree: of the torch.distributed group this process is in; above 1 only this rank's shard is loaded.
    """
    distributed = DistributedConfig(tp_size=parallel_degree, tp_plan="auto") if parallel_degree > 1 else None
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            model_dir,
            config=config,
            dtype=TORCH_DTYPES[dtype],
            attn_implementation=ATTENTION_NAME,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            distributed_config=distributed,
        )
    except (SafetensorError, OSError, ValueError) as error:
        raise refusal(f"the model in {model_dir} cannot be loaded: {error}") from error
    if loading["missing_keys"]:
        # transformers would go on with random values in their place
        missing = sorted(loading["missing_keys"])
        raise refusal(
            f"the *.safetensors of {model_dir} lack {len(missing)} tensors ({missing[0]}, ...): fetch it again"
        )
    return model.to(device).eval().requires_grad_(False)


def choose_dtype(device: str) -> str:
    """bfloat16 where the processor multiplies it in hardware, else float32."""
    if device.startswith("cuda"):
        return "bfloat16"
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"


def read_context_limits(config: Any) -> tuple[int, int]:
    """(the longest context in tokens, the size of the vocabulary)."""
    return int(config.max_position_embeddings), int(config.vocab_size)


def read_eos(model_dir: Path, config: Any) -> frozenset[int]:
    """EOS ids of generation_config.json (what `generate` obeys), else of config.json."""
    eos = getattr(config, "eos_token_id", None)
    if (model_dir / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(model_dir, local_files_only=True)
        eos = generation.eos_token_id if generation.eos_token_id is not None else eos
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def refusal(message: str) -> AmpdError:
    return AmpdError(ErrorCode.INVALID_REQUEST, message)
