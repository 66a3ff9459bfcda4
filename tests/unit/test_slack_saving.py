"""Where a chunk that fits costs a step nearly what a large one does, steps save up for the large one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core.chunk_prediction import predict_mixed_s, predict_stretch
from shared.core.chunking import ChunkParameters, budget_prefill_tokens, fit_chunks
from shared.core.decoding_rounds import DecodingRounds
from shared.core.profile import Curve, DegreeProfile, Grid, Links
from shared.core.slack_saving import SlackSaver, plan_saving
from shared.core.step_costs import StepCosts
from shared.profile_files import load_profile

EXPERTS = StepCosts.from_profile(load_profile("h100-mixtral-8x7b"), 2)  # 64 tokens take 5 ms of a step, 512 take 10
DENSE = StepCosts.from_profile(load_profile("h100-qwen3-32b"), 2)
SLACK = ChunkParameters(chunk="slack")
BUSY = DecodingRounds(batch=8, mean_context=16_000.0, itl_slo_s=0.022)  # the batch alone takes 20 ms
HISTORY = 8_000


def run_steps(
    num_steps: int,
    beside: DecodingRounds = BUSY,
    *,
    costs: StepCosts = EXPERTS,
    first: int = 1,
    saver: SlackSaver,
    num_history: int = HISTORY,
    num_waiting: int = 100_000,
) -> list[int]:
    """Prefill tokens of each of so many steps, with a queue that never ends."""
    queue = {"num_history": num_history, "num_waiting": num_waiting}
    return [saver.choose_budget(SLACK, costs, beside, step=first + n, **queue)[0] for n in range(num_steps)]


def measure_extra_s(chunks: list[int]) -> float:
    """What the chunks take of the batch's time."""
    mixed_s = [EXPERTS.step_s(8, 16_000.0, [(8_000, chunk)]) for chunk in chunks if chunk]
    return sum(mixed_s) - len(mixed_s) * EXPERTS.decode_step_s(8, 16_000.0)


def test_the_batch_gives_no_more_of_its_time_and_prefills_get_several_times_the_tokens() -> None:
    chunks = run_steps(200, saver=SlackSaver())
    small = budget_prefill_tokens(SLACK, EXPERTS, BUSY, num_history=HISTORY)
    assert small == SLACK.min_chunk_tokens
    assert measure_extra_s(chunks[1:]) <= measure_extra_s([small] * 200)
    assert sum(chunks) > 3 * 200 * small
    assert min(chunks) == 0


def test_the_first_chunk_after_steps_without_prefills_goes_at_once_and_only_one() -> None:
    saver = SlackSaver()
    first, second = run_steps(2, saver=saver)
    assert first > 0 == second
    first, second = run_steps(2, saver=saver, first=1_000)
    assert first > 0 == second


def test_it_says_how_many_steps_save() -> None:
    saver = SlackSaver()
    step, waited = 1, []
    queue = {"num_history": HISTORY, "num_waiting": 100_000}
    for _ in range(10):
        tokens, num_steps = saver.choose_budget(SLACK, EXPERTS, BUSY, step=step, **queue)
        waited.append(tokens == 0)
        step += num_steps
    assert waited == [False, True] * 5


def test_no_more_is_saved_for_than_waits() -> None:
    saver = SlackSaver()
    chunks = run_steps(10, saver=saver, num_waiting=100)
    assert max(chunks) == 100
    assert run_steps(10, saver=SlackSaver(), num_waiting=50) == [64] * 10, "a small one goes on at once"


@given(
    st.integers(1, 256), st.floats(100, 30_000), st.floats(0.001, 0.1), st.integers(0, 30_000), st.integers(1, 20_000)
)
def test_no_prefill_starves(
    batch: int, mean_context: float, itl_slo_s: float, num_history: int, num_waiting: int
) -> None:
    """Whatever the objective, of 16 steps one has a chunk, and on the mean they have no fewer tokens than the least."""
    beside = DecodingRounds(batch, mean_context, itl_slo_s)
    chunks = run_steps(64, beside, saver=SlackSaver(), num_history=num_history, num_waiting=num_waiting)
    assert all(any(chunks[start : start + 16]) for start in range(48))
    assert sum(chunks) >= min(num_waiting, SLACK.min_chunk_tokens) * 48


@given(st.integers(1, 256), st.floats(100, 30_000), st.floats(0.001, 0.2), st.integers(0, 100_000))
def test_a_dense_model_saves_only_where_two_blocks_of_the_least_do_not_fit(
    batch: int, mean_context: float, itl_slo_s: float, num_history: int
) -> None:
    beside = DecodingRounds(batch, mean_context, itl_slo_s)
    fitting = budget_prefill_tokens(SLACK, DENSE, beside, num_history=num_history)
    saving = plan_saving(SLACK, DENSE, beside, num_history=num_history, num_new=5_000)
    assert fitting < 2 * SLACK.min_chunk_tokens or saving is None
    if saving is None:
        assert run_steps(5, beside, costs=DENSE, saver=SlackSaver(), num_history=num_history) == [fitting] * 5


@pytest.mark.parametrize(
    ("parameters", "changes"),
    [(ChunkParameters(), {}), (SLACK, {"batch": 0}), (SLACK, {"itl_slo_s": 1.0})],
    ids=["fixed", "nobody decodes", "loose"],
)
def test_nothing_is_saved_where_the_chunk_is_large_enough(parameters: ChunkParameters, changes: dict[str, Any]) -> None:
    beside = msgspec.structs.replace(BUSY, **changes)
    assert plan_saving(parameters, EXPERTS, beside, num_history=HISTORY, num_new=5_000) is None
    for step in range(3):
        queue = {"num_history": HISTORY, "num_waiting": 5_000}
        chosen = SlackSaver().choose_budget(parameters, EXPERTS, beside, step=step, **queue)
        assert chosen == (budget_prefill_tokens(parameters, EXPERTS, beside, num_history=HISTORY), 0)


def test_several_prefills_share_what_was_saved() -> None:
    saving = plan_saving(SLACK, EXPERTS, BUSY, num_history=HISTORY, num_new=5_000)
    assert saving is not None
    waiting = [(8_000, 100), (8_000, 100), (8_000, 5_000)]
    chunks = fit_chunks(SLACK, EXPERTS, waiting, saving.num_tokens, BUSY, time_left_s=[9.0] * 3)
    assert chunks[:2] == [100, 100]
    parts = [(history, chunk) for (history, _), chunk in zip(waiting, chunks, strict=True)]
    alone_s = EXPERTS.step_s(8, 16_000.0, [(8_000, saving.num_tokens)])
    assert EXPERTS.step_s(8, 16_000.0, parts) <= alone_s * (1 + 1e-9)


@pytest.mark.parametrize("num_new", [300, 2_000, 8_000])
def test_a_prefill_takes_as_long_as_predicted(num_new: int) -> None:
    """As do those that follow one another in a queue; counted from the middle of a period of saving."""
    saver, done, step, taken_s = SlackSaver(), 0, 1, 0.0
    saver.choose_budget(
        SLACK, EXPERTS, BUSY, step=0, num_history=HISTORY, num_waiting=100_000
    )  # what had been saved is spent
    while done < num_new:
        queue = {"num_history": HISTORY + done, "num_waiting": num_new - done}
        chunk, _ = saver.choose_budget(SLACK, EXPERTS, BUSY, step=step, **queue)
        chunk = min(chunk, num_new - done)
        taken_s += EXPERTS.step_s(8, 16_000.0, [(8_000 + done, chunk)] if chunk else [])
        done, step = done + chunk, step + 1
    predicted_s = predict_mixed_s(SLACK, EXPERTS, BUSY, num_history=HISTORY, num_new=num_new)
    assert predicted_s == pytest.approx(taken_s, rel=0.35)


def test_a_queue_is_predicted_to_take_what_its_steps_and_those_that_save_do() -> None:
    saver, taken_s, work_s = SlackSaver(), 0.0, 0.0
    for step in range(400):
        chunk, _ = saver.choose_budget(SLACK, EXPERTS, BUSY, step=step, num_history=0, num_waiting=100_000)
        taken_s += EXPERTS.step_s(8, 16_000.0, [(0, chunk)] if chunk else [])
        work_s += EXPERTS.work_s(0, chunk) if chunk else 0.0
    assert predict_stretch(SLACK, EXPERTS, BUSY) == pytest.approx(taken_s / work_s, rel=0.15)


def test_a_curve_that_is_flat_costs_nothing_and_divides_by_nothing() -> None:
    nothing = Grid(rows=(0, 1), columns=(0, 1), s=((0.0, 0.0), (0.0, 0.0)))
    flat = Curve(at=(0, 10_000), s=(0.02, 0.02))
    degree = DegreeProfile(
        parallel_degree=1, num_kv_tokens=1_000, linear=flat, prefill_attention=nothing, decode_attention=nothing
    )
    links = Links(
        devices_per_node=1,
        intra_node_bytes_per_s=1.0,
        inter_node_bytes_per_s=1.0,
        host_bytes_per_s=1.0,
        latency_s=0.0,
    )
    beside = msgspec.structs.replace(BUSY, itl_slo_s=0.01)
    chunks = run_steps(3, beside, costs=StepCosts(degree, links, 1), saver=SlackSaver())
    assert chunks == [8_192] * 3
