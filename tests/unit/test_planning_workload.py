"""The workload model: how a trace's rounds become shapes, what is told of them, and how bursts are measured."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from planning_samples import make_session, make_workload

from loadgen.plan import PlannedRound, PlannedSession
from planner.planning.workload_model import (
    MAX_SESSIONS,
    RoundShape,
    WorkloadModel,
    describe_values,
    measure_burstiness,
    model_sessions,
)
from planner.simulator.scenario import choose_warm_up_s
from shared.errors import AmpdError, ErrorCode
from shared.messages import Slo


def planned(index: int, *rounds: tuple[int, int, float]) -> PlannedSession:
    """Rounds of (input tokens, output tokens, delay in seconds)."""
    return PlannedSession(index, f"s{index}", float(index), tuple(PlannedRound(*one) for one in rounds))


def test_a_round_has_all_before_it_as_its_history() -> None:
    model = model_sessions([planned(0, (100, 10, 0.0), (20, 5, 1.5), (7, 3, 2.0)), planned(1, (50, 1, 0.0))], 2.0)
    assert model.sessions == (
        (RoundShape(0, 100, 10, 0.0), RoundShape(110, 20, 5, 1.5), RoundShape(135, 7, 3, 2.0)),
        (RoundShape(0, 50, 1, 0.0),),
    )
    third = model.sessions[0][2]
    assert (third.num_prompt_tokens, third.num_total_tokens) == (142, 145)
    assert (model.num_rounds, model.longest_context, model.sessions_per_s) == (4, 145, 2.0)


def test_rounds_keep_together_what_belongs_together() -> None:
    """Long sessions with long contexts: means of each alone would lose that."""
    sessions = [planned(index, (10, 1, 0.0)) if index % 2 else planned(index, (4_000, 100, 0.0)) for index in range(10)]
    model = model_sessions(sessions, 1.0)
    assert {(one.num_input_tokens, one.num_output_tokens) for session in model.sessions for one in session} == {
        (10, 1),
        (4_000, 100),
    }


@pytest.mark.parametrize(
    ("num_sessions", "kept"),
    [(1, 1), (MAX_SESSIONS, MAX_SESSIONS), (MAX_SESSIONS + 1, 1_001), (3 * MAX_SESSIONS, MAX_SESSIONS)],
)
def test_a_large_trace_is_sampled_at_equal_distances(num_sessions: int, kept: int) -> None:
    model = model_sessions([planned(index, (index + 1, 1, 0.0)) for index in range(num_sessions)], 1.0)
    inputs = [session[0].num_input_tokens for session in model.sessions]
    assert len(inputs) == kept <= MAX_SESSIONS
    assert len({later - earlier for earlier, later in pairwise(inputs)}) <= 1
    assert inputs[0] == 1


def test_distributions_are_told_and_not_only_means() -> None:
    sessions = [make_session((100, 10, 0.0), (20 + index, 30, 2.0 * index)) for index in range(10)]
    told = make_workload(*sessions, make_session((1_000, 10, 0.0)), rate=3.0, burstiness=2.5).describe()
    assert (told["sessions"], told["sessions_per_s"], told["burstiness"]) == (11, 3.0, 2.5)
    assert told["rounds_per_session"] == {"mean": pytest.approx(21 / 11), "p50": 2.0, "p90": 2.0, "p99": 2.0}
    assert told["first_input_tokens"]["mean"] == pytest.approx(2_000 / 11)
    assert (told["first_input_tokens"]["p50"], told["first_input_tokens"]["p99"]) == (100.0, 1_000.0)
    assert told["incremental_input_tokens"] == {"mean": 24.5, "p50": 25.0, "p90": 29.0, "p99": 29.0}
    assert told["tool_gap_s"] == {"mean": 9.0, "p50": 10.0, "p90": 18.0, "p99": 18.0}
    assert told["output_tokens"]["mean"] == pytest.approx((11 * 10 + 10 * 30) / 21)
    assert told["prompt_tokens"]["p99"] == 1_000.0
    assert told["prompt_tokens"]["p50"] == 130.0, "with their history"


def test_sessions_of_one_round_have_no_gaps() -> None:
    told = make_workload(make_session((5, 5, 0.0))).describe()
    assert told["tool_gap_s"] == told["incremental_input_tokens"] == {"mean": 0.0, "p50": 0.0, "p90": 0.0, "p99": 0.0}
    assert describe_values([3, 1, 2]) == {"mean": 2.0, "p50": 2.0, "p90": 3.0, "p99": 3.0}


# -------------------------------------------------------------------------------------- burstiness


def test_burstiness_is_the_squared_coefficient_of_variation() -> None:
    even = [0.5 * index for index in range(50)]
    assert measure_burstiness(even) == pytest.approx(0.0)
    pairs = [float(index // 2) for index in range(41)]  # gaps 0 and 1 in turns: mean 1/2, variance 1/4
    assert measure_burstiness(pairs) == pytest.approx(1.0)
    draws = random.Random(3)
    poisson, now = [], 0.0
    for _ in range(4_000):
        now += draws.expovariate(7.0)
        poisson.append(now)
    assert measure_burstiness(poisson) == pytest.approx(1.0, abs=0.1)
    bursts = [10.0 * (index // 10) + 0.01 * (index % 10) for index in range(500)]
    assert measure_burstiness(bursts) > 5.0


def test_burstiness_does_not_depend_on_the_unit_of_time() -> None:
    arrivals = [float(index * index) for index in range(20)]
    assert measure_burstiness([1_000.0 * one for one in arrivals]) == pytest.approx(measure_burstiness(arrivals))


@pytest.mark.parametrize("arrivals", [[], [1.0], [1.0, 2.0, 9.0], [4.0] * 30])
def test_few_arrivals_or_none_apart_count_as_poisson(arrivals: list[float]) -> None:
    assert measure_burstiness(arrivals) == 1.0


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sessions": ()}, "no session"),
        ({"sessions": ((),)}, "without a round"),
        ({"sessions_per_s": 0.0}, "sessions_per_s must be a positive number, got 0.0"),
        ({"sessions_per_s": -2.0}, "got -2.0"),
        ({"sessions_per_s": float("inf")}, "got inf"),
        ({"sessions_per_s": float("nan")}, "got nan"),
        ({"burstiness": -1.0}, "burstiness must be a number of at least 0, got -1.0"),
        ({"burstiness": float("nan")}, "got nan"),
    ],
)
def test_a_workload_that_says_nothing_is_refused(fields: dict[str, object], named: str) -> None:
    good: dict[str, object] = {"sessions": (make_session((5, 5, 0.0)),), "sessions_per_s": 1.0}
    with pytest.raises(AmpdError, match=named) as caught:
        WorkloadModel(**{**good, **fields})  # type: ignore[arg-type]
    assert caught.value.code is ErrorCode.INVALID_REQUEST


# ---------------------------------------------------------------------------------------- warm-up


def test_a_run_warms_up_for_as_long_as_nine_sessions_of_ten_take() -> None:
    """A session of 10 tokens in 0.1 s each and a gap of 3 s takes 4 s; one in ten takes a hundred times as long."""
    slo = Slo(ttft_s=1.0, itl_s=0.1)
    short = [planned(index, (50, 4, 0.0), (50, 6, 3.0)) for index in range(18)]
    long = [planned(18 + index, (50, 10, 0.0), (50, 10, 400.0)) for index in range(2)]
    assert choose_warm_up_s(short, slo) == 4.0
    assert choose_warm_up_s([*long, *short], slo) == 402.0, "the 90th percentile of 20 is the 19th"
    assert choose_warm_up_s([*long[:1], *short], slo) == 4.0, "one of 19 is beyond it"
    assert choose_warm_up_s(short[:1], slo) == 4.0
    assert choose_warm_up_s(short, Slo(ttft_s=1.0, itl_s=0.2)) == 5.0
    assert choose_warm_up_s([planned(0, (9, 3, 0.0))], slo) == 1.0, "whole seconds, rounded up"
