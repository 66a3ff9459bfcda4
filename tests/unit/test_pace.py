"""Steps are shorter while no prefill hurries, and as long as ever once one does."""

from __future__ import annotations

from math import inf

from hypothesis import example, given
from hypothesis import strategies as st

from shared.core.chunking import ChunkParameters, budget_prefill_tokens
from shared.core.pace import choose_pace
from shared.core.policies import find_policy, switch_off
from shared.core.reordering import WaitingPrefill
from shared.core.slack_saving import plan_saving
from shared.core.step_costs import StepCosts
from shared.core.types import RoundKey
from shared.profile_files import load_profile

COSTS = StepCosts.from_profile(load_profile("h100-qwen3-32b"), 2)
EXPERTS = StepCosts.from_profile(load_profile("h100-mixtral-8x7b"), 8)
FULL = find_policy("adaptive").routing.chunk
ITL_SLO_S = 0.047
NOW = 100.0


def waiting(left_s: float, num_tokens: int = 2_000, *, costs: StepCosts = COSTS) -> WaitingPrefill:
    return WaitingPrefill(RoundKey("tenant", "session", 1, 1), 0.0, 0.0, NOW + left_s, costs.work_s(0, num_tokens))


def choose(
    *queue: WaitingPrefill, costs: StepCosts | None = COSTS, batch: int = 16, num_history: int = 0, num_new: int = 2_000
) -> ChunkParameters:
    return choose_pace(
        FULL, costs, queue, NOW, batch=batch, mean_context=2_000.0, itl_slo_s=ITL_SLO_S,
        num_history=num_history, num_new=num_new,
    )  # fmt: skip


def step_s(pace: ChunkParameters) -> float:
    beside = {"batch": 16, "mean_context": 2_000.0, "itl_slo_s": ITL_SLO_S, "num_history": 0}
    return COSTS.step_s(16, 2_000.0, ((0, budget_prefill_tokens(pace, COSTS, **beside)),))


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


@given(left_s=st.floats(-1.0, 300.0), num_new=st.integers(2, 8_192), batch=st.integers(1, 40))
@example(left_s=300.0, num_new=2_000, batch=30)
def test_a_chunk_saved_up_for_at_a_slow_pace_makes_no_step_longer_than_it_may_be(
    left_s: float, num_new: int, batch: int
) -> None:
    beside = {"batch": batch, "mean_context": 60_000.0, "itl_slo_s": 0.022, "num_history": 0, "num_new": num_new}
    pace = choose_pace(FULL, EXPERTS, [waiting(left_s, costs=EXPERTS)], NOW, **beside)  # type: ignore[arg-type]
    saving = plan_saving(pace, EXPERTS, **beside)  # type: ignore[arg-type]
    if pace is not FULL and saving is not None:
        assert EXPERTS.decode_step_s(batch, 60_000.0) + saving.extra_s <= FULL.itl_share * 0.022


def test_nobody_to_spare_no_objective_no_costs_or_switched_off() -> None:
    assert choose(waiting(inf)) is FULL
    assert choose(waiting(10.0), batch=0) is FULL
    assert choose(waiting(10.0), costs=None) is FULL
    assert choose() is FULL
    fixed = find_policy("colocated").routing.chunk
    options = {"batch": 16, "mean_context": 2_000.0, "itl_slo_s": ITL_SLO_S, "num_history": 0, "num_new": 2_000}
    assert choose_pace(fixed, COSTS, [waiting(10.0)], NOW, **options) is fixed
    off = switch_off(find_policy("adaptive"), "calm_steps").routing.chunk
    assert choose_pace(off, COSTS, [waiting(10.0)], NOW, **options).itl_share == off.itl_share
