"""The forward pass through the untouched transformers model, with only its attention replaced by a paged one.

Every Llama-, Qwen- or Mistral-shaped architecture works this way, on the CPU and on CUDA, and it is the reference
for the native decoder. transformers hands unknown keyword arguments down to the attention function, which is how
the step's paging metadata gets there; for an attention name without a mask function it makes no mask, so the
back ends see to causality themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from shared.engine.attention import AttentionBackend, write_kv
from shared.engine.kv_pool import KvPool
from shared.engine.step_batch import StepBatch

ATTENTION_NAME = "ampd_paged"


class TransformersDecoder:
    """`forward(batch)` gives the logits of the sampled rows. It owns nothing but the references it was given.

    is_shard: the model and the pool hold one tensor-parallel rank's heads; every rank runs the same batch.
    """

    def __init__(self, model: Any, pool: KvPool, backend: AttentionBackend, *, is_shard: bool = False) -> None:
        self.model = model
        self.pool = pool
        self.backend = backend
        self.name = f"transformers+{backend.name}"
        self._is_shard = is_shard

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Logits [sampled items, vocabulary] in float32; the step's KV is in the pool afterwards."""
        output = self.model(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=batch.sampled_rows,
            paged=self,
            paged_batch=batch,
        )
        if self._is_shard:
            batch.announce_layer(self.pool.layout.num_layers - 1)
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def report_written(self, layer: int, batch: StepBatch) -> None:
        """The layer's KV is in this pool: announce what is in the pools of all ranks.

        Behind attention each layer sums over the ranks, and a rank adds its part after it has written its KV. So once
        this rank is past a layer, all have its KV in their pools: one layer late is soon enough, and needs no barrier.
        """
        if not self._is_shard:
            batch.announce_layer(layer)
        elif layer > 0:
            batch.announce_layer(layer - 1)


def attend_paged(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    paged: TransformersDecoder,
    paged_batch: StepBatch,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function transformers calls in every layer: query [1, heads, N, head_dim], key and value alike."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # an attribute of every transformers attention module
    write_kv(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), paged.pool, paged_batch)
    paged.report_written(layer, paged_batch)
    queries = query[0].transpose(0, 1).contiguous()
    output = paged.backend.attend(layer, queries, paged.pool, paged_batch, scaling)
    return output[None], None


AttentionInterface.register(ATTENTION_NAME, attend_paged)
