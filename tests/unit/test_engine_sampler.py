"""Sampling: the right distribution, and the same draw wherever and with whomever a token is sampled."""

from __future__ import annotations

import pytest
import torch

from shared.engine.sampler import draw_uniform, sample
from shared.engine.sampling_checks import check_sampling
from shared.engine.step import StepItem
from shared.errors import AmpdError, ErrorCode
from shared.messages import SamplingParams

NUM_DRAWS = 4000


def item(params: SamplingParams, output_index: int = 0) -> StepItem:
    return StepItem([1], 0, [1], params, output_index=output_index)


def frequencies(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    rows = logits.expand(NUM_DRAWS, -1)
    tokens = sample(rows, [item(params, index) for index in range(NUM_DRAWS)])
    return torch.bincount(torch.tensor(tokens), minlength=logits.numel()) / NUM_DRAWS


def expected(logits: torch.Tensor, kept: list[int], temperature: float = 1.0) -> torch.Tensor:
    masked = torch.full_like(logits, float("-inf"))
    masked[kept] = logits[kept]
    return torch.softmax(masked / temperature, dim=0)


LOGITS = torch.tensor([0.2, 2.0, -1.0, 1.4, 0.9, -3.0, 1.0, -0.5])  # order of size: 1 3 6 4 0 7 2 5


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(temperature=1.0, seed=1), list(range(8))),
        (SamplingParams(temperature=0.5, seed=2), list(range(8))),
        (SamplingParams(temperature=2.0, top_k=3, seed=3), [1, 3, 6]),
        (SamplingParams(temperature=1.0, top_p=0.6, seed=4), [1, 3]),
        (SamplingParams(temperature=1.0, top_p=0.6, top_k=2, seed=5), [1]),  # top_p of what top_k left
        (SamplingParams(temperature=1.0, top_k=1000, seed=6), list(range(8))),
        (SamplingParams(temperature=1.0, top_p=1e-9, seed=7), [1]),
    ],
)
def test_frequencies_follow_the_filtered_distribution(params: SamplingParams, kept: list[int]) -> None:
    observed = frequencies(LOGITS, params)
    wanted = expected(LOGITS, kept, params.temperature)
    assert observed[wanted == 0].sum() == 0
    # 4.5 standard deviations of a binomial frequency; the seeds are fixed, so this cannot flicker
    assert bool(((observed - wanted).abs() <= 4.5 * (wanted * (1 - wanted) / NUM_DRAWS).sqrt() + 1e-9).all())


def test_top_p_matches_a_full_sort_on_a_large_vocabulary() -> None:
    """A flat distribution, whose nucleus is wider than the sampler's first look."""
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(3)) * 0.1
    params = SamplingParams(temperature=1.0, top_p=0.5, seed=9)
    order = logits.argsort(descending=True)
    kept = int((torch.softmax(logits[order], 0).double().cumsum(0) < 0.5).sum()) + 1
    allowed = set(order[:kept].tolist())
    tokens = sample(logits.expand(500, -1), [item(params, index) for index in range(500)])
    assert set(tokens) <= allowed
    assert len(set(tokens)) > 300


def test_temperature_zero_is_the_argmax() -> None:
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(4))
    assert sample(logits, [item(SamplingParams())] * 6) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-30, 1e-300])
def test_a_tiny_temperature_is_the_argmax_too(temperature: float) -> None:
    assert sample(LOGITS[None], [item(SamplingParams(temperature=temperature, seed=1))]) == [1]


def test_the_draw_does_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(5, 300, generator=generator)
    kinds = [
        SamplingParams(temperature=1.0, seed=11),
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=20, seed=12),
        SamplingParams(temperature=1.3, top_p=0.8, seed=13),
        SamplingParams(temperature=1.0, seed=11),
    ]
    items = [item(params, output_index=index) for index, params in enumerate(kinds)]
    together = sample(logits, items)
    alone = [sample(logits[i : i + 1], [items[i]])[0] for i in range(5)]
    backwards = sample(logits.flip(0), items[::-1])[::-1]
    assert together == alone == backwards


def test_the_uniform_draw_depends_on_seed_and_index_alone() -> None:
    assert draw_uniform(7, 3) == draw_uniform(7, 3)
    assert draw_uniform(None, 3) == draw_uniform(0, 3)
    draws = [draw_uniform(seed, index) for seed in range(-20, 20) for index in range(50)]
    assert len(set(draws)) == len(draws)
    assert all(0.0 <= draw < 1.0 for draw in draws)
    mean = sum(draws) / len(draws)
    assert abs(mean - 0.5) < 4.5 * (1 / 12 / len(draws)) ** 0.5


@pytest.mark.parametrize("logit", [float("nan"), float("inf")])
def test_broken_logits_are_an_error_not_a_token(logit: float) -> None:
    logits = LOGITS.repeat(2, 1)
    logits[1, 3] = logit
    with pytest.raises(AmpdError, match="not finite"):
        sample(logits, [item(SamplingParams())] * 2)


def test_minus_infinity_is_never_sampled() -> None:
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")])
    observed = frequencies(logits, SamplingParams(temperature=1.0, seed=3))
    assert observed[[0, 2, 4]].sum() == 0
    assert observed[1] > 0.4
    assert observed[3] > 0.4


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(temperature=-0.1), "temperature"),
        (SamplingParams(temperature=float("nan")), "temperature"),
        (SamplingParams(temperature=float("inf")), "temperature"),
        (SamplingParams(top_p=0.0), "top_p"),
        (SamplingParams(top_p=1.1), "top_p"),
        (SamplingParams(top_p=float("nan")), "top_p"),
        (SamplingParams(top_k=-1), "top_k"),
    ],
)
def test_impossible_parameters_are_refused_by_name(params: SamplingParams, field: str) -> None:
    with pytest.raises(AmpdError, match=f"sampling.{field}") as caught:
        check_sampling(params)
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_possible_parameters_pass() -> None:
    check_sampling(SamplingParams())
    check_sampling(SamplingParams(temperature=1.5, top_p=0.9, top_k=40, seed=-3))
