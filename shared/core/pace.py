"""Shorter steps while no prefill hurries.

A round that joins a batch waits for the step that runs: its first gap is up to two steps long. Where steps fill the ITL
objective that makes rounds of few tokens late, for the sake of prefills that may have had seconds to spare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import inf

from shared.core.chunk_prediction import predict_stretch
from shared.core.chunking import ChunkParameters
from shared.core.decoding_rounds import DecodingRounds
from shared.core.reordering import WaitingPrefill
from shared.core.slack_saving import plan_saving
from shared.core.step_costs import StepCosts

CALM_TIME_SHARE = 0.35  # of the time that is left until a first token is due, for all prefills of the queue
NUM_PACES = 4  # slower than the full one


def choose_pace(
    parameters: ChunkParameters,
    costs: StepCosts | None,
    beside: DecodingRounds,
    waiting: Sequence[WaitingPrefill],
    now: float,
    *,
    num_history: int,
    num_waiting: int,
) -> ChunkParameters:
    """The parameters for the next step beside these decodes: of paces from calm_itl_share to itl_share the slowest
    at which all that waits is computed in a part of the time that the first of them has left; none at which chunks are
    saved up for that make a step longer than it may be.

    waiting: those not staged yet as well. num_history: of the prefill that runs first. num_waiting: tokens of all that
    wait for a step, as in SlackSaver.choose_budget.
    """
    if costs is None or beside.batch == 0 or parameters.chunk != "slack" or not waiting:
        return parameters
    if any(prefill.ttft_deadline == inf for prefill in waiting):  # it has not said that it may wait
        return parameters
    left_s = CALM_TIME_SHARE * (min(prefill.ttft_deadline for prefill in waiting) - now)
    work_s = sum(prefill.work_s for prefill in waiting)

    def is_fast_enough(pace: ChunkParameters) -> bool:
        return work_s * predict_stretch(pace, costs, beside) <= left_s

    if work_s > left_s or not is_fast_enough(parameters):
        return parameters
    most_s = parameters.itl_share * beside.itl_slo_s - costs.decode_step_s(beside.batch, beside.mean_context)
    for pace in _paces(parameters):
        if not is_fast_enough(pace):
            continue
        saving = plan_saving(pace, costs, beside, num_history=num_history, num_new=num_waiting)
        if saving is None or saving.extra_s <= most_s:
            return pace
    return parameters


@lru_cache(maxsize=64)
def _paces(parameters: ChunkParameters) -> tuple[ChunkParameters, ...]:
    """The slowest first; none where the calm share is no smaller."""
    low, high = parameters.calm_itl_share, parameters.itl_share
    if low >= high:
        return ()
    return tuple(replace(parameters, itl_share=low + (high - low) * step / NUM_PACES) for step in range(NUM_PACES))
