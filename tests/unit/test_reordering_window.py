"""The orders of a prefill queue: the paper's window and Moore-Hodgson against brute force, and nobody starves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.core.reordering import (
    OrderParameters,
    PrefillOrder,
    WaitingPrefill,
    has_aged,
    order_moore_hodgson,
    order_prefills,
    order_window,
)
from shared.core.types import RoundKey


def task(
    deadline: float, work_s: float, *, arrival: float = 0.0, session: float = 0.0, number: int = 0
) -> WaitingPrefill:
    return WaitingPrefill(RoundKey("t", f"s{number}", 0, 1), arrival, session, deadline, work_s)


def count_on_time(queue: Sequence[WaitingPrefill], order: Sequence[int], now: float) -> int:
    finish, num_on_time = now, 0
    for index in order:
        finish += queue[index].work_s
        num_on_time += finish <= queue[index].ttft_deadline
    return num_on_time


drawn_tasks = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)), min_size=1, max_size=6)


@given(drawn_tasks, st.integers(1, 4), st.integers(0, 10))
def test_window_takes_a_best_order_of_the_first_and_of_equals_the_one_nearest_to_fcfs(
    drawn: list[tuple[int, int]], window: int, now: int
) -> None:
    queue = [task(now + deadline, size, number=i) for i, (deadline, size) in enumerate(drawn)]
    order = order_window(queue, now, window, 8)
    first = range(min(window, len(queue)))
    best = max(count_on_time(queue, candidate, now) for candidate in permutations(first))
    assert count_on_time(queue, order[: len(first)], now) == best
    assert tuple(order[: len(first)]) == next(
        candidate for candidate in permutations(first) if count_on_time(queue, candidate, now) == best
    )
    assert order[len(first) :] == list(range(len(first), len(queue)))


@settings(max_examples=2_000)
@given(
    st.lists(st.tuples(st.floats(-5, 40), st.floats(0.01, 10)), min_size=1, max_size=7),
    st.floats(0, 10),
)
def test_moore_hodgson_has_as_many_on_time_as_any_order(drawn: list[tuple[float, float]], now: float) -> None:
    queue = [task(now + deadline, work_s, number=i) for i, (deadline, work_s) in enumerate(drawn)]
    order = order_moore_hodgson(queue, now)
    assert sorted(order) == list(range(len(queue)))
    # to the rounding of sums: what is on time by a hair may be late when the same numbers are added otherwise
    loose = [task(t.ttft_deadline + 1e-9, t.work_s) for t in queue]
    tight = [task(t.ttft_deadline - 1e-9, t.work_s) for t in queue]
    assert count_on_time(loose, order, now) >= most_on_time(tight, now)


def most_on_time(queue: Sequence[WaitingPrefill], now: float) -> int:
    """By brute force over sets, not orders: a set can be on time if it is by deadline (Jackson's rule)."""
    best = 0
    by_deadline = sorted(queue, key=lambda one: one.ttft_deadline)
    for mask in range(1 << len(queue)):
        finish, is_on_time = now, True
        for index, one in enumerate(by_deadline):
            if mask >> index & 1:
                finish += one.work_s
                is_on_time = is_on_time and finish <= one.ttft_deadline
        if is_on_time:
            best = max(best, mask.bit_count())
    return best


def test_brute_force_over_sets_is_brute_force_over_orders() -> None:
    queue = [task(deadline, size) for deadline, size in ((3, 2), (4, 3), (5, 1), (9, 4), (6, 2))]
    assert most_on_time(queue, 0.0) == max(count_on_time(queue, o, 0.0) for o in permutations(range(5)))


def test_a_short_urgent_task_passes_a_long_one() -> None:
    queue = [task(100, 50), task(5, 2)]
    for order in ("window", "moore_hodgson"):
        assert order_prefills(queue, 0.0, OrderParameters(order=order)) == [1, 0]  # type: ignore[arg-type]
    assert order_prefills(queue, 0.0, OrderParameters(order="fcfs")) == [0, 1]
    assert order_window(queue, 0.0, 1, 8) == [0, 1]


def test_window_looks_no_further_and_moore_hodgson_at_the_whole_queue() -> None:
    queue = [task(200, 50), task(200, 50), task(200, 50), task(5, 2)]
    assert order_window(queue, 0.0, 3, 8)[0] == 0
    assert order_moore_hodgson(queue, 0.0)[0] == 3


def test_program_fcfs_goes_by_the_age_of_the_session() -> None:
    queue = [task(1, 1, arrival=5, session=5), task(1, 1, arrival=6, session=0), task(1, 1, arrival=7, session=0)]
    assert order_prefills(queue, 8.0, OrderParameters(order="program_fcfs")) == [1, 2, 0]


@given(st.integers(1, 6), st.integers(0, 5), st.lists(st.tuples(st.integers(0, 60), st.integers(1, 10)), min_size=60))
def test_window_passes_nobody_over_for_ever(
    start: int, max_postponements: int, arrivals: list[tuple[int, int]]
) -> None:
    """A task at index i is chosen after at most i + max_postponements others, however urgent later ones are."""
    order = PrefillOrder(OrderParameters(order="window", max_postponements=max_postponements))
    later = [task(d, size, number=i) for i, (d, size) in enumerate(arrivals)]
    queue, later = later[:start], later[start:]
    bound = {id(t): i + max_postponements for i, t in enumerate(queue)}
    now = 0.0
    for number_chosen, new in enumerate(later):
        index = order.order(queue, now)[0]
        assert number_chosen <= bound[id(queue[index])]
        order.note_started(queue, index)
        now += queue.pop(index).work_s
        bound[id(new)] = number_chosen + 1 + len(queue) + max_postponements
        queue.append(new)


@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from([0.1, 1.0, 4.0]),
    st.lists(st.tuples(st.floats(0.1, 60), st.floats(0.1, 3)), min_size=80, max_size=120),
)
def test_moore_hodgson_with_ageing_starves_nobody(
    start: int, aged_every: int, ageing: float, arrivals: list[tuple[float, float]]
) -> None:
    """A task with k older ones in the queue starts at most (k + 1) * aged_every turns after it has aged."""
    parameters = OrderParameters(order="moore_hodgson", ageing=ageing, aged_every=aged_every)
    order = PrefillOrder(parameters)
    now = 0.0
    fresh = iter([task(d, work_s, number=i) for i, (d, work_s) in enumerate(arrivals)])
    queue: list[WaitingPrefill] = []

    def arrive() -> None:
        new = next(fresh, None)
        if new is not None:
            new.arrival, new.ttft_deadline = now, now + new.ttft_deadline
            queue.append(new)

    for _ in range(start):
        arrive()
    allowed: dict[int, int] = {}
    while queue:
        for older, one in enumerate(queue):  # by arrival
            if has_aged(one, now, ageing):
                allowed.setdefault(id(one), (older + 1) * aged_every)
        index = order.order(queue, now)[0]
        order.note_started(queue, index)
        order.note_turn(queue[index])
        started = queue.pop(index)
        for one in queue:
            if id(one) in allowed:
                allowed[id(one)] -= 1
                assert allowed[id(one)] > 0, "it has aged and is still passed over"
        now += started.work_s
        arrive()


@given(
    st.integers(1, 6),
    st.integers(1, 20),
    st.lists(st.tuples(st.floats(0.1, 60), st.floats(0.01, 3)), min_size=80, max_size=120),
)
def test_where_tasks_run_whole_the_aged_wait_for_a_part_of_the_work(
    start: int, aged_every: int, arrivals: list[tuple[float, float]]
) -> None:
    """A task starts at most aged_every times (the work of those before it and of one more) after it has aged, and one
    task a turn: of two where one turn ends within a task."""
    order = PrefillOrder(OrderParameters(order="moore_hodgson", ageing=1.0, aged_every=aged_every))
    now, most_s = 0.0, 3.0
    fresh = iter([task(d, work_s, number=i) for i, (d, work_s) in enumerate(arrivals)])
    queue: list[WaitingPrefill] = []
    allowed_s: dict[int, float] = {}
    for number in range(len(arrivals)):
        for new in [next(fresh, None) for _ in range(start if number == 0 else 1)]:
            if new is not None:
                new.arrival, new.ttft_deadline = now, now + new.ttft_deadline
                queue.append(new)
        for place, one in enumerate(queue):
            if has_aged(one, now, 1.0):
                before_s = sum(older.work_s for older in queue[:place]) + most_s
                allowed_s.setdefault(id(one), aged_every * before_s + (place + 2) * most_s)
        first = queue[order.order(queue, now)[0]]
        order.note_turn(first, first.work_s)
        queue.remove(first)
        now += first.work_s
        for one in queue:
            if id(one) in allowed_s:
                allowed_s[id(one)] -= first.work_s
                assert allowed_s[id(one)] > 0.0, "it has aged and is still passed over"


def find_aged_turns(aged_work_s: list[float], fresh_work_s: float) -> list[int]:
    """Which turns go to aged tasks beside fresh ones without end, of which each could be on time."""
    order = PrefillOrder(OrderParameters(order="moore_hodgson", ageing=1.0, aged_every=5))
    aged = [task(-90.0, work_s, arrival=-100.0, number=number) for number, work_s in enumerate(aged_work_s)]
    now, turns = 0.0, []
    while aged:
        queue = [*aged, task(now + 1.05, fresh_work_s, arrival=now, number=100 + len(turns))]
        first = queue[order.order(queue, now)[0]]
        order.note_turn(first, first.work_s)
        turns.append(first in aged)
        if first in aged:
            aged.remove(first)
        now += first.work_s or 0.1
    return [place for place, is_aged in enumerate(turns) if is_aged]


def test_a_long_task_that_has_aged_is_paid_for_before_the_next() -> None:
    """One part in five of the time, not every fifth turn."""
    assert find_aged_turns([1.0] * 4, 0.1) == [0, 41, 82, 123]


def test_turns_count_as_one_while_nothing_is_measured() -> None:
    assert find_aged_turns([0.0] * 4, 0.0) == [0, 5, 10, 15]


def test_what_an_aged_task_owes_is_not_forgotten_with_a_shorter_one() -> None:
    """The second runs while nobody else waits."""
    order = PrefillOrder(OrderParameters(order="moore_hodgson", ageing=1.0, aged_every=5))
    aged = [task(-90.0, work_s, arrival=-100.0, number=number) for number, work_s in enumerate((1.0, 0.01, 1.0))]
    for alone in aged[:2]:
        assert order.order([alone], 0.0) == [0]
        order.note_turn(alone, alone.work_s)
    for number in range(2):
        queue = [aged[2], task(1.05, 0.1, number=9 + number)]
        assert order.order(queue, 0.0) == [1, 0]
        order.note_turn(queue[1], 0.1)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="window"):
        OrderParameters(window=9)
    for order in ("fcfs", "program_fcfs", "window", "moore_hodgson"):
        assert order_prefills([], 0.0, OrderParameters(order=order)) == []  # type: ignore[arg-type]
