"""Steps are shorter while no prefill hurries, and as long as ever once one does."""

from __future__ import annotations

from math import inf

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from shared.core.chunking import ChunkParameters, budget_prefill_tokens
from shared.core.decoding_rounds import DecodingRounds
from shared.core.pace import choose_pace
from shared.core.policies import find_policy, switch_off
from shared.core.reordering import WaitingPrefill
from shared.core.slack_saving import SlackSaver
from shared.core.step_costs import StepCosts
from shared.core.types import RoundKey
from shared.profile_files import load_profile

COSTS = StepCosts.from_profile(load_profile("h100-qwen3-32b"), 2)
EXPERTS = StepCosts.from_profile(load_profile("h100-mixtral-8x7b"), 8)
FULL = find_policy("adaptive").routing.chunk
BESIDE = DecodingRounds(batch=16, mean_context=2_000.0, itl_slo_s=0.047)
NOW = 100.0


def waiting(left_s: float, num_tokens: int = 2_000, *, costs: StepCosts = COSTS) -> WaitingPrefill:
    return WaitingPrefill(RoundKey("tenant", "session", 1, 1), 0.0, 0.0, NOW + left_s, costs.work_s(0, num_tokens))


def choose(
    *queue: WaitingPrefill,
    costs: StepCosts | None = COSTS,
    batch: int = 16,
    num_history: int = 0,
    num_waiting: int = 2_000,
) -> ChunkParameters:
    beside = msgspec.structs.replace(BESIDE, batch=batch)
    return choose_pace(FULL, costs, beside, queue, NOW, num_history=num_history, num_waiting=num_waiting)


def step_s(pace: ChunkParameters) -> float:
    return COSTS.step_s(16, 2_000.0, ((0, budget_prefill_tokens(pace, COSTS, BESIDE, num_history=0)),))


def test_steps_grow_as_time_runs_out() -> None:
    shares = [choose(waiting(left_s)).itl_share for left_s in [10.0, *(n / 500 for n in range(1_000, -2, -1))]]
    assert shares == sorted(shares)
    assert shares[0] == FULL.calm_itl_share
    assert shares[-1] == FULL.itl_share
    assert len(set(shares)) > 2, "no pace between"
    assert step_s(choose(waiting(10.0))) < 0.7 * step_s(FULL)


def test_all_that_waits_counts_and_the_first_deadline() -> None:
    calm = FULL.calm_itl_share
    assert choose(waiting(10.0), waiting(20.0)).itl_share == calm
    assert choose(waiting(10.0), *[waiting(20.0)] * 30) is FULL
    assert choose(waiting(20.0), waiting(0.2)) is FULL


@given(
    left_s=st.floats(-1.0, 300.0),
    first=st.integers(2, 8_192),
    others=st.integers(0, 8_192),
    batch=st.integers(1, 40),
    mean_context=st.floats(1_000.0, 60_000.0),
)
@example(left_s=300.0, first=2_000, others=0, batch=30, mean_context=60_000.0)
@example(left_s=300.0, first=40, others=4_000, batch=1, mean_context=8_000.0)
def test_what_is_saved_up_for_at_a_slow_pace_makes_no_step_longer_than_it_may_be(
    left_s: float, first: int, others: int, batch: int, mean_context: float
) -> None:
    itl_slo_s = 0.022
    queue = [waiting(left_s, num_tokens, costs=EXPERTS) for num_tokens in (first, others) if num_tokens]
    beside = DecodingRounds(batch, mean_context, itl_slo_s)
    pace = choose_pace(FULL, EXPERTS, beside, queue, NOW, num_history=0, num_waiting=first + others)
    budget, _ = SlackSaver().choose_budget(pace, EXPERTS, beside, step=1, num_history=0, num_waiting=first + others)
    if pace is not FULL and budget > pace.min_chunk_tokens:
        assert EXPERTS.step_s(batch, mean_context, ((0, budget),)) <= FULL.itl_share * itl_slo_s + 1e-9


def test_nobody_to_spare_no_objective_no_costs_or_switched_off() -> None:
    assert choose(waiting(inf)) is FULL
    assert choose(waiting(60.0), waiting(inf)) is FULL
    assert choose(waiting(10.0), batch=0) is FULL
    assert choose(waiting(10.0), costs=None) is FULL
    assert choose() is FULL
    fixed = find_policy("colocated").routing.chunk
    options = {"num_history": 0, "num_waiting": 2_000}
    assert choose_pace(fixed, COSTS, BESIDE, [waiting(10.0)], NOW, **options) is fixed
    off = switch_off(find_policy("adaptive"), "calm_steps").routing.chunk
    assert choose_pace(off, COSTS, BESIDE, [waiting(10.0)], NOW, **options) is off
