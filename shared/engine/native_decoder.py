"""The forward pass of a Llama-shaped model in our own C++ kernels: nine calls a layer.

    normed = rms_norm(residual); qkv = W normed; rotate, store KV; attended = attention; residual += W attended
    normed = rms_norm(residual); gate, up = W normed; gate = silu(gate) * up;            residual += W gate

Weights and KV have the runner's dtype; everything between is float32. Every row of every kernel is computed in an
order of operations that does not depend on the other rows, so a token's KV and logits are bit-identical whether it
came in one prefill, in chunks, in a decode step or in any batch, and with any number of threads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from shared.engine.attention import NativeAttention
from shared.engine.kv_pool import KvPool
from shared.engine.linear import PackedLinear, round_up
from shared.engine.step_batch import StepBatch

# Exactly these classes: another with the same modules may scale or order them in its own way.
SUPPORTED_MODELS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
# Rotary embeddings whose angles depend on the position alone; others change with the length of the sequence.
STATIC_ROPE_TYPES = {"default", "linear", "llama3", "yarn"}


def explain_unsupported(model: Any) -> str | None:
    """Why `model` cannot run in the native kernels, or None if it can."""
    config = model.config
    if type(model).__name__ not in SUPPORTED_MODELS:
        return f"{type(model).__name__} is not one of {', '.join(sorted(SUPPORTED_MODELS))}"
    if config.hidden_act not in {"silu", "swish"}:
        return f"its activation is {config.hidden_act}, not silu"
    rope = model.model.rotary_emb.rope_type
    return None if rope in STATIC_ROPE_TYPES else f"its rotary embedding is {rope}"


@dataclass(frozen=True, slots=True)
class Layer:
    input_norm: torch.Tensor
    qkv: PackedLinear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    attention_out: PackedLinear
    mlp_norm: torch.Tensor
    gate_up: PackedLinear
    mlp_out: PackedLinear


class Workspace:
    """float32 buffers, kept from step to step; as many rows as the largest step so far had.

    What is in them is valid until the next step: fresh memory for every step would cost page faults.
    """

    def __init__(self, *widths: int) -> None:
        self._widths = widths
        self._buffers: list[torch.Tensor] = []

    def rows(self, num_tokens: int) -> list[torch.Tensor]:
        """One [num_tokens, width] tensor for each width."""
        if not self._buffers or self._buffers[0].shape[0] < num_tokens:
            self._buffers = [torch.zeros(num_tokens, width) for width in self._widths]
        return [buffer[:num_tokens] for buffer in self._buffers]


class NativeDecoder:
    """Takes the weights out of `model` (see PackedLinear): the model cannot be used afterwards."""

    name = "native"

    def __init__(self, kernels: ctypes.CDLL, model: Any, pool: KvPool, threads: int) -> None:
        config = model.config
        self._kernels = kernels
        self._pool = pool
        self._threads = threads
        self._attention = NativeAttention(kernels, threads)
        self._rotary = model.model.rotary_emb
        self._hidden_size = int(config.hidden_size)
        self._vocab_size = int(config.vocab_size)
        self._epsilon = float(config.rms_norm_eps)
        self._num_heads = int(config.num_attention_heads)
        self._scaling = float(model.model.layers[0].self_attn.scaling)
        self._final_norm = _float_weight(model.model.norm)
        self._lm_head = PackedLinear(kernels, [model.lm_head], threads)
        self._embeddings = model.model.embed_tokens.weight.detach()
        self._layers = [self._take_layer(module) for module in model.model.layers]
        layer = self._layers[0]
        hidden = round_up(self._hidden_size)
        self._activations = Workspace(
            hidden, hidden, layer.qkv.outputs, layer.attention_out.inputs, layer.gate_up.outputs
        )
        self._outputs = Workspace(hidden, self._lm_head.outputs)

    def _take_layer(self, module: Any) -> Layer:
        attention, mlp = module.self_attn, module.mlp

        def pack(*parts: torch.nn.Linear) -> PackedLinear:
            return PackedLinear(self._kernels, parts, self._threads)

        return Layer(
            input_norm=_float_weight(module.input_layernorm),
            qkv=pack(attention.q_proj, attention.k_proj, attention.v_proj),
            query_norm=_float_weight(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=_float_weight(attention.k_norm) if hasattr(attention, "k_norm") else None,
            attention_out=pack(attention.o_proj),
            mlp_norm=_float_weight(module.post_attention_layernorm),
            gate_up=pack(mlp.gate_proj, mlp.up_proj),
            mlp_out=pack(mlp.down_proj),
        )

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Logits [sampled items, vocabulary] in float32; the step's KV is in the pool afterwards."""
        residual, normed, qkv, attended, gate_up = self._activations.rows(batch.num_tokens)
        residual[:, : self._hidden_size] = self._embeddings[batch.token_ids]
        cosines, sines = self._rotary(residual, batch.positions[None])
        query_width = self._num_heads * self._pool.layout.head_dim
        up_offset = gate_up.shape[1] // 2
        for index, layer in enumerate(self._layers):
            self._normalize(residual, layer.input_norm, normed)
            layer.qkv.apply(normed, qkv)
            self._rope_and_store(index, layer, qkv, cosines, sines, batch)
            batch.announce_layer(index)
            queries = qkv[:, :query_width]
            self._attention.attend_into(index, queries, attended, self._pool, batch, self._scaling)
            layer.attention_out.apply(attended, residual, accumulate=True)
            self._normalize(residual, layer.mlp_norm, normed)
            layer.gate_up.apply(normed, gate_up)
            self._kernels.ampd_silu_and_multiply(
                gate_up.data_ptr(), gate_up.stride(0), batch.num_tokens, up_offset, self._threads
            )
            layer.mlp_out.apply(gate_up, residual, accumulate=True)
        return self._logits(residual[batch.sampled_rows])

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        normed, logits = self._outputs.rows(rows.shape[0])
        if rows.shape[0] > 0:
            self._normalize(rows, self._final_norm, normed)
            self._lm_head.apply(normed, logits)
        return logits[:, : self._vocab_size]

    def _normalize(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        self._kernels.ampd_rms_norm(
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            self._hidden_size,
            weight.data_ptr(),
            self._epsilon,
            out.data_ptr(),
            out.stride(0),
            self._threads,
        )

    def _rope_and_store(
        self,
        index: int,
        layer: Layer,
        qkv: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        batch: StepBatch,
    ) -> None:
        """Queries and keys are normalised and rotated where they stand; keys and values go to the pool."""
        pool = self._pool
        keys = pool.tensor[:, index]
        self._kernels.ampd_rope_and_store(
            qkv.data_ptr(),
            qkv.stride(0),
            batch.num_tokens,
            self._num_heads,
            pool.layout.num_kv_heads,
            pool.layout.head_dim,
            cosines.data_ptr(),
            sines.data_ptr(),
            None if layer.query_norm is None else layer.query_norm.data_ptr(),
            None if layer.key_norm is None else layer.key_norm.data_ptr(),
            self._epsilon,
            keys.data_ptr(),
            int(pool.tensor.dtype is torch.bfloat16),
            keys.stride(0),
            keys.stride(1),
            batch.write_blocks.data_ptr(),
            batch.write_slots.data_ptr(),
            self._threads,
        )


def _float_weight(norm: Any) -> torch.Tensor:
    weight: torch.Tensor = norm.weight.detach().float().clone()
    return weight
