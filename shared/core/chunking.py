"""How many prefill tokens go into a step that also decodes.

`fixed` is chunked prefill (Sarathi-Serve, arXiv 2403.02310). `slack` is ours: as many as the running batch's ITL
objective leaves time for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shared.core.decoding_rounds import DecodingRounds
from shared.core.step_costs import StepCost, StepCosts

ChunkName = Literal["fixed", "slack"]
MAX_STAGED_PREFILLS = 16  # for other workers: off the queue, their history on its way or here; they fill the next step
QUANTUM = 16  # tokens: chunks are multiples of a KV block, so that few distinct step shapes arise


@dataclass(frozen=True, slots=True)
class ChunkParameters:
    chunk: ChunkName = "fixed"
    chunk_tokens: int = 512  # fixed: of a step that decodes too
    min_chunk_tokens: int = 64  # slack: a prefill always goes on, were it slowly
    max_prefill_tokens: int = 8_192  # of a step that decodes nothing, and the most that slack may choose
    itl_share: float = 0.9  # slack: of the ITL objective that a step may take; the rest is for what is not predicted
    calm_itl_share: float = 0.6  # in its place while no prefill hurries (pace.py)
    keeps_on_time: bool = False  # prefills share a step only while that makes none of them late
    limits_batch: bool = False  # no more rounds decode than their ITL objective allows


def budget_prefill_tokens(
    parameters: ChunkParameters, costs: StepCosts | None, beside: DecodingRounds, *, num_history: int
) -> int:
    """Prefill tokens for the next step beside these decodes.

    `num_history` is the history of the prefill that runs first. Without costs (nothing measured yet) slack is fixed.
    """
    if beside.batch == 0:
        return parameters.max_prefill_tokens
    if parameters.chunk == "fixed" or costs is None:
        return parameters.chunk_tokens
    limit_s = parameters.itl_share * beside.itl_slo_s
    fitting = costs.largest_chunk(beside.batch, beside.mean_context, num_history, limit_s)
    fitting -= fitting % QUANTUM
    return max(parameters.min_chunk_tokens, min(parameters.max_prefill_tokens, fitting))


def may_stage(
    parameters: ChunkParameters, num_staged: int, num_tokens: int, *, max_staged: int = MAX_STAGED_PREFILLS
) -> bool:
    """Whether one more remote prefill leaves the queue beside `num_staged` that miss `num_tokens`: as few as keep the
    next step full while a history is read."""
    return num_staged < 2 or (num_staged < max_staged and num_tokens < 2 * parameters.max_prefill_tokens)


def fit_chunks(
    parameters: ChunkParameters,
    costs: StepCosts | None,
    prefills: Sequence[tuple[int, int]],
    budget_tokens: int,
    beside: DecodingRounds,
    *,
    time_left_s: Sequence[float],
) -> list[int]:
    """Tokens for each of `prefills` (history, missing), in order, within `budget_tokens`. time_left_s: until the first
    token of each is due.

    With slack the step as a whole keeps to its share of the ITL objective, or to what a saved-up chunk of the first
    prefill alone would take: the attention of every further one takes time that the budget does not know of, so the
    last chunks give way.
    """
    chunks = split_budget([missing for _, missing in prefills], budget_tokens)
    if costs is None:
        return chunks
    if parameters.chunk == "slack" and beside.batch:
        limit_s = parameters.itl_share * beside.itl_slo_s
        if budget_tokens > parameters.min_chunk_tokens:  # saved up for, if it is beyond the limit (slack_saving.py)
            whole = min(budget_tokens, sum(chunks))
            limit_s = max(limit_s, costs.chunk_step_s(beside.batch, beside.mean_context, prefills[0][0], whole))
        _fit_slack(costs, prefills, chunks, beside, limit_s)
    if parameters.keeps_on_time and len(chunks) > 1:
        _keep_on_time(costs, prefills, chunks, beside, time_left_s)
    return chunks


def _fit_slack(
    costs: StepCosts,
    prefills: Sequence[tuple[int, int]],
    chunks: list[int],
    beside: DecodingRounds,
    limit_s: float,
) -> None:
    while len(chunks) > 1:
        parts = [(history, chunk) for (history, _), chunk in zip(prefills, chunks, strict=False)]
        if costs.step_s(beside.batch, beside.mean_context, parts) <= limit_s:
            break
        if chunks[-1] > 2 * QUANTUM:
            chunks[-1] //= 2
        else:
            chunks.pop()


def _keep_on_time(
    costs: StepCosts,
    prefills: Sequence[tuple[int, int]],
    chunks: list[int],
    beside: DecodingRounds,
    time_left_s: Sequence[float],
) -> None:
    """Cut the step before the first prefill whose company would make one before it late: every prefill of a step has
    its first token at the step's end. One that is late in a step that ends with it stops nobody, nor does one that the
    step does not complete."""
    latest_s = float("inf")
    step = StepCost(costs, beside.batch, beside.mean_context)
    for place, chunk in enumerate(chunks):
        history, missing = prefills[place]
        ends_s = step.add(history, chunk)
        if ends_s > latest_s:
            del chunks[place:]
            return
        if chunk == missing and ends_s <= time_left_s[place] < latest_s:
            latest_s = time_left_s[place]


def split_budget(missing: Sequence[int], budget_tokens: int) -> list[int]:
    """Tokens for each prefill, in order, until the budget is used: the last may get a part."""
    chunks: list[int] = []
    for num_tokens in missing:
        if budget_tokens <= 0:
            break
        chunk = min(num_tokens, budget_tokens)
        chunks.append(chunk)
        budget_tokens -= chunk
    return chunks
