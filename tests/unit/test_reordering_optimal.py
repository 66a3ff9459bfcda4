"""Orders of a prefill queue against brute force over all permutations, and the bound within which ageing starts a task.

Queues come from a seeded generator with small whole numbers, so that ties, tasks without work and deadlines that have
passed are frequent, and sums are exact. A failure names the seed of its queue.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import permutations

import pytest

from shared.core.reordering import (
    OrderName,
    OrderParameters,
    PrefillOrder,
    WaitingPrefill,
    has_aged,
    lift_aged,
    order_moore_hodgson,
    order_window,
)
from shared.core.types import RoundKey

NOW = 100.0


def task(deadline_s: float, work_s: float, *, arrival: float = 0.0, number: int = 0) -> WaitingPrefill:
    """A task due `deadline_s` after NOW."""
    return WaitingPrefill(RoundKey("t", f"s{number}", 0, 1), arrival, 0.0, NOW + deadline_s, work_s)


def draw_queue(seed: int, max_length: int) -> list[WaitingPrefill]:
    draws = random.Random(seed)
    longest = draws.choice((2, 5, 20))
    latest = draws.choice((3, 10, 60))
    return [
        task(draws.randint(-5, latest), draws.randint(0, longest), arrival=draws.randint(0, 3), number=number)
        for number in range(draws.randint(1, max_length))
    ]


def count_on_time(queue: Sequence[WaitingPrefill], order: Sequence[int]) -> int:
    finish, num_on_time = NOW, 0
    for index in order:
        finish += queue[index].work_s
        num_on_time += finish <= queue[index].ttft_deadline
    return num_on_time


def most_on_time(queue: Sequence[WaitingPrefill]) -> int:
    """Over all permutations: by the set of tasks that have run, whose total work does not depend on their order."""
    everything = (1 << len(queue)) - 1

    @cache
    def best_after(done: int) -> int:
        if done == everything:
            return 0
        start = NOW + sum(one.work_s for index, one in enumerate(queue) if done >> index & 1)
        return max(
            (start + one.work_s <= one.ttft_deadline) + best_after(done | 1 << index)
            for index, one in enumerate(queue)
            if not done >> index & 1
        )

    return best_after(0)


# --------------------------------------------------------------------------- Moore-Hodgson


@pytest.mark.parametrize("seed", range(300))
def test_the_reference_is_the_best_of_all_permutations(seed: int) -> None:
    queue = draw_queue(seed, 5)
    assert most_on_time(queue) == max(count_on_time(queue, order) for order in permutations(range(len(queue))))


@pytest.mark.parametrize("block", range(10))
def test_moore_hodgson_equals_brute_force_on_queues_of_up_to_8(block: int) -> None:
    for seed in range(block * 400, block * 400 + 400):
        queue = draw_queue(seed, 8)
        order = order_moore_hodgson(queue, NOW)
        assert sorted(order) == list(range(len(queue))), f"seed {seed}"
        assert count_on_time(queue, order) == most_on_time(queue), f"seed {seed}"


def test_on_time_tasks_come_first_by_deadline_and_the_others_by_arrival() -> None:
    for seed in range(2_000):
        queue = draw_queue(seed, 8)
        order = order_moore_hodgson(queue, NOW)
        num_on_time = most_on_time(queue)
        first, rest = order[:num_on_time], order[num_on_time:]
        assert count_on_time(queue, first) == num_on_time, f"seed {seed}: the first {num_on_time} are all on time"
        deadlines = [queue[index].ttft_deadline for index in first]
        assert deadlines == sorted(deadlines), f"seed {seed}"
        assert rest == sorted(rest, key=lambda index: (queue[index].arrival, index)), f"seed {seed}"


def test_what_cannot_be_on_time_gives_way_and_what_takes_no_time_never_does() -> None:
    assert order_moore_hodgson([task(-1, 1), task(5, 5)], NOW) == [1, 0]
    assert order_moore_hodgson([task(9, 10), task(5, 0), task(4, 4)], NOW) == [2, 1, 0]
    assert order_moore_hodgson([task(1, 1), task(1, 1), task(1, 1)], NOW)[0] in (0, 1, 2)
    assert order_moore_hodgson([], NOW) == []


# ------------------------------------------------------------------------- the paper's window


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_window_is_the_first_best_permutation_of_the_first_tasks(window: int) -> None:
    for seed in range(300):
        queue = draw_queue(seed, 7)
        order = order_window(queue, NOW, window, 8)
        width = min(window, len(queue))
        orders = list(permutations(range(width)))
        best = max(count_on_time(queue, one) for one in orders)
        expected = next(one for one in orders if count_on_time(queue, one) == best)
        assert order == [*expected, *range(width, len(queue))], f"seed {seed}"


@pytest.mark.parametrize("max_postponements", [0, 1, 3])
def test_window_starts_a_task_after_at_most_its_place_and_the_postponements(max_postponements: int) -> None:
    """The paper's bound, against a stream of short tasks that are always urgent."""
    started_after = _start_against_a_stream(
        OrderParameters(order="window", window=3, max_postponements=max_postponements), num_older=0
    )
    assert started_after == max_postponements
    unbounded = OrderParameters(order="window", window=3, max_postponements=10**9)
    assert _start_against_a_stream(unbounded, num_older=0) is None


# ------------------------------------------------------------------------------------ ageing


@pytest.mark.parametrize("num_older", [0, 1, 2, 5])
@pytest.mark.parametrize("aged_every", [1, 2, 3, 8])
def test_with_ageing_a_task_starts_within_the_bound_against_an_endless_stream(num_older: int, aged_every: int) -> None:
    """PrefillOrder's bound: at most (k + 1) * aged_every turns once it has aged, where tasks run whole."""
    started_after = _start_against_a_stream(
        OrderParameters(order="moore_hodgson", ageing=2.0, aged_every=aged_every), num_older=num_older
    )
    assert started_after is not None
    assert started_after <= (num_older + 1) * aged_every


def test_without_ageing_the_same_stream_starves_it() -> None:
    never = OrderParameters(order="moore_hodgson", ageing=float("inf"))
    assert _start_against_a_stream(never, num_older=0) is None


def test_a_task_that_needs_several_turns_starts_within_the_bound_and_the_turns_of_the_older() -> None:
    """Each of the two older ones needs 3 turns (chunks) of its own."""
    parameters = OrderParameters(order="moore_hodgson", ageing=2.0, aged_every=4)
    started_after = _start_against_a_stream(parameters, num_older=2, turns_of_older=3)
    assert started_after is not None
    assert 3 * 4 < started_after <= (2 * 3 + 1) * 4


def _start_against_a_stream(
    parameters: OrderParameters, *, num_older: int, turns_of_older: int = 1, max_turns: int = 400
) -> int | None:
    """Turns that others had, after the last of the first tasks had aged (window: from the beginning), before it had
    its first. Every turn of 0.3 s brings a short task that is due just when it would be done. None: it had none."""
    order = PrefillOrder(parameters)
    now = NOW
    queue = [task(1, 5.0, arrival=NOW, number=number) for number in range(num_older + 1)]
    ours = queue[-1]
    turns_left = {one.key: turns_of_older for one in queue}
    num_turns = 0
    for number in range(max_turns):
        urgent = task(0, 0.3, arrival=now, number=100 + number)
        urgent.ttft_deadline = now + 0.31
        queue.append(urgent)
        index = order.order(queue, now)[0]
        chosen = queue[index]
        if chosen is ours:
            return num_turns
        if parameters.order == "window" or has_aged(ours, now, parameters.ageing):
            num_turns += 1
        order.note_turn(chosen)
        turns_left[chosen.key] = turns_left.get(chosen.key, 1) - 1
        if turns_left[chosen.key] == 0:
            order.note_started(queue, index)
            queue.pop(index)
        now += 0.3
    return None


@pytest.mark.parametrize("aged_every", [1, 4])
def test_an_older_task_with_a_longer_objective_does_not_keep_an_aged_one_waiting(aged_every: int) -> None:
    """What has been in the queue longest is due in an hour and takes long; ours, of a second, aged long ago."""
    order = PrefillOrder(OrderParameters(order="moore_hodgson", ageing=4.0, aged_every=aged_every))
    patient = task(3_600, 4_000, arrival=NOW - 60)
    ours = task(-49, 5, arrival=NOW - 50, number=1)
    chosen = []
    for number in range(aged_every):
        queue = [patient, ours, task(1.1, 1, arrival=NOW, number=2 + number)]
        chosen.append(queue[order.order(queue, NOW)[0]])
        order.note_turn(chosen[-1])
    assert ours in chosen


def test_the_oldest_goes_first_only_once_it_has_aged() -> None:
    """Waited for 30 s, of an objective of 10 s."""
    queue = [task(50, 1, arrival=90.0), task(-20, 1, arrival=70.0), task(1, 1, arrival=95.0)]
    assert lift_aged([2, 1, 0], queue, NOW, 3.0) == [2, 1, 0], "3 times are not more than 3 times"
    assert lift_aged([2, 1, 0], queue, NOW, 2.9) == [1, 2, 0]
    assert lift_aged([], [], NOW, 1.0) == []


def test_room_is_put_aside_for_the_oldest_aged_task_alone() -> None:
    order = PrefillOrder(OrderParameters(order="moore_hodgson", ageing=4.0, aged_every=20, aged_room=10))
    aged, second = task(-49, 5, arrival=NOW - 50), task(-39, 5, arrival=NOW - 40, number=1)
    fresh = task(5, 1, arrival=NOW, number=2)
    order.note_begun(fresh, 1_000)
    order.order([aged, second, fresh], NOW)
    assert order.is_oldest_aged(aged)
    assert not order.is_oldest_aged(second)
    assert order.count_aside(fresh) == 0, "what began before it had aged puts nothing aside"
    assert order.may_be_passed(aged, 150)
    assert order.may_be_passed(second, 9_000)
    order.note_begun(fresh, 1_000)
    assert [order.count_aside(one) for one in (aged, second, fresh)] == [0, 100, 100]
    order.note_begun(second, 1_000)
    assert order.count_aside(fresh) == 150, "no more than it lacks"
    order.note_begun(aged, 150)
    assert order.count_aside(fresh) == 0
    order.may_be_passed(aged, 150)
    order.note_begun(fresh, 1_000)
    order.order([second, fresh], NOW)
    assert order.count_aside(fresh) == 0, "it has gone: the next begins with nothing"


@pytest.mark.parametrize("name", ["fcfs", "window"])
def test_in_order_of_arrival_nobody_passes_who_lacks_room(name: OrderName) -> None:
    order = PrefillOrder(OrderParameters(order=name))
    aged, fresh = task(-49, 5, arrival=NOW - 50), task(5, 1, arrival=NOW, number=1)
    order.order([aged, fresh], NOW)
    assert not order.may_be_passed(aged, 100)
    order.note_begun(fresh, 1_000_000)
    assert order.count_aside(fresh) == 0
