"""Whose KV goes first when a worker runs out of room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core.retention import (
    MAX_TTL_S,
    PRIOR_GAP_S,
    TTL_FACTOR,
    GapStats,
    IdleKv,
    RetentionName,
    choose_victim,
    expect_return_s,
)

NOW = 1_000.0
NAMES: tuple[RetentionName, ...] = ("lru", "ttl", "expected_return")


def idle(
    key: str, idle_s: float, *, mean_gap_s: float = 5.0, restore_s: float = 1.0, num_tokens: int = 1_000
) -> IdleKv[str]:
    return IdleKv(key, num_tokens, NOW - idle_s, mean_gap_s, restore_s)


def choose(retention: RetentionName, *held: IdleKv[str]) -> str | None:
    victim = choose_victim(held, NOW, retention)
    return victim.key if victim is not None else None


@pytest.mark.parametrize("retention", NAMES)
def test_nobody_is_chosen_of_none_and_the_only_one_of_one(retention: RetentionName) -> None:
    assert choose(retention) is None
    assert choose(retention, idle("a", 3.0)) == "a"


def test_lru_takes_who_has_been_idle_longest() -> None:
    assert choose("lru", idle("a", 3.0), idle("b", 9.0, mean_gap_s=100.0), idle("c", 6.0)) == "b"


def test_ttl_takes_the_oldest_of_those_past_their_time_before_any_other() -> None:
    kept = idle("kept", 50.0, mean_gap_s=30.0)  # to live for 60 s
    assert choose("ttl", kept, idle("past", 11.0), idle("older", 12.0)) == "older"
    assert choose("ttl", kept, idle("fresh", 9.0)) == "kept", "when none is past its time, as lru"
    assert choose("ttl", idle("a", MAX_TTL_S + 1, mean_gap_s=1_000.0), idle("b", 200.0, mean_gap_s=150.0)) == "b"


def test_a_time_to_live_has_a_limit() -> None:
    long_tool = idle("long", MAX_TTL_S + 1.0, mean_gap_s=1_000.0)
    assert choose("ttl", idle("kept", MAX_TTL_S + 5.0 - 10.0, mean_gap_s=1_000.0), long_tool) == "long"
    exact = idle("exact", TTL_FACTOR * 5.0)
    assert choose("ttl", idle("older", 11.0, mean_gap_s=100.0), exact) == "older", "not past its time on the dot"


def test_expected_return_takes_who_comes_back_last() -> None:
    assert choose("expected_return", idle("soon", 1.0, mean_gap_s=2.0), idle("late", 1.0, mean_gap_s=60.0)) == "late"
    assert choose("expected_return", idle("soon", 4.0), idle("overdue", 300.0)) == "overdue"


def test_expected_return_keeps_what_costs_most_to_bring_back() -> None:
    cheap, dear = idle("cheap", 2.0, restore_s=0.1), idle("dear", 2.0, restore_s=3.0)
    assert choose("expected_return", dear, cheap) == "cheap"
    large = idle("large", 2.0, num_tokens=50_000)
    assert choose("expected_return", idle("small", 2.0), large) == "large", "more room for the same time"


@given(st.floats(0.0, 1e4), st.floats(0.0, 1e3))
def test_who_is_overdue_is_expected_to_stay_away_as_long_again(idle_s: float, mean_gap_s: float) -> None:
    expected = expect_return_s(idle_s, mean_gap_s)
    assert expected > 0.0
    if idle_s > mean_gap_s > 0.01:
        assert expected == idle_s
    if idle_s < mean_gap_s / 2 and mean_gap_s > 0.02:
        assert expected == mean_gap_s - idle_s


@given(
    st.lists(st.tuples(st.floats(0, 500), st.floats(0.01, 100), st.floats(0, 10), st.integers(0, 90_000)), min_size=1)
)
def test_the_choice_is_of_those_given_and_the_same_in_any_order(drawn: list[tuple[float, float, float, int]]) -> None:
    held = [
        IdleKv(str(i), tokens, NOW - idle_s - i * 1e-6, gap_s, restore_s)
        for i, (idle_s, gap_s, restore_s, tokens) in enumerate(drawn)
    ]
    for retention in ("lru", "ttl"):
        chosen = choose_victim(held, NOW, retention)
        assert chosen in held
        again = choose_victim(list(reversed(held)), NOW, retention)
        assert again is not None
        assert again.idle_since == chosen.idle_since


def test_gaps_are_a_mean_that_starts_from_the_prior() -> None:
    gaps = GapStats()
    assert gaps.mean_s == PRIOR_GAP_S
    for _ in range(3):
        gaps.add(1.0)
    assert gaps.mean_s == pytest.approx((PRIOR_GAP_S + 3.0) / 4.0)
