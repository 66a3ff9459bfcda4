"""Slack-sized chunks where a step's slack is too little for one that is worth its step.

A few prefill tokens may cost a decode step nearly what hundreds do: a mixture of experts reads all of its weights for
them. Prefills in such chunks take many times their work, and their queue collapses. So the slack of several steps is
saved up for one chunk of an efficient size. The batch gives no more of its time, and its objective is of a mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from shared.core.chunking import ChunkParameters, budget_prefill_tokens
from shared.core.decoding_rounds import DecodingRounds
from shared.core.step_costs import MIN_ADDED_S, StepCosts

WASTEFUL_SHARE = 0.65  # of the best rate: chunks at less are saved up for
EFFICIENT_SHARE = 0.9  # of the best rate: the chunk that is saved up for has it


@dataclass(frozen=True, slots=True)
class SavedChunk:
    """A chunk that steps save up for: what it adds to the step that it is in, and what every step saves."""

    num_tokens: int
    extra_s: float
    spare_s: float

    @property
    def num_steps(self) -> float:
        """From one chunk to the next; one at least."""
        return max(1.0, self.extra_s / self.spare_s)


def plan_saving(
    parameters: ChunkParameters, costs: StepCosts, beside: DecodingRounds, *, num_history: int, num_new: int
) -> SavedChunk | None:
    """What steps beside these decodes save up for, to compute `num_new` tokens; None where each has room for a chunk
    that is worth it. A step spares what a chunk of min_chunk_tokens takes, at least: a prefill always goes on."""
    if beside.batch == 0 or parameters.chunk != "slack":
        return None
    batch, mean_context = beside.batch, beside.mean_context
    least, most = parameters.min_chunk_tokens, parameters.max_prefill_tokens
    worth = costs.efficient_chunk(batch, WASTEFUL_SHARE, least, most)
    if worth <= least or num_new <= least:
        return None
    limit_s = parameters.itl_share * beside.itl_slo_s
    if costs.chunk_step_s(batch, mean_context, num_history, min(worth, num_new)) <= limit_s:
        return None
    decode_s = costs.decode_step_s(batch, mean_context)
    num_tokens = min(num_new, costs.efficient_chunk(batch, EFFICIENT_SHARE, least, most))
    least_s = costs.chunk_step_s(batch, mean_context, num_history, least) - decode_s
    extra_s = costs.chunk_step_s(batch, mean_context, num_history, num_tokens) - decode_s
    return SavedChunk(num_tokens, extra_s, max(MIN_ADDED_S, least_s, limit_s - decode_s))


class SlackSaver:
    """A worker's savings. Steps that had no prefill beside them have saved too, up to what one chunk takes."""

    def __init__(self) -> None:
        self._saved_s = float("inf")
        self._step = 0

    def choose_budget(
        self,
        parameters: ChunkParameters,
        costs: StepCosts | None,
        beside: DecodingRounds,
        *,
        step: int,
        num_history: int,
        num_waiting: int,
    ) -> tuple[int, int]:
        """(prefill tokens for the next step, 0 while it saves; so many steps until that changes, 0: it may at any).

        step: the number of the next one of those that decode. num_history: of the prefill that runs first. num_waiting:
        tokens of all prefills that wait for a step.
        """
        saving = None
        if costs is not None:
            saving = plan_saving(parameters, costs, beside, num_history=num_history, num_new=num_waiting)
        if saving is None:
            self._spend(step, 0.0 if beside.batch else float("inf"))
            return budget_prefill_tokens(parameters, costs, beside, num_history=num_history), 0
        saved_s = self._saved_s + (step - self._step) * saving.spare_s
        if saved_s > saving.extra_s + saving.spare_s:  # more than the step that made it enough has added
            saved_s = saving.extra_s
        missing_s = saving.extra_s - saved_s
        if missing_s <= 1e-9:
            self._spend(step, saved_s - saving.extra_s)
            return saving.num_tokens, 1
        self._spend(step, saved_s)
        return 0, ceil(missing_s / saving.spare_s)

    def _spend(self, step: int, saved_s: float) -> None:
        self._saved_s = saved_s
        self._step = step
