"""Fitting: known costs come back through noise, whatever cannot be fitted is refused by name, errors are computed."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from planner.fit_profile import StepSample, StepShape, fit_degree
from planner.fit_summary import describe_points, summarise_fit
from planner.nonnegative_least_squares import solve_nonnegative
from planner.profile_points import PointLimits, choose_held_out_shapes, choose_training_shapes
from shared.core.profile import DegreeProfile, Links, Profile, decode_profile
from shared.core.step_costs import StepCosts
from shared.errors import AmpdError, ErrorCode

LIMITS = PointLimits(num_kv_tokens=22_000, max_context_tokens=8_192)
LINKS = Links(
    devices_per_node=2, intra_node_bytes_per_s=4e9, inter_node_bytes_per_s=2e9, host_bytes_per_s=1e10, latency_s=1e-3
)


def true_linear_s(num_tokens: int) -> float:
    """Reading the weights, then computing: a bend at 7 tokens, another at 300."""
    return 0.020 + 0.003 * max(0, num_tokens - 7) + 0.001 * max(0, num_tokens - 300)


def true_attention_s(history: int, chunk: int) -> float:
    return 1.2e-6 * chunk * (history + chunk / 2)


def true_decode_s(batch: int, mean_context: float) -> float:
    return batch * (7e-4 + 9e-6 * mean_context + 2e-6 * max(0.0, mean_context - 2000))


def true_step_s(shape: StepShape) -> float:
    attention_s = sum(true_attention_s(*chunk) for chunk in shape.chunks)
    decode_s = true_decode_s(shape.batch, shape.mean_context) if shape.batch else 0.0
    return true_linear_s(shape.num_tokens) + attention_s + decode_s


def measure(shapes: list[StepShape], noise: float, seed: int) -> list[StepSample]:
    rng = random.Random(seed)
    return [StepSample(shape, true_step_s(shape) * (1.0 + noise * rng.gauss(0.0, 1.0))) for shape in shapes]


def fit(samples: list[StepSample], max_context: int = LIMITS.max_context_tokens) -> DegreeProfile:
    return fit_degree(samples, parallel_degree=1, num_kv_tokens=LIMITS.num_kv_tokens, max_context_tokens=max_context)


def costs_of(degree: DegreeProfile) -> StepCosts:
    return StepCosts(degree, LINKS, kv_bytes_per_token=46_080)


def errors(costs: StepCosts, shapes: list[StepShape]) -> list[float]:
    return [abs(costs.step_s(s.batch, s.mean_context, s.chunks) / true_step_s(s) - 1.0) for s in shapes]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("quick", [False, True])
def test_known_costs_come_back_through_five_percent_of_noise(seed: int, quick: bool) -> None:
    costs = costs_of(fit(measure(choose_training_shapes(LIMITS, quick=quick), 0.05, seed)))
    shapes = choose_held_out_shapes(LIMITS, quick=False, seed=seed)
    by_kind = {kind: [s for s in shapes if s.kind == kind] for kind in ("prefill", "decode", "mixed")}
    assert all(len(chosen) == 10 for chosen in by_kind.values())
    for kind, chosen in by_kind.items():
        assert statistics.median(errors(costs, chosen)) < 0.05, f"{kind}, {seed=}"


def test_without_noise_the_parts_themselves_are_told_apart() -> None:
    costs = costs_of(fit(measure(choose_training_shapes(LIMITS, quick=False), 0.0, 1)))
    for history, chunk in ((1024, 64), (3072, 256), (7360, 512)):
        more_s = costs.attend.at(history, chunk) - costs.attend.at(0, chunk)
        assert more_s == pytest.approx(true_attention_s(history, chunk) - true_attention_s(0, chunk), rel=0.05)
    # what a chunk costs over eight of an eighth of it is attention alone
    curvature_s = costs.attend.at(0, 512) - 8 * costs.attend.at(0, 64)
    assert curvature_s == pytest.approx(true_attention_s(0, 512) - 8 * true_attention_s(0, 64), rel=0.1)
    # longer than anything measured: the square goes on
    assert costs.prefill_s(0, 8192) == pytest.approx(true_step_s(StepShape(chunks=((0, 8192),))), rel=0.05)


def test_more_work_never_takes_less_time_even_under_heavy_noise() -> None:
    degree = fit(measure(choose_training_shapes(LIMITS, quick=False), 0.4, 5))
    assert list(degree.linear.s) == sorted(degree.linear.s)
    for grid in (degree.prefill_attention, degree.decode_attention):
        for axis in (0, 1):
            assert (np.diff(np.array(grid.s), axis=axis) >= 0.0).all()
    assert len(degree.prefill_attention.columns) == len(degree.prefill_attention.s[0])


def is_first_prefill(shape: StepShape) -> bool:
    return len(shape.chunks) == 1 and shape.chunks[0][0] == 0


@pytest.mark.parametrize(
    ("keep", "named"),
    [
        (lambda s: not is_first_prefill(s) or s.num_tokens in (64, 128), "chunk sizes .* there are 2 .64, 128"),
        (lambda s: s.kind != "prefill" or s.chunks[0][0] == 0, "histories of single-chunk prefill steps.* there are 1"),
        (lambda s: len(s.chunks) < 2, "prefill steps of several chunks"),
        (lambda s: s.kind != "decode", "batch sizes of decode steps.* there are 0 .none"),
        (lambda s: s.kind != "decode" or s.batch == 8, "batch sizes of decode steps.* there are 1 .8"),
        (lambda s: s.kind != "decode" or s.mean_context == 16, "mean contexts of decode steps.* there are 1 .16"),
    ],
)
def test_too_few_points_are_refused_by_name(keep: Callable[[StepShape], bool], named: str) -> None:
    shapes = [shape for shape in choose_training_shapes(LIMITS, quick=False) if keep(shape)]
    with pytest.raises(AmpdError, match=named) as caught:
        fit(measure(shapes, 0.0, 1))
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_held_out_points_are_not_fitted_and_do_not_count_as_points() -> None:
    shapes = choose_training_shapes(LIMITS, quick=True)
    samples = measure(shapes, 0.0, 1)
    absurd = [StepSample(shape, 100.0, held_out=True) for shape in shapes]
    assert fit([*samples, *absurd]) == fit(samples)
    with pytest.raises(AmpdError, match="there are 0"):
        fit([StepSample(sample.shape, sample.seconds, held_out=True) for sample in samples])


def test_a_duration_of_nothing_is_refused() -> None:
    samples = measure(choose_training_shapes(LIMITS, quick=True), 0.0, 1)
    with pytest.raises(AmpdError, match="took 0 s"):
        fit([*samples, StepSample(StepShape(contexts=(7,)), 0.0)])


def profile_with(samples: list[StepSample]) -> Profile:
    return Profile(
        name="synthetic",
        model="m",
        device="d",
        provenance={"points": describe_points(samples)},
        max_context_tokens=8192,
        vocab_size=100,
        kv_bytes_per_token=46_080,
        host_kv_bytes=0,
        links=LINKS,
        degrees=(fit(samples),),
    )


def test_the_summary_compares_the_tables_with_every_point() -> None:
    training = measure(choose_training_shapes(LIMITS, quick=True), 0.0, 1)
    judged = [
        StepSample(shape, true_step_s(shape) * 1.25, held_out=True)
        for shape in choose_held_out_shapes(LIMITS, quick=True, seed=1)
    ]
    profile = profile_with([*training, *judged])
    summary = summarise_fit(decode_profile(msgspec.json.encode(profile), "synthetic"))
    assert summary["fitted"]["num_points"] == len(training)
    assert summary["held_out"]["num_points"] == len(judged) == 9
    assert {kind: s["num_points"] for kind, s in summary["held_out_by_kind"].items()} == {
        "decode": 3,
        "mixed": 3,
        "prefill": 3,
    }
    assert summary["fitted"]["median"] < 0.02
    assert 0.15 < summary["held_out"]["median"] < 0.25  # measured 25 % above the truth: predicted a fifth below it
    assert summary["held_out"]["median"] <= summary["held_out"]["p90"] <= summary["held_out"]["max"]
    assert not summary["target_met"]
    for row in summary["rows"]:
        assert row["error"] == pytest.approx(row["predicted_s"] / row["measured_s"] - 1.0)
    msgspec.json.encode(summary)


def test_a_profile_without_points_has_no_summary() -> None:
    profile = profile_with(measure(choose_training_shapes(LIMITS, quick=True), 0.0, 1))
    profile.provenance.clear()
    with pytest.raises(AmpdError, match="synthetic has no measured points"):
        summarise_fit(profile)


def test_points_keep_within_the_pool_and_the_context() -> None:
    for limits in (LIMITS, PointLimits(2048, 2048), PointLimits(4000, 512)):
        shapes = choose_training_shapes(limits, quick=False) + choose_held_out_shapes(limits, quick=False, seed=3)
        for shape in shapes:
            lengths = [context + 1 for context in shape.contexts] + [sum(chunk) for chunk in shape.chunks]
            assert sum(-(-length // 16) * 16 for length in lengths) <= limits.num_kv_tokens
            assert max(lengths) <= limits.max_context_tokens
        fit(measure(shapes, 0.0, 1), limits.max_context_tokens)
    with pytest.raises(AmpdError, match="--max-context must be at least 512"):
        choose_training_shapes(PointLimits(2048, 100), quick=True)
    with pytest.raises(AmpdError, match="raise --kv-memory-mb"):
        choose_training_shapes(PointLimits(2048, 4096), quick=True)


def test_nonnegative_least_squares_meets_its_optimality_conditions() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(size=(25, 12)), rng.normal(size=25)
        x = solve_nonnegative(a, b)
        assert solve_nonnegative(a, b, start=np.abs(rng.normal(size=12))) == pytest.approx(x, abs=1e-9), f"{seed=}"
        gradient = a.T @ (b - a @ x)
        assert (x >= 0.0).all(), f"{seed=}"
        assert (gradient <= 1e-8).all(), f"{seed=}"
        assert np.abs(gradient[x > 0.0]).max(initial=0.0) < 1e-8, f"{seed=}"
        assert 0 < (x > 0.0).sum() < 12, f"{seed=}: neither bound nor free, this instance shows nothing"


def test_nonnegative_least_squares_with_dependent_and_empty_columns() -> None:
    column = np.array([1.0, 2.0, 3.0])
    a = np.stack([column, 2.0 * column, np.zeros(3), -column], axis=1)
    x = solve_nonnegative(a, 5.0 * column)
    assert a @ x == pytest.approx(5.0 * column)
    assert x[2] == 0.0
    assert (solve_nonnegative(a[:, 3:], column) == 0.0).all()
