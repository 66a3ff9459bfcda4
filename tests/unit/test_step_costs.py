"""Step costs: the profile's numbers at its points, straight lines between and beyond them, and the largest chunk."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.core.profile import Curve, DegreeProfile, Grid, Links
from shared.core.step_costs import PREFILL_STEP_TOKENS, Bilinear, PiecewiseLinear, StepCosts
from shared.errors import AmpdError
from shared.profile_files import list_profiles, load_profile

PROFILE = load_profile("h100-qwen3-32b")
COSTS = StepCosts.from_profile(PROFILE, 2)
LINKS = Links(
    devices_per_node=8,
    intra_node_bytes_per_s=100e9,
    inter_node_bytes_per_s=25e9,
    host_bytes_per_s=10e9,
    latency_s=0.001,
)
GRID = Grid(rows=(0, 1_000), columns=(1, 101, 201), s=((0.0, 0.1, 0.3), (0.2, 0.5, 0.7)))
DEGREE = DegreeProfile(
    parallel_degree=4,
    num_kv_tokens=10_000,
    linear=Curve(at=(1, 100, 1_000), s=(0.01, 0.02, 0.2)),
    prefill_attention=GRID,
    decode_attention=Grid(rows=(1, 11), columns=(0, 1_000), s=((0.0, 0.01), (0.0, 0.11))),
)


# ----------------------------------------------------------------------------------- curves


def test_a_curve_goes_through_its_points_straight_between_and_on_beyond() -> None:
    curve = PiecewiseLinear((10, 20, 40), (1.0, 2.0, 10.0))
    assert [curve.at(x) for x in (10, 20, 40)] == [1.0, 2.0, 10.0]
    assert (curve.at(15), curve.at(30)) == (1.5, 6.0)
    assert (curve.at(5), curve.at(45)) == (0.5, 12.0), "with the slopes of the nearest pieces"
    assert curve.at(-100) == 0.0, "never below 0"


ascending = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=2, max_size=8)


@given(ascending, st.floats(0.0, 500.0))
def test_inverse_is_the_largest_x_that_is_not_above(pieces: list[tuple[int, int]], y: float) -> None:
    """Pieces may be flat, but not the last one: beyond it the curve must reach every y."""
    xs, ys = [1], [2]
    for width, height in [*pieces, (10, 1)]:
        xs.append(xs[-1] + width)
        ys.append(ys[-1] + height)
    curve = PiecewiseLinear(xs, ys)
    x = curve.inverse(y)
    if y < 2:
        assert x < xs[0]
    else:
        assert curve.at(x) == pytest.approx(y) or curve.at(x) <= y
        assert curve.at(x + 1e-3) > y


def test_inverse_of_a_curve_that_ends_flat_is_its_last_point() -> None:
    curve = PiecewiseLinear((0, 10, 20), (0.0, 1.0, 1.0))
    assert curve.inverse(0.5) == 5.0
    assert curve.inverse(2.0) >= 20.0


def test_a_grid_is_bilinear_between_its_points_and_beyond() -> None:
    grid = Bilinear(GRID)
    for row, times in zip(GRID.rows, GRID.s, strict=True):
        assert [grid.at(row, column) for column in GRID.columns] == pytest.approx(times)
    assert grid.at(500, 101) == pytest.approx(0.3)
    assert grid.at(0, 51) == pytest.approx(0.05)
    assert grid.at(500, 51) == pytest.approx((0.05 + 0.35) / 2)
    assert grid.at(2_000, 101) == pytest.approx(0.9), "rows go on with the last slope"
    assert grid.at(0, 301) == pytest.approx(0.5), "columns too"
    assert grid.at(0, -1_000) == 0.0


# ------------------------------------------------------------------------------ a step's parts


def test_steps_are_the_sum_of_their_parts() -> None:
    costs = StepCosts(DEGREE, LINKS, 1_000)
    assert costs.decode_step_s(1, 1_000) == pytest.approx(0.01 + 0.01)
    assert costs.decode_step_s(0, 1_000) == 0.0
    assert costs.step_s(0, 0.0, []) == 0.0
    assert costs.step_s(3, 500.0, []) == costs.decode_step_s(3, 500.0)
    assert costs.step_s(0, 0.0, [(0, 101)]) == costs.prefill_s(0, 101) == pytest.approx(0.0202 + 0.1)
    mixed_s = costs.step_s(1, 1_000.0, [(0, 101), (1_000, 201)])
    assert mixed_s == pytest.approx(costs.linear.at(303) + 0.01 + 0.1 + 0.7)


def test_scale_multiplies_what_is_computed_and_no_transfer() -> None:
    plain, slow = StepCosts(DEGREE, LINKS, 1_000), StepCosts(DEGREE, LINKS, 1_000, scale=1.5)
    assert slow.decode_step_s(4, 700) == pytest.approx(1.5 * plain.decode_step_s(4, 700))
    assert slow.step_s(4, 700, [(10, 90)]) == pytest.approx(1.5 * plain.step_s(4, 700, [(10, 90)]))
    assert slow.prefill_s(10, 20_000) == pytest.approx(1.5 * plain.prefill_s(10, 20_000))
    assert slow.largest_chunk(2, 100, 0, 0.3) == plain.largest_chunk(2, 100, 0, 0.2)
    assert slow.link_bytes_per_s == plain.link_bytes_per_s


def test_a_worker_of_four_devices_has_four_links() -> None:
    costs = StepCosts(DEGREE, LINKS, 1_000)
    assert (costs.node_bytes_per_s, costs.link_bytes_per_s, costs.host_bytes_per_s) == (400e9, 100e9, 40e9)


@given(st.integers(0, 100_000), st.integers(1, 40_000))
def test_a_long_prefill_is_the_sum_of_its_steps(num_history: int, num_new: int) -> None:
    whole_s = COSTS.prefill_s(num_history, PREFILL_STEP_TOKENS + num_new)
    first_s = COSTS.prefill_s(num_history, PREFILL_STEP_TOKENS)
    assert whole_s == pytest.approx(first_s + COSTS.prefill_s(num_history + PREFILL_STEP_TOKENS, num_new), rel=1e-9)
    assert COSTS.prefill_s(num_history, 0) == 0.0


@given(st.integers(0, 200), st.floats(0, 60_000), st.integers(0, 100_000), st.floats(0.001, 0.5), st.floats(0.5, 2.0))
def test_the_largest_chunk_fits_and_a_little_more_does_not(
    batch: int, mean_context: float, num_history: int, budget_s: float, scale: float
) -> None:
    costs = StepCosts.from_profile(PROFILE, 2, scale=scale)
    chunk = costs.largest_chunk(batch, mean_context, num_history, budget_s)
    assert chunk >= 0
    if chunk:
        assert costs.step_s(batch, mean_context, [(num_history, chunk)]) <= budget_s * (1 + 1e-9)
    # maximal to within a block of tokens: it is rounded down to one afterwards
    assert costs.step_s(batch, mean_context, [(num_history, chunk + 17)]) > budget_s * (1 - 1e-9)


@given(
    st.integers(1, 60), st.floats(500, 20_000), st.integers(0, 60_000), st.integers(1, 30_000), st.floats(0.03, 0.08)
)
@example(batch=27, mean_context=11_473.0, num_history=33_323, num_new=179, limit_s=0.04296875)
@example(batch=32, mean_context=2_009.0, num_history=7_715, num_new=299, limit_s=0.03)  # a step less than is taken
@example(batch=45, mean_context=19_677.0, num_history=1_030, num_new=123, limit_s=0.05708273131261249)  # a step more
def test_a_sliced_prefill_is_predicted_as_its_steps_would_take(
    batch: int, mean_context: float, num_history: int, num_new: int, limit_s: float
) -> None:
    """Against taking the largest chunk again and again: at most one step off where the rest is just more or just less
    than a step, never far above, and below by a third at most; by half over many steps, where the attention that one
    chunk in the middle stands for grows most."""
    done = 0
    steps_s: list[float] = []
    while done < num_new:
        rest = num_new - done
        chunk = COSTS.largest_chunk(batch, mean_context, num_history + done, limit_s)  # to within a block of tokens
        if rest <= 8_192 and COSTS.step_s(batch, mean_context, [(num_history + done, rest)]) <= limit_s:
            chunk = rest
        chunk = min(rest, max(64, min(8_192, chunk)))
        steps_s.append(COSTS.step_s(batch, mean_context, [(num_history + done, chunk)]))
        done += chunk
    sliced_s = COSTS.sliced_prefill_s(batch, mean_context, num_history, num_new, limit_s, min_chunk=64, max_chunk=8_192)
    least = 0.65 if len(steps_s) < 8 else 0.5
    assert least * sum(steps_s[:-1]) <= sliced_s <= 1.2 * (sum(steps_s) + steps_s[0])


def test_one_slice_is_one_step() -> None:
    sliced_s = COSTS.sliced_prefill_s(8, 2_000.0, 4_000, 300, 10.0, min_chunk=64, max_chunk=8_192)
    assert sliced_s == pytest.approx(COSTS.step_s(8, 2_000.0, [(4_150, 300)]))


few = st.sampled_from((0, 1, 8, 300, 4_000))  # asked for again, in any order


@given(st.lists(st.tuples(few, few, few, few), min_size=1, max_size=20))
def test_attention_asked_again_is_the_same(asked: list[tuple[int, int, int, int]]) -> None:
    costs = StepCosts.from_profile(PROFILE, 2, scale=2.0)
    for batch, mean_context, num_history, num_new in asked:
        assert costs.attend_s(num_history, num_new) == costs.attend.at(num_history, num_new)
        assert costs.decode_attend_s(batch, mean_context) == costs.decode_attend.at(batch, mean_context)


@given(st.integers(0, 200), st.integers(0, 20_000), st.integers(0, 50_000), st.integers(1, 8_192))
def test_a_step_of_one_chunk_is_a_mixed_step(batch: int, mean_context: int, num_history: int, num_new: int) -> None:
    one_s = COSTS.chunk_step_s(batch, mean_context, num_history, num_new)
    assert one_s == COSTS.step_s(batch, mean_context, ((num_history, num_new),))


@pytest.mark.parametrize("name", list_profiles())
def test_more_work_never_takes_less_time(name: str) -> None:
    profile = load_profile(name)
    for degree in profile.degrees:
        costs = StepCosts.from_profile(profile, degree.parallel_degree)
        prefills = [costs.prefill_s(1_000, n) for n in (1, 16, 100, 1_000, 4_000, 9_000)]
        batches = [costs.decode_step_s(n, 2_000.0) for n in (1, 2, 8, 32, 128, 512)]
        contexts = [costs.decode_step_s(16, context) for context in (1.0, 500.0, 4_000.0, 50_000.0)]
        for times in (prefills, batches, contexts):
            assert all(0.0 < a <= b for a, b in pairwise(times))


def test_an_unknown_degree_is_answered_with_those_there_are() -> None:
    with pytest.raises(AmpdError, match="choose one of"):
        StepCosts.from_profile(PROFILE, 3)
