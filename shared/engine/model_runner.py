"""A model and its KV pool behind one synchronous call: `step(items)`.

    load the folder -> check that we can serve it -> pool -> forward pass (native or transformers) -> sampler

Nothing here schedules, allocates blocks or waits; the engine loop does, and calls `step` from one thread.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from shared.core.types import KvLayout
from shared.engine.attention import NativeAttention, PaddedAttention, SdpaAttention
from shared.engine.kv_pool import TORCH_DTYPES, KvPool
from shared.engine.model_fingerprint import fingerprint_model
from shared.engine.native import HEAD_DIM_MULTIPLE, NativeUnavailable, load_kernels
from shared.engine.native_decoder import NativeDecoder, explain_unsupported
from shared.engine.sampler import sample
from shared.engine.step import StepItem
from shared.engine.step_batch import StepBatch, build_step_batch
from shared.engine.transformers_decoder import ATTENTION_NAME, TransformersDecoder
from shared.errors import AmpdError, ErrorCode

__all__ = ["ModelRunner", "StepItem"]

log = logging.getLogger(__name__)
transformers_logging.disable_progress_bar()  # a bar per loaded shard does not belong into a service's log

ATTENTION_BACKENDS = ("auto", "sdpa", "padded", "native")


class Decoder(Protocol):
    name: str

    def forward(self, batch: StepBatch) -> torch.Tensor: ...


class ModelRunner:
    """Use `load`. Not thread-safe: one thread calls `step`, any thread may read the attributes."""

    def __init__(
        self, config: Any, decoder: Decoder, pool: KvPool, *, threads: int, eos_token_ids: frozenset[int]
    ) -> None:
        self.pool = pool
        self.layout: KvLayout = pool.layout
        self.dtype: str = pool.layout.dtype
        self.max_context_tokens = int(config.max_position_embeddings)
        self.vocab_size = int(config.vocab_size)
        self.eos_token_ids = eos_token_ids
        self.decoder_name = decoder.name
        self._decoder = decoder
        self._threads = threads
        self._step_thread: int | None = None

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
    ) -> ModelRunner:
        """Load the Hugging Face folder `model_dir` (config.json and *.safetensors) for serving. shared_pool: peers on
        this host may map its KV pool to read it.

        Raises AmpdError(INVALID_REQUEST) that says what to change: no such folder, an unsupported architecture,
        an unknown dtype, device or attention back end.
        """
        _check_options(dtype, device, threads, block_size, attention)
        config = read_model_config(model_dir)
        dtype = choose_dtype(device) if dtype == "auto" else dtype
        torch.set_num_threads(threads)
        model = load_model(model_dir, config, dtype, device)
        layout = KvLayout(
            model=fingerprint_model(model_dir),
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            block_size=block_size,
            dtype=dtype,
        )
        pool = KvPool(layout, num_blocks, device, shared=shared_pool)
        decoder = build_decoder(model, pool, attention, threads)
        log.info("%s: %s, %s on %s", model_dir.name, decoder.name, dtype, device)
        return cls(config, decoder, pool, threads=threads, eos_token_ids=_read_eos(model_dir, config))

    @torch.inference_mode()
    def step(self, items: Sequence[StepItem]) -> list[int | None]:
        """One forward pass over all items; for each the sampled token, or None where no sampling was asked for."""
        if self._step_thread != threading.get_ident():
            torch.set_num_threads(self._threads)  # OpenMP keeps this setting per thread
            self._step_thread = threading.get_ident()
        batch = build_step_batch(items, self.pool, self.max_context_tokens, self.vocab_size)
        logits = self._decoder.forward(batch)
        sampled = iter(sample(logits, batch.sampled_items) if batch.sampled_items else [])
        return [None if item.sampling is None else next(sampled) for item in items]


def read_model_config(model_dir: Path) -> Any:
    """The folder's config, or AmpdError(INVALID_REQUEST) that says why this folder cannot be served."""
    if not (model_dir / "config.json").is_file():
        raise _refusal(f"{model_dir} has no config.json: give the folder of a Hugging Face model")
    if not any(model_dir.glob("*.safetensors")):
        raise _refusal(f"{model_dir} has no *.safetensors: save the weights with safe_serialization=True")
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise _refusal(f"{model_dir}/config.json cannot be read: {error}") from error
    for field in ("num_hidden_layers", "num_key_value_heads", "num_attention_heads", "max_position_embeddings"):
        if getattr(config, field, None) is None:
            raise _refusal(f"{config.model_type!r} models have no {field}: only Llama-shaped decoders are supported")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if layer_types != {"full_attention"} or (window is not None and not hasattr(config, "layer_types")):
        raise _refusal(
            f"this {config.model_type!r} model uses sliding-window or other partial attention ({window=}, "
            f"layer_types={sorted(layer_types)}); only full attention is supported: set sliding_window to null in "
            "config.json if the context you serve stays within the window"
        )
    return config


def load_model(model_dir: Path, config: Any, dtype: str, device: str) -> Any:
    """The folder's transformers model with paged attention. Raises AmpdError if weights are missing or broken."""
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            model_dir,
            config=config,
            dtype=TORCH_DTYPES[dtype],
            attn_implementation=ATTENTION_NAME,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, ValueError) as error:
        raise _refusal(f"the model in {model_dir} cannot be loaded: {error}") from error
    if loading["missing_keys"]:
        # transformers would go on with random values in their place
        missing = sorted(loading["missing_keys"])
        raise _refusal(
            f"the *.safetensors of {model_dir} lack {len(missing)} tensors ({missing[0]}, ...): fetch it again"
        )
    return model.to(device).eval().requires_grad_(False)


def choose_dtype(device: str) -> str:
    """bfloat16 where the processor multiplies it in hardware, else float32."""
    if device.startswith("cuda"):
        return "bfloat16"
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"


def build_decoder(model: Any, pool: KvPool, attention: str, threads: int) -> Decoder:
    """The forward pass for the chosen attention back end. `auto` is the native one wherever it can be had."""
    if attention == "sdpa":
        return TransformersDecoder(model, pool, SdpaAttention())
    if attention == "padded":
        return TransformersDecoder(model, pool, PaddedAttention())
    try:
        kernels = _native_kernels(pool)
    except NativeUnavailable as reason:
        log.warning("no native attention: %s; using the padded back end", reason)
        return TransformersDecoder(model, pool, PaddedAttention())
    unsupported = explain_unsupported(model)
    if unsupported is not None:
        log.warning("native attention, but transformers' linear layers: %s", unsupported)
        return TransformersDecoder(model, pool, NativeAttention(kernels, threads))
    return NativeDecoder(kernels, model, pool, threads)


def _native_kernels(pool: KvPool) -> ctypes.CDLL:
    layout = pool.layout
    if pool.device != "cpu":
        raise NativeUnavailable(f"the kernels run on the CPU, not on {pool.device}")
    if layout.dtype not in {"float32", "bfloat16"}:
        raise NativeUnavailable(f"the kernels know float32 and bfloat16, not {layout.dtype}")
    if layout.head_dim % HEAD_DIM_MULTIPLE:
        raise NativeUnavailable(f"head_dim {layout.head_dim} is not a multiple of {HEAD_DIM_MULTIPLE}")
    return load_kernels()


def _read_eos(model_dir: Path, config: Any) -> frozenset[int]:
    """EOS ids of generation_config.json (what `generate` obeys), else of config.json."""
    eos = getattr(config, "eos_token_id", None)
    if (model_dir / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(model_dir, local_files_only=True)
        eos = generation.eos_token_id if generation.eos_token_id is not None else eos
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def _check_options(dtype: str, device: str, threads: int, block_size: int, attention: str) -> None:
    if dtype != "auto" and dtype not in TORCH_DTYPES:
        raise _refusal(f"dtype {dtype!r} is not one of auto, {', '.join(TORCH_DTYPES)}")
    if device != "cpu" and not device.startswith("cuda"):
        raise _refusal(f"device {device!r} is not one of cpu, cuda, cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise _refusal(f"device {device!r}: this machine (or this build of torch) has no CUDA; use cpu")
    if threads < 1 or block_size < 1:
        raise _refusal(f"threads ({threads}) and block_size ({block_size}) must be at least 1")
    if attention not in ATTENTION_BACKENDS:
        raise _refusal(f"attention {attention!r} is not one of {', '.join(ATTENTION_BACKENDS)}")


def _refusal(message: str) -> AmpdError:
    return AmpdError(ErrorCode.INVALID_REQUEST, message)
