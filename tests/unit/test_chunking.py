"""How many prefill tokens a step takes: a fixed number, or what the batch's objective leaves time for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core.chunking import QUANTUM, ChunkParameters, budget_prefill_tokens, fit_chunks, split_budget
from shared.core.step_costs import StepCosts
from shared.profile_files import load_profile

COSTS = StepCosts.from_profile(load_profile("h100-qwen3-32b"), 2)
FIXED = ChunkParameters(chunk="fixed", chunk_tokens=512)
SLACK = ChunkParameters(chunk="slack")


def budget(parameters: ChunkParameters, costs: StepCosts | None = COSTS, **fields: Any) -> int:
    defaults = {"batch": 8, "mean_context": 2_000.0, "itl_slo_s": 0.05, "num_history": 1_000}
    return budget_prefill_tokens(parameters, costs, **{**defaults, **fields})


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
    chunks = fit_chunks(SLACK, COSTS, waiting, size, batch=batch, mean_context=2_000.0, itl_slo_s=itl_slo_s)
    whole = split_budget([missing for _, missing in waiting], size)
    assert chunks[0] == whole[0], "the first is as large as alone"
    assert all(a <= b for a, b in zip(chunks, whole, strict=False))
    if len(chunks) > 1:
        parts = [(history, chunk) for (history, _), chunk in zip(waiting, chunks, strict=False)]
        assert COSTS.step_s(batch, 2_000.0, parts) <= SLACK.itl_share * itl_slo_s * (1 + 1e-9)


@pytest.mark.parametrize(("parameters", "batch"), [(FIXED, 8), (SLACK, 0)])
def test_fixed_chunks_and_steps_without_a_batch_use_the_whole_budget(parameters: ChunkParameters, batch: int) -> None:
    waiting = [(50_000, 100), (50_000, 900)]
    sizes = fit_chunks(parameters, COSTS, waiting, 600, batch=batch, mean_context=2_000.0, itl_slo_s=1e-6)
    assert sizes == [100, 500]
