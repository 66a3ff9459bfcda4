"""How long prefills take in chunks beside decodes."""

from __future__ import annotations

from shared.core.chunking import ChunkParameters
from shared.core.decoding_rounds import DecodingRounds
from shared.core.slack_saving import plan_saving
from shared.core.step_costs import StepCosts


def predict_stretch(parameters: ChunkParameters, costs: StepCosts, beside: DecodingRounds) -> float:
    """How much longer a queue of prefills takes in steps beside these decodes than its work alone (see `work_s`): the
    time of a full step, and of those that save up for it, over the work of the tokens that fill it."""
    batch, mean_context = beside.batch, beside.mean_context
    if batch == 0:
        return 1.0
    num_tokens = parameters.chunk_tokens
    saved_s = 0.0
    if parameters.chunk == "slack":
        saving = plan_saving(parameters, costs, beside, num_history=0, num_new=parameters.max_prefill_tokens)
        if saving is not None:
            num_tokens = saving.num_tokens
            saved_s = (saving.num_steps - 1.0) * costs.decode_step_s(batch, mean_context)
        else:
            num_tokens = costs.count_fitting_tokens(batch, mean_context, parameters.itl_share * beside.itl_slo_s)
            num_tokens = max(parameters.min_chunk_tokens, min(parameters.max_prefill_tokens, num_tokens))
    step_s = costs.chunk_step_s(batch, mean_context, 0, num_tokens)
    return max(1.0, (step_s + saved_s) / costs.work_s(0, num_tokens))


def predict_mixed_s(
    parameters: ChunkParameters, costs: StepCosts, beside: DecodingRounds, *, num_history: int, num_new: int
) -> float:
    """Seconds until `num_new` tokens are computed beside these decodes, with nobody before them."""
    batch, mean_context = beside.batch, beside.mean_context
    if parameters.chunk == "fixed":
        num_steps = -(-num_new // parameters.chunk_tokens)
        history, chunk = num_history + num_new // 2, num_new // num_steps
        return num_steps * costs.chunk_step_s(batch, mean_context, history, chunk)
    limit_s = parameters.itl_share * beside.itl_slo_s
    if num_new <= parameters.max_prefill_tokens:
        whole_s = costs.chunk_step_s(batch, mean_context, num_history, num_new)
        if whole_s <= limit_s:  # one step: most rounds of agents are so short
            return whole_s
    saving = plan_saving(parameters, costs, beside, num_history=num_history + num_new // 2, num_new=num_new)
    if saving is not None:
        decode_s = costs.decode_step_s(batch, mean_context)
        return num_new / saving.num_tokens * (saving.extra_s + saving.num_steps * decode_s)
    return costs.sliced_prefill_s(
        batch,
        mean_context,
        num_history,
        num_new,
        limit_s,
        min_chunk=parameters.min_chunk_tokens,
        max_chunk=parameters.max_prefill_tokens,
    )
