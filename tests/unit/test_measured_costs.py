"""Costs made of what heartbeats measure: the rule, the priors, and when they are made anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from heartbeats import make_heartbeat

from shared.core.measured_costs import MeasuredRates, WorkerCosts, build_measured_costs

RATES = MeasuredRates(prefill_tokens_per_s=500.0, decode_step_s=0.04, kv_bytes_per_s=1e6, kv_bytes_per_token=100)


def costs(rates: MeasuredRates = RATES) -> Any:
    return build_measured_costs(rates, parallel_degree=1, num_kv_tokens=1_000)


@pytest.mark.parametrize("num_history", [0, 100, 20_000, 50_000])
@pytest.mark.parametrize("num_new", [1, 40, 64, 300, 2_048, 8_000])
def test_a_prefill_takes_its_tokens_and_their_attention(num_history: int, num_new: int) -> None:
    expected = 0.002 + num_new / 500 * (1 + (num_history + num_new / 2) / 20_000)
    assert costs().prefill_s(num_history, num_new) == pytest.approx(expected, rel=0.02)


def test_a_long_prefill_is_a_sum_of_steps() -> None:
    expected = 0.004 + 16_000 / 500 * (1 + 8_000 / 20_000)
    assert costs().prefill_s(0, 16_000) == pytest.approx(expected, rel=0.01)
    assert costs().prefill_s(100, 0) == 0.0


def test_the_decode_step_is_the_one_measured_and_grows_with_the_batch() -> None:
    assert costs().decode_step_s(1, 5_000) == pytest.approx(0.04)
    at_eight = costs(replace(RATES, decode_batch=8))
    assert at_eight.decode_step_s(8, 5_000) == pytest.approx(0.04)
    assert at_eight.decode_step_s(9, 5_000) > at_eight.decode_step_s(8, 5_000) > at_eight.decode_step_s(1, 5_000)
    assert costs().decode_step_s(0, 0) == 0.0


def test_a_step_of_both_takes_longer_than_either() -> None:
    both = costs().step_s(4, 1_000, ((0, 100),))
    assert both > max(costs().decode_step_s(4, 1_000), costs().prefill_s(0, 100))
    chunk = costs().largest_chunk(4, 1_000, 0, both)
    assert 95 <= chunk <= 101


def test_priors_stand_in_until_something_is_measured() -> None:
    worker = WorkerCosts.of(make_heartbeat(), None, 1.0)
    assert worker.costs.prefill_s(0, 2_000) == pytest.approx(1.05, rel=0.01)
    assert worker.costs.decode_step_s(1, 100) == pytest.approx(0.05)
    assert worker.costs.link_bytes_per_s == 500e6
    assert worker.costs.kv_bytes_per_token == make_heartbeat().kv_bytes_per_token


@pytest.mark.parametrize("field", ["prefill_tokens_per_s", "decode_step_s", "kv_bytes_per_s"])
@pytest.mark.parametrize("factor", [0.5, 0.85, 1.0, 1.15, 1.5])
def test_costs_are_made_anew_when_a_rate_has_moved_by_a_fifth(field: str, factor: float) -> None:
    rates = {"prefill_tokens_per_s": 300.0, "decode_step_s": 0.03, "kv_bytes_per_s": 1e7}
    worker = WorkerCosts.of(make_heartbeat(**rates), None, 1.0)
    before = worker.costs
    was_rebuilt = worker.follow(make_heartbeat(**{**rates, field: factor * rates[field]}))
    assert was_rebuilt == (abs(factor - 1) > 0.2)
    assert (worker.costs is not before) == was_rebuilt


def test_small_moves_add_up() -> None:
    worker = WorkerCosts.of(make_heartbeat(prefill_tokens_per_s=100.0), None, 1.0)
    rebuilt = [worker.follow(make_heartbeat(prefill_tokens_per_s=rate)) for rate in (110.0, 119.0, 125.0, 130.0)]
    assert rebuilt == [False, False, True, False]
    assert worker.costs.prefill_s(0, 125) == pytest.approx(1.0, rel=0.01)
