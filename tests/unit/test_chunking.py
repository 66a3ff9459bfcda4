"""How many prefill tokens a step takes: a fixed number, or what the batch's objective leaves time for."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core.chunk_prediction import predict_stretch
from shared.core.chunking import (
    QUANTUM,
    ChunkParameters,
    budget_prefill_tokens,
    fit_chunks,
    split_budget,
)
from shared.core.decoding_rounds import DecodingRounds
from shared.core.step_costs import StepCost, StepCosts
from shared.profile_files import load_profile

COSTS = StepCosts.from_profile(load_profile("h100-qwen3-32b"), 2)
FIXED = ChunkParameters(chunk="fixed", chunk_tokens=512)
SLACK = ChunkParameters(chunk="slack")


def beside(batch: int = 0, mean_context: float = 2_000.0, itl_slo_s: float = 0.05) -> DecodingRounds:
    return DecodingRounds(batch, mean_context, itl_slo_s)


def budget(parameters: ChunkParameters, costs: StepCosts | None = COSTS, **fields: Any) -> int:
    num_history = fields.pop("num_history", 1_000)
    return budget_prefill_tokens(parameters, costs, beside(**{"batch": 8, **fields}), num_history=num_history)


def fit(parameters: ChunkParameters, prefills: list[tuple[int, int]], budget_tokens: int, **fields: Any) -> list[int]:
    time_left_s = fields.pop("time_left_s", [inf] * len(prefills))
    return fit_chunks(parameters, COSTS, prefills, budget_tokens, beside(**fields), time_left_s=time_left_s)


def test_without_a_batch_a_step_takes_as_much_as_may_be() -> None:
    assert budget(FIXED, batch=0) == budget(SLACK, batch=0) == SLACK.max_prefill_tokens


def test_fixed_looks_at_nothing() -> None:
    assert budget(FIXED) == budget(FIXED, itl_slo_s=1e-6) == budget(FIXED, costs=None, batch=200) == 512


def test_slack_without_costs_is_fixed() -> None:
    assert budget(SLACK, costs=None) == SLACK.chunk_tokens


@given(st.integers(1, 200), st.floats(100, 20_000), st.floats(0.001, 1.0), st.integers(0, 100_000))
def test_slack_keeps_the_step_within_its_share_of_the_objective(
    batch: int, mean_context: float, itl_slo_s: float, num_history: int
) -> None:
    """Unless that is less than the least, which always goes on; in whole blocks."""
    size = budget(SLACK, batch=batch, mean_context=mean_context, itl_slo_s=itl_slo_s, num_history=num_history)
    assert SLACK.min_chunk_tokens <= size <= SLACK.max_prefill_tokens
    assert size % QUANTUM == 0
    limit_s = SLACK.itl_share * itl_slo_s
    if size > SLACK.min_chunk_tokens:
        assert COSTS.step_s(batch, mean_context, [(num_history, size)]) <= limit_s * (1 + 1e-9)
    if size < SLACK.max_prefill_tokens:
        assert COSTS.step_s(batch, mean_context, [(num_history, size + 2 * QUANTUM + 1)]) > limit_s * (1 - 1e-9)


def test_slack_takes_less_of_a_tighter_objective_a_bigger_batch_and_a_longer_history() -> None:
    assert budget(SLACK, itl_slo_s=0.03) < budget(SLACK) < budget(SLACK, itl_slo_s=0.1)
    assert budget(SLACK, batch=120) < budget(SLACK)
    assert budget(SLACK, num_history=100_000) < budget(SLACK)


@given(st.lists(st.integers(1, 1_000), max_size=10), st.integers(-5, 3_000))
def test_a_budget_is_split_in_order_and_used_up(missing: list[int], budget_tokens: int) -> None:
    chunks = split_budget(missing, budget_tokens)
    assert sum(chunks) == min(max(0, budget_tokens), sum(missing))
    assert all(0 < chunk <= whole for chunk, whole in zip(chunks, missing, strict=False))
    assert chunks[:-1] == missing[: len(chunks[:-1])], "only the last gets a part"


prefills = st.lists(st.tuples(st.integers(0, 60_000), st.integers(1, 3_000)), min_size=1, max_size=6)


@given(prefills, st.integers(1, 64), st.floats(0.01, 0.2))
def test_several_prefills_in_one_step_keep_to_the_objective_together(
    waiting: list[tuple[int, int]], batch: int, itl_slo_s: float
) -> None:
    size = budget(SLACK, batch=batch, itl_slo_s=itl_slo_s, num_history=waiting[0][0])
    chunks = fit(SLACK, waiting, size, batch=batch, itl_slo_s=itl_slo_s)
    whole = split_budget([missing for _, missing in waiting], size)
    assert chunks[0] == whole[0], "the first is as large as alone"
    assert all(a <= b for a, b in zip(chunks, whole, strict=False))
    if len(chunks) > 1:
        parts = [(history, chunk) for (history, _), chunk in zip(waiting, chunks, strict=False)]
        assert COSTS.step_s(batch, 2_000.0, parts) <= SLACK.itl_share * itl_slo_s * (1 + 1e-9)


@pytest.mark.parametrize(("parameters", "batch"), [(FIXED, 8), (SLACK, 0)])
def test_fixed_chunks_and_steps_without_a_batch_use_the_whole_budget(parameters: ChunkParameters, batch: int) -> None:
    waiting = [(50_000, 100), (50_000, 900)]
    sizes = fit(parameters, waiting, 600, batch=batch, itl_slo_s=1e-6)
    assert sizes == [100, 500]


# -------------------------------------------------------------------------------- deadlines

ON_TIME = ChunkParameters(chunk="slack", keeps_on_time=True)


def test_nobody_joins_a_step_that_would_then_be_too_long_for_another() -> None:
    """Every prefill of a step has its first token at the step's end."""
    waiting = [(1_000, 400), (2_000, 400), (0, 400)]
    one_s, two_s, three_s = (COSTS.step_s(0, 0.0, waiting[:n]) for n in (1, 2, 3))
    assert fit(ON_TIME, waiting, 8_192, time_left_s=[three_s * 1.001, inf, inf]) == [400, 400, 400]
    assert fit(ON_TIME, waiting, 8_192, time_left_s=[three_s * 0.999, inf, inf]) == [400, 400]
    assert fit(ON_TIME, waiting, 8_192, time_left_s=[inf, two_s * 1.001, inf]) == [400, 400]
    assert fit(ON_TIME, waiting, 8_192, time_left_s=[one_s * 1.001, inf, inf]) == [400]
    assert fit(SLACK, waiting, 8_192, time_left_s=[one_s * 1.001, inf, inf]) == [400, 400, 400], "switched off"


def test_who_is_late_anyway_stops_nobody() -> None:
    waiting = [(1_000, 400), (2_000, 400), (0, 400)]
    one_s, two_s = (COSTS.step_s(0, 0.0, waiting[:n]) for n in (1, 2))
    assert fit(ON_TIME, waiting, 8_192, time_left_s=[one_s * 0.999, inf, inf]) == [400, 400, 400]
    assert fit(ON_TIME, waiting, 8_192, time_left_s=[-5.0, two_s * 0.999, inf]) == [400, 400, 400]


def test_a_chunk_that_does_not_end_its_prefill_has_no_deadline_yet() -> None:
    assert fit(ON_TIME, [(0, 300), (1_000, 900)], 500, time_left_s=[inf, 0.001]) == [300, 200]


@given(
    st.lists(st.tuples(st.integers(0, 8_000), st.integers(1, 2_000)), min_size=1, max_size=12),
    st.lists(st.floats(-0.1, 1.0), min_size=12, max_size=12),
    st.integers(1, 8_192),
    st.integers(0, 64),
)
def test_a_step_makes_nobody_late_that_a_shorter_one_would_not(
    waiting: list[tuple[int, int]], left_s: list[float], budget_tokens: int, batch: int
) -> None:
    fields = {"batch": batch, "itl_slo_s": 10.0, "time_left_s": left_s[: len(waiting)]}
    chunks = fit(ON_TIME, waiting, budget_tokens, **fields)
    whole = fit(SLACK, waiting, budget_tokens, **fields)
    assert chunks == whole[: len(chunks)]
    assert chunks, "the first always goes"
    parts = [(history, chunk) for (history, _), chunk in zip(waiting, chunks, strict=False)]
    ends_s = COSTS.step_s(batch, 2_000.0, parts)
    for place, (chunk, (_, missing)) in enumerate(zip(chunks, waiting, strict=False)):
        alone_s = COSTS.step_s(batch, 2_000.0, parts[: place + 1])
        if chunk == missing and alone_s <= left_s[place] - 1e-9:
            assert ends_s <= left_s[place] + 1e-9


@given(st.lists(st.tuples(st.integers(0, 8_000), st.integers(1, 2_000)), min_size=1, max_size=6), st.integers(0, 64))
def test_a_step_costs_the_same_chunk_by_chunk(chunks: list[tuple[int, int]], batch: int) -> None:
    step = StepCost(COSTS, batch, 2_000.0)
    costs_s = [step.add(history, chunk) for history, chunk in chunks]
    for count, cost_s in enumerate(costs_s, 1):
        assert cost_s == pytest.approx(COSTS.step_s(batch, 2_000.0, chunks[:count]))


# ---------------------------------------------------------------------------------- stretch


def stretch(parameters: ChunkParameters, batch: int, itl_slo_s: float = 0.05) -> float:
    return predict_stretch(parameters, COSTS, beside(batch, itl_slo_s=itl_slo_s))


def test_a_queue_takes_its_work_where_nobody_decodes_and_longer_beside_a_batch() -> None:
    assert stretch(SLACK, 0) == stretch(FIXED, 0) == 1.0
    assert 1.0 < stretch(SLACK, 16) < stretch(SLACK, 100) < stretch(SLACK, 180)
    assert stretch(SLACK, 100) < stretch(SLACK, 100, itl_slo_s=0.04), "the less slack, the smaller the chunks"
    assert stretch(FIXED, 100) < stretch(ChunkParameters(chunk_tokens=64), 100)


def test_a_queue_of_many_short_prefills_takes_as_long_as_predicted() -> None:
    """The steps that it fills, whatever the fixed part of a short prefill alone: that is shared."""
    batch, itl_slo_s, num_prefills, num_tokens = 100, 0.05, 60, 77
    waiting = [(2_000, num_tokens)] * num_prefills
    size = budget(SLACK, batch=batch, itl_slo_s=itl_slo_s, num_history=2_000)
    taken_s = 0.0
    while waiting:
        chunks = fit(SLACK, waiting, size, batch=batch, itl_slo_s=itl_slo_s)
        parts = [(history, chunk) for (history, _), chunk in zip(waiting, chunks, strict=False)]
        taken_s += COSTS.step_s(batch, 2_000.0, parts)
        done = sum(chunk == missing for chunk, (_, missing) in zip(chunks, waiting, strict=False))
        rest = [(h + chunk, m - chunk) for chunk, (h, m) in zip(chunks, waiting, strict=False) if chunk < m]
        waiting = rest + waiting[done + len(rest) :]
    predicted_s = stretch(SLACK, batch, itl_slo_s) * num_prefills * COSTS.work_s(2_000, num_tokens)
    assert predicted_s == pytest.approx(taken_s, rel=0.15)
