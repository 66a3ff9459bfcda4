"""Which forward pass serves a model: the native one, or transformers' with one of three attention back ends."""

from __future__ import annotations

import ctypes
import logging
from typing import Any, Protocol

import torch

from shared.engine.attention import AttentionBackend, NativeAttention, PaddedAttention, SdpaAttention
from shared.engine.kv_pool import KvPool
from shared.engine.native import HEAD_DIM_MULTIPLE, NativeUnavailable, load_kernels
from shared.engine.native_decoder import NativeDecoder, explain_unsupported
from shared.engine.step_batch import StepBatch
from shared.engine.transformers_decoder import TransformersDecoder

log = logging.getLogger(__name__)

ATTENTION_BACKENDS = ("auto", "sdpa", "padded", "native")


class Decoder(Protocol):
    @property
    def name(self) -> str: ...
    def forward(self, batch: StepBatch) -> torch.Tensor: ...


def build_decoder(model: Any, pool: KvPool, attention: str, threads: int) -> Decoder:
    """The forward pass for the chosen attention back end. `auto` is the native one wherever it can be had."""
    backend = _choose_backend(pool, attention, threads)
    if not isinstance(backend, NativeAttention):
        return TransformersDecoder(model, pool, backend)
    unsupported = explain_unsupported(model)
    if unsupported is not None:
        log.warning("native attention, but transformers' linear layers: %s", unsupported)
        return TransformersDecoder(model, pool, backend)
    return NativeDecoder(backend.kernels, model, pool, threads)


def build_shard_decoder(model: Any, pool: KvPool, attention: str, threads: int) -> TransformersDecoder:
    """One tensor-parallel rank's forward pass: transformers' layers, which sum over the ranks, and our attention."""
    return TransformersDecoder(model, pool, _choose_backend(pool, attention, threads), is_shard=True)


def _choose_backend(pool: KvPool, attention: str, threads: int) -> AttentionBackend:
    if attention == "sdpa":
        return SdpaAttention()
    if attention == "padded":
        return PaddedAttention()
    try:
        return NativeAttention(_native_kernels(pool), threads)
    except NativeUnavailable as reason:
        log.warning("no native attention: %s; using the padded back end", reason)
        return PaddedAttention()


def _native_kernels(pool: KvPool) -> ctypes.CDLL:
    layout = pool.layout
    if pool.device != "cpu":
        raise NativeUnavailable(f"the kernels run on the CPU, not on {pool.device}")
    if layout.dtype not in {"float32", "bfloat16"}:
        raise NativeUnavailable(f"the kernels know float32 and bfloat16, not {layout.dtype}")
    if layout.head_dim % HEAD_DIM_MULTIPLE:
        raise NativeUnavailable(f"head_dim {layout.head_dim} is not a multiple of {HEAD_DIM_MULTIPLE}")
    return load_kernels()
