"""Links: each end carries its transfers one after another, and idles for nobody."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from planner.simulator.links import Links
from shared.core.step_costs import StepCosts
from shared.profile_files import load_profile

PROFILE = load_profile("h100-qwen3-32b")
TOKENS = 10_000


def worker(index: int, *, node: int = 0, degree: int = 1) -> Any:
    return SimpleNamespace(index=index, node=node, costs=StepCosts.from_profile(PROFILE, degree))


def seconds(rate: float) -> float:
    return TOKENS * PROFILE.kv_bytes_per_token / rate


BETWEEN = seconds(PROFILE.links.inter_node_bytes_per_s)
WITHIN = seconds(PROFILE.links.intra_node_bytes_per_s)
LATENCY = PROFILE.links.latency_s


def test_one_that_sends_to_a_busy_worker_and_then_to_an_idle_one_holds_up_nobody_but_itself() -> None:
    links, a, b = Links(), worker(0, node=0), worker(1, node=1)
    busy, idle = worker(2, node=2), worker(3, node=3)
    assert links.transfer(a, busy, TOKENS, 0.0, 0.0) == pytest.approx(BETWEEN + LATENCY)
    assert links.transfer(b, busy, TOKENS, 0.0, 0.0) == pytest.approx(2 * BETWEEN + LATENCY), "one after another"
    assert links.transfer(b, idle, TOKENS, 0.0, 0.0) == pytest.approx(2 * BETWEEN + LATENCY), "b's second, not after"


def test_a_large_worker_sends_to_several_small_ones_at_once() -> None:
    links, large = Links(), worker(0, node=0, degree=8)
    ends = [links.transfer(large, worker(1 + i, node=1), TOKENS, 0.0, 0.0) for i in range(8)]
    assert ends == pytest.approx([BETWEEN + LATENCY] * 8)
    ninth = links.transfer(large, worker(9, node=1), TOKENS, 0.0, 0.0)
    assert ninth == pytest.approx(9 / 8 * BETWEEN + LATENCY), "its own way out is full"


def test_links_within_a_node_and_between_nodes_are_not_the_same() -> None:
    links, source = Links(), worker(0, node=0)
    assert links.transfer(source, worker(1, node=1), TOKENS, 0.0, 0.0) == pytest.approx(BETWEEN + LATENCY)
    assert links.transfer(source, worker(2, node=0), TOKENS, 0.0, 0.0) == pytest.approx(WITHIN + LATENCY)
    assert links.idle_at(source, worker(3, node=0)) == pytest.approx(WITHIN)
    assert links.idle_at(source, worker(3, node=1)) == pytest.approx(BETWEEN)


def test_what_went_out_while_it_was_computed_is_not_waited_for() -> None:
    links, source = Links(bandwidth_scale=0.5), worker(0, node=0)
    hidden = links.transfer(source, worker(1, node=1), TOKENS, 10.0, 1.5 * BETWEEN)
    assert hidden == pytest.approx(10.0 + 0.5 * BETWEEN + LATENCY), "half the bandwidth, three quarters of it hidden"
    assert links.num_bytes == TOKENS * PROFILE.kv_bytes_per_token
