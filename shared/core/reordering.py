"""In which order waiting prefills run on a worker.

    fcfs           first come, first served
    program_fcfs   by the arrival of the session, not of the round (Continuum, arXiv 2511.02230: program-level FCFS)
    window         the paper's (AMPD, arXiv 2602.14516): every order of the first w tasks is tried
    moore_hodgson  the most tasks on time over the whole queue (Moore 1968, "An n job, one machine sequencing
                   algorithm for minimizing the number of late jobs"), with ageing, so that none starves

Each is a pure function of the queue: `order_prefills` returns indices, the first of which runs next.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from shared.core.types import RoundKey

OrderName = Literal["fcfs", "program_fcfs", "window", "moore_hodgson"]
ROUNDING = 1e-9  # of costs that are added up and taken off again
MAX_WINDOW = 8  # 8! = 40,320 orders: more would stall the worker that asks


@dataclass(slots=True, eq=False)
class WaitingPrefill:
    """One prefill that waits. `ttft_deadline` and `arrival` are on the same monotonic clock as `now`.

    `work_s` is the predicted time that the worker spends on it, computed once when it arrives.
    """

    key: RoundKey
    arrival: float
    session_arrival: float
    ttft_deadline: float
    work_s: float
    num_postponements: int = 0


@dataclass(frozen=True, slots=True)
class OrderParameters:
    """`window` and `max_postponements` as in the paper. moore_hodgson: who has waited longer than `ageing` times its
    TTFT objective has aged. The oldest of these gets one part in `aged_every` of the turns, and of the KV room that
    others take one part in `aged_room` is put aside for it: enough that none starves, too little to make the others
    late."""

    order: OrderName = "window"
    window: int = 3
    max_postponements: int = 8
    ageing: float = 8.0
    aged_every: int = 20
    aged_room: int = 100

    def __post_init__(self) -> None:
        if not 1 <= self.window <= MAX_WINDOW:
            raise ValueError(f"window must be in [1, {MAX_WINDOW}], got {self.window}")
        for name, value in (("aged_every", self.aged_every), ("aged_room", self.aged_room)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def order_prefills(
    queue: Sequence[WaitingPrefill],
    now: float,
    parameters: OrderParameters,
    *,
    aged_turn: bool = True,
    stretch: float = 1.0,
) -> list[int]:
    """Indices of `queue` (in order of arrival) in the order in which they should run.

    `aged_turn`: whether a task that has aged may go first (see PrefillOrder). `stretch`: how much longer than `work_s`
    tasks take now, beside what else the worker does (moore_hodgson). Equal tasks keep their order.
    """
    match parameters.order:
        case "fcfs":
            return list(range(len(queue)))
        case "program_fcfs":
            return sorted(range(len(queue)), key=lambda index: (queue[index].session_arrival, index))
        case "window":
            return order_window(queue, now, parameters.window, parameters.max_postponements)
        case "moore_hodgson":
            order = order_moore_hodgson(queue, now, stretch)
            return lift_aged(order, queue, now, parameters.ageing) if aged_turn else order


def order_window(queue: Sequence[WaitingPrefill], now: float, window: int, max_postponements: int) -> list[int]:
    """The paper's reordering: of all orders of the first `window` tasks one with the most tasks finished by their
    deadline; of equals the one nearest to FCFS. A task passed over `max_postponements` times goes first: it is
    chosen after at most its index + max_postponements others."""
    rest = list(range(len(queue)))
    for index, task in enumerate(queue):
        if task.num_postponements >= max_postponements:
            rest.remove(index)
            return [index, *rest]
    candidates = range(min(window, len(queue)))
    slacks = [queue[index].ttft_deadline - now for index in candidates]
    best: tuple[int, ...] = tuple(candidates)
    most_on_time = -1
    for order in permutations(candidates):  # lexicographic: FCFS comes first and wins ties
        finish_s = 0.0
        num_on_time = 0
        for index in order:
            finish_s += queue[index].work_s
            num_on_time += finish_s <= slacks[index]
        if num_on_time > most_on_time:
            best, most_on_time = order, num_on_time
            if num_on_time == len(candidates):
                break
    return [*best, *rest[len(candidates) :]]


def order_moore_hodgson(queue: Sequence[WaitingPrefill], now: float, stretch: float = 1.0) -> list[int]:
    """The order with the most tasks finished by their deadline, O(n log n): tasks are taken by deadline; whenever one
    would finish late, the longest taken so far is put off. On-time tasks run by deadline, then the others by arrival:
    who is late anyway should at least not be overtaken by who came later."""
    deadlines = [task.ttft_deadline for task in queue]
    by_deadline = sorted(range(len(queue)), key=deadlines.__getitem__)
    longest: list[tuple[float, int]] = []
    finish = now
    late: set[int] = set()
    push, push_and_pop = heapq.heappush, heapq.heappushpop
    for index in by_deadline:
        work_s = queue[index].work_s * stretch
        finish += work_s
        if finish > deadlines[index]:
            negative_s, dropped = push_and_pop(longest, (-work_s, index))
            finish += negative_s
            late.add(dropped)
        else:
            push(longest, (-work_s, index))
    if not late:
        return by_deadline
    arrivals = [task.arrival for task in queue]
    put_off = sorted(sorted(late), key=arrivals.__getitem__)
    return [index for index in by_deadline if index not in late] + put_off


def find_oldest_aged(queue: Sequence[WaitingPrefill], now: float, ageing: float) -> int | None:
    """Index of the one that came first of those that have aged; None when none has."""
    aged = (index for index, task in enumerate(queue) if has_aged(task, now, ageing))
    return min(aged, key=lambda index: queue[index].arrival, default=None)


def lift_aged(order: list[int], queue: Sequence[WaitingPrefill], now: float, ageing: float) -> list[int]:
    """`order` with the one that came first of those that have aged in front."""
    oldest = find_oldest_aged(queue, now, ageing)
    if oldest is None or order[0] == oldest:
        return order
    return [oldest, *(index for index in order if index != oldest)]


def has_aged(task: WaitingPrefill, now: float, ageing: float) -> bool:
    """It has waited `ageing` times as long as its objective allowed."""
    return now - task.arrival > ageing * max(0.0, task.ttft_deadline - task.arrival)


class AgedRoom:
    """What is put aside in one KV pool for the aged tasks of the queues that take from it."""

    def __init__(self) -> None:
        self.orders: list[PrefillOrder] = []

    def leave(self, order: PrefillOrder) -> None:
        self.orders.remove(order)


class PrefillOrder:
    """The order of one worker's queue over time: counts who was passed over, and gives the aged their share.

    A turn is one step of the worker, or one task where they are taken whole, and then it costs the task's work:
    that of a long prompt takes as long as those of fifty short ones. After a turn of the oldest task that has aged
    the others get aged_every - 1 times what it cost before its next. So one that has aged starts after at most
    aged_every times the turns that the older ones in the queue need, and the aged one that ran last; and one more
    turn for each of them, since a turn ends with its task. Where it lacks KV room it holds nobody up, but with
    every task that begins some room is put aside for it: when the others have taken `aged_room` times what it
    needs, that much is free. Queues that take from one pool share `room`.
    """

    def __init__(self, parameters: OrderParameters, room: AgedRoom | None = None) -> None:
        self.parameters = parameters
        self._room = room if room is not None else AgedRoom()
        self._room.orders.append(self)
        self._owed = 0.0  # turns to the others, before the oldest aged task has its next
        self._oldest_aged: WaitingPrefill | None = None
        self._num_lacking = 0  # KV tokens that it last found missing, ...
        self._num_aside = 0.0  # ... and of them put aside

    @property
    def by_deadline(self) -> bool:
        return self.parameters.order == "moore_hodgson"

    def order(self, queue: Sequence[WaitingPrefill], now: float, stretch: float = 1.0) -> list[int]:
        if not self.by_deadline:
            return order_prefills(queue, now, self.parameters)
        index = find_oldest_aged(queue, now, self.parameters.ageing)
        oldest = queue[index] if index is not None else None
        if oldest is not self._oldest_aged:
            self._oldest_aged = oldest
            self._forget_room()
        aged_turn = self._owed <= ROUNDING
        return order_prefills(queue, now, self.parameters, aged_turn=aged_turn, stretch=stretch)

    def is_oldest_aged(self, task: WaitingPrefill) -> bool:
        """Of the queue last ordered. It keeps the KV room it has, and takes none from who would be on time."""
        return task is self._oldest_aged

    def count_aside(self, task: WaitingPrefill) -> int:
        """KV tokens that must be left free when `task` begins."""
        return sum(order.count_claimed() for order in self._room.orders if order._oldest_aged is not task)

    def count_claimed(self) -> int:
        """KV tokens put aside for this queue's oldest aged task."""
        return int(min(self._num_aside, self._num_lacking))

    def may_be_passed(self, task: WaitingPrefill, num_lacking: int) -> bool:
        """There is no room for the `num_lacking` KV tokens of `task`: whether those behind it may begin. Served in
        order of arrival never, by deadline always."""
        if task is self._oldest_aged:
            self._num_lacking = max(0, num_lacking)
        return self.by_deadline

    def note_begun(self, task: WaitingPrefill, num_tokens: int) -> None:
        """`task` has begun and takes room for so many KV tokens."""
        for order in self._room.orders:
            if order._oldest_aged is task:
                order._forget_room()
            elif order._oldest_aged is not None:
                order._num_aside += max(0, num_tokens) / order.parameters.aged_room

    def forget(self, task: WaitingPrefill | None) -> None:
        """`task` has left the queue, whatever became of it."""
        if task is not None and task is self._oldest_aged:
            self._oldest_aged = None
            self._forget_room()

    def note_started(self, queue: Sequence[WaitingPrefill], index: int) -> None:
        """The task at `index` of `queue` starts: those before it have been passed over."""
        for task in queue[:index]:
            task.num_postponements += 1

    def note_turn(self, first: WaitingPrefill, cost: float = 1.0) -> None:
        """A turn goes to `first`. cost: 1 of a step, work_s of a task that runs whole; where that is 0 (nothing
        measured yet) a turn counts as one."""
        cost = cost or 1.0
        if first is self._oldest_aged:
            self._owed = max(self._owed, (self.parameters.aged_every - 1) * cost)
        else:
            self._owed = max(0.0, self._owed - cost)

    def _forget_room(self) -> None:
        self._num_lacking, self._num_aside = 0, 0.0
