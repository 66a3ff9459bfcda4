"""Window reordering: against brute force written differently, and its bound against starvation."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core.reordering import (
    WaitingPrefill,
    choose_first_come,
    choose_next_prefill,
    count_postponements,
)
from shared.core.types import RoundKey


def task(deadline: float, num_new: int, num_postponements: int = 0, number: int = 0) -> WaitingPrefill:
    return WaitingPrefill(RoundKey("t", f"s{number}", 0, 1), deadline, 0, num_new, num_postponements)


def one_second_per_token(num_history_tokens: int, num_new_tokens: int) -> float:
    return float(num_new_tokens)


def count_on_time(order: tuple[WaitingPrefill, ...], now: float) -> int:
    finished = [now + sum(t.num_new_tokens for t in order[: i + 1]) for i in range(len(order))]
    return sum(end <= t.ttft_deadline for end, t in zip(finished, order, strict=True))


tasks = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)), min_size=1, max_size=6)


@given(tasks, st.integers(1, 4), st.integers(0, 10))
def test_the_first_of_a_best_order_nearest_to_fcfs_is_chosen(
    drawn: list[tuple[int, int]], window: int, now: int
) -> None:
    queue = [task(now + deadline, size, number=i) for i, (deadline, size) in enumerate(drawn)]
    chosen = choose_next_prefill(queue, now, one_second_per_token, window=window)
    candidates = queue[:window]
    best = max(count_on_time(order, now) for order in permutations(candidates))

    def best_starting_with(index: int) -> int:
        return max(count_on_time(o, now) for o in permutations(candidates) if o[0] is candidates[index])

    assert best_starting_with(chosen) == best
    assert all(best_starting_with(earlier) < best for earlier in range(chosen))


def test_a_short_urgent_task_passes_a_long_one() -> None:
    queue = [task(100, 50), task(5, 2)]
    assert choose_next_prefill(queue, 0.0, one_second_per_token) == 1
    assert choose_next_prefill(queue, 0.0, one_second_per_token, window=1) == 0
    assert choose_first_come(queue, 0.0, one_second_per_token) == 0


def test_only_the_window_is_looked_at() -> None:
    queue = [task(100, 50), task(100, 50), task(100, 50), task(5, 2)]
    assert choose_next_prefill(queue, 0.0, one_second_per_token, window=3) == 0


@given(st.integers(1, 6), st.integers(0, 5), st.lists(st.tuples(st.integers(0, 60), st.integers(1, 10)), min_size=60))
def test_no_task_waits_for_more_than_its_place_and_the_bound(
    start: int, max_postponements: int, arrivals: list[tuple[int, int]]
) -> None:
    """A task at index i is chosen after at most i + max_postponements others, however urgent later ones are."""
    later = [task(d, size, number=i) for i, (d, size) in enumerate(arrivals)]
    queue, later = later[:start], later[start:]
    bound = {id(t): i + max_postponements for i, t in enumerate(queue)}
    now = 0.0
    for number_chosen, new in enumerate(later):
        index = choose_next_prefill(queue, now, one_second_per_token, max_postponements=max_postponements)
        assert number_chosen <= bound[id(queue[index])]
        assert all(number_chosen < bound[id(t)] for t in queue[:index])
        count_postponements(queue, index)
        now += queue.pop(index).num_new_tokens
        bound[id(new)] = number_chosen + 1 + len(queue) + max_postponements
        queue.append(new)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        choose_next_prefill([], 0.0, one_second_per_token)
    with pytest.raises(ValueError, match="empty"):
        choose_first_come([], 0.0, one_second_per_token)
    with pytest.raises(ValueError, match="window"):
        choose_next_prefill([task(1, 1)], 0.0, one_second_per_token, window=9)
