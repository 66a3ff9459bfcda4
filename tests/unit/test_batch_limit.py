"""Which rounds decode when all of them would be too slow."""

from __future__ import annotations

from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from shared.core.batch_limit import ALL_SHARE, BATCH_SHARE, MIN_ON_SCHEDULE, Decoding, choose_batch, may_all_decode
from shared.core.step_costs import StepCosts
from shared.profile_files import load_profile

COSTS = StepCosts.from_profile(load_profile("h100-qwen3-32b"), 2)
CONTEXT = 2_000.0
NOW = 100.0
ITL_S = 0.04


def decoding(slack_tokens: float, *, produced: int = 50, itl_slo_s: float = ITL_S) -> Decoding:
    """So many tokens ahead of its objective."""
    return Decoding(NOW - (produced - slack_tokens) * itl_slo_s, produced, itl_slo_s)


def choose(rounds: list[Decoding]) -> list[int]:
    return choose_batch(COSTS, rounds, CONTEXT, NOW)


def count_fitting() -> int:
    return next(n for n in range(1, 10_000) if COSTS.decode_step_s(n + 1, CONTEXT) > BATCH_SHARE * ITL_S)


def test_all_decode_while_a_step_keeps_to_the_objective() -> None:
    num = count_fitting()
    assert COSTS.decode_step_s(num, CONTEXT) <= BATCH_SHARE * ITL_S < COSTS.decode_step_s(num + 1, CONTEXT)
    assert sorted(choose([decoding(1.0)] * num)) == list(range(num))


def test_all_may_decode_a_little_beyond_what_a_limited_batch_takes() -> None:
    """Else the last few per cent of the objective would be nobody's."""
    most = next(n for n in range(1, 10_000) if not may_all_decode(COSTS, n + 1, CONTEXT, ITL_S))
    assert COSTS.decode_step_s(most, CONTEXT) <= ALL_SHARE * ITL_S < COSTS.decode_step_s(most + 1, CONTEXT)
    assert most > count_fitting()


def test_those_with_the_most_slack_wait() -> None:
    num = count_fitting()
    rounds = [decoding(1.0 + index) for index in range(num + 7)]
    assert choose(rounds) == list(range(num))
    assert choose(rounds[::-1]) == list(range(num + 6, 6, -1))


def test_who_is_behind_goes_last_but_for_the_oldest() -> None:
    num = count_fitting()
    late = [decoding(-1.0 - index) for index in range(5)]
    chosen = choose([*late, *(decoding(1.0) for _ in range(num))])
    assert set(chosen) == {4, *range(5, 5 + num - 1)}, "the oldest has waited longest for its tokens"
    chosen = choose([*late, *(decoding(1.0) for _ in range(num - 3))])
    assert set(chosen) == {4, 3, 2, *range(5, num + 2)}, "the others by age, as far as there is room"


def test_where_too_few_are_on_schedule_nobody_is_protected() -> None:
    num = 10 * (count_fitting() // 5)
    num_protected = ceil(MIN_ON_SCHEDULE * num)
    for num_on_schedule, num_decoding in ((num_protected - 1, num), (num_protected, count_fitting())):
        rounds = [*[decoding(-1.0)] * (num - num_on_schedule), *[decoding(1.0)] * num_on_schedule]
        assert len(choose(rounds)) == num_decoding


def test_places_keep_their_order_where_too_few_are_on_schedule() -> None:
    """A worker with fewer places takes the first of them: the oldest that is behind, then who is on schedule."""
    chosen = choose([decoding(-1.0), decoding(-3.0), decoding(-2.0), decoding(2.0)])
    assert chosen == [1, 3, 2, 0]


def test_an_objective_that_nobody_could_meet_limits_nobody() -> None:
    hopeless = [decoding(1.0, itl_slo_s=1e-4)] * 100
    assert len(choose(hopeless)) == 100
    assert len(choose([*hopeless, decoding(1.0)])) == 101


def test_the_tightest_objective_that_can_be_met_counts() -> None:
    loose = [decoding(1.0, itl_slo_s=10.0)] * (count_fitting() + 20)
    assert len(choose(loose)) == len(loose)
    assert len(choose([*loose, decoding(1.0)])) == count_fitting()


@given(st.lists(st.floats(-100.0, 100.0), min_size=1, max_size=400))
def test_as_many_decode_as_fit_and_each_once(slacks: list[float]) -> None:
    rounds = [decoding(slack, produced=200) for slack in slacks]
    chosen = choose(rounds)
    assert len(set(chosen)) == len(chosen) >= 1
    protected = [index for index, one in enumerate(rounds) if not one.is_behind(NOW)]
    expected = min(len(rounds), count_fitting()) if 2 * len(protected) >= len(rounds) else len(rounds)
    assert len(chosen) == expected
    late = [index for index, one in enumerate(rounds) if one.is_behind(NOW)]
    if late:
        assert min(late, key=lambda index: rounds[index].first_token_at) in chosen


def test_a_single_round_always_decodes() -> None:
    assert choose([decoding(1.0)]) == [0]
    assert choose_batch(COSTS, [decoding(1.0)], 1e9, NOW) == [0]


def serve(load: float, num_rounds: int, num_tokens: int = 80) -> tuple[float, int]:
    """(share of the rounds on time, most at once) of rounds that arrive at `load` times what the limit lets through."""
    num_fitting = count_fitting()
    arrivals_per_s = load * num_fitting / (num_tokens * COSTS.decode_step_s(num_fitting, CONTEXT))
    running: list[tuple[float, int]] = []  # first token at, produced
    now, num_arrived, num_ended, num_on_time, most = 0.0, 0, 0, 0, 0
    while num_ended < num_rounds:
        while num_arrived < min(num_rounds, now * arrivals_per_s):
            running.append((now, 1))
            num_arrived += 1
        if not running:
            now += 1.0 / arrivals_per_s
            continue
        most = max(most, len(running))
        chosen = set(choose_batch(COSTS, [Decoding(at, done, ITL_S) for at, done in running], CONTEXT, now))
        now += COSTS.decode_step_s(len(chosen), CONTEXT)
        running = [(at, done + (index in chosen)) for index, (at, done) in enumerate(running)]
        ended = [Decoding(at, done, ITL_S) for at, done in running if done == num_tokens]
        running = [(at, done) for at, done in running if done < num_tokens]
        num_ended += len(ended)
        num_on_time += sum(one.slack_s(now) >= 0.0 for one in ended)
    return num_on_time / num_rounds, most


def test_when_there_are_too_many_for_a_while_a_few_miss_and_not_all_by_a_little() -> None:
    share, _ = serve(1.1, 5 * count_fitting())
    assert share > 0.8


def test_those_behind_do_not_pile_up() -> None:
    """Served by what the others leave, they would be four times as many as fit in the end."""
    _, most = serve(1.2, 10 * count_fitting())
    assert most < 3 * count_fitting()
