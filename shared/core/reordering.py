"""Which waiting prefill runs next on a prefill worker (AMPD, arXiv 2602.14516, "prefill reordering").

The paper looks at the first w tasks of the queue, tries every order and takes the one with the most tasks that
meet their TTFT objective; a counter per task bounds how often it may be passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

from shared.core.types import RoundKey

PredictPrefill = Callable[[int, int], float]
"""(num_history_tokens, num_new_tokens) -> seconds of prefill."""

MAX_WINDOW = 8  # 8! = 40,320 orders: more would stall the worker that asks


@dataclass(slots=True)
class WaitingPrefill:
    """One task of a prefill queue. `ttft_deadline` is on the same monotonic clock as `now`."""

    key: RoundKey
    ttft_deadline: float
    num_history_tokens: int
    num_new_tokens: int
    num_postponements: int = 0


def choose_next_prefill(
    queue: Sequence[WaitingPrefill],
    now: float,
    predict_prefill_s: PredictPrefill,
    *,
    window: int = 3,
    max_postponements: int = 8,
) -> int:
    """Index in `queue` (in order of arrival) of the task to run next.

    Among the orders of the first `window` tasks, one with the most tasks finished by their deadline; of equals
    the one nearest to first come, first served. A task that has been passed over `max_postponements` times goes
    first. The caller tells what it did with `count_postponements`; then the task at index i is chosen after at
    most i + max_postponements others. Raises ValueError for an empty queue or a window outside [1, 8].
    """
    if not queue:
        raise ValueError("choose_next_prefill needs a queue that is not empty")
    if not 1 <= window <= MAX_WINDOW:
        raise ValueError(f"window must be in [1, {MAX_WINDOW}], got {window}")
    for index, task in enumerate(queue):
        if task.num_postponements >= max_postponements:
            return index
    candidates = queue[:window]
    slacks = [task.ttft_deadline - now for task in candidates]
    durations = [predict_prefill_s(task.num_history_tokens, task.num_new_tokens) for task in candidates]
    best_order: tuple[int, ...] = (0,)
    most_on_time = -1
    for order in permutations(range(len(candidates))):  # lexicographic: FCFS comes first and wins ties
        finish_s = 0.0
        num_on_time = 0
        for index in order:
            finish_s += durations[index]
            num_on_time += finish_s <= slacks[index]
        if num_on_time > most_on_time:
            best_order, most_on_time = order, num_on_time
            if num_on_time == len(candidates):
                break
    return best_order[0]


def choose_first_come(
    queue: Sequence[WaitingPrefill],
    now: float,
    predict_prefill_s: PredictPrefill,
) -> int:
    """First come, first served: the order without reordering, for the ablation."""
    if not queue:
        raise ValueError("choose_first_come needs a queue that is not empty")
    return 0


def count_postponements(queue: Sequence[WaitingPrefill], chosen: int) -> None:
    """Every task before the chosen one has been passed over once more."""
    for task in queue[:chosen]:
        task.num_postponements += 1
