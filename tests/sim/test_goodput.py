"""The search for goodput, and what counts as offered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from loadgen.plan import PlannedRound, PlannedSession
from planner.simulator.goodput import find_goodput
from planner.simulator.outcome import summarise
from planner.simulator.rounds import SimRound, SimSession
from planner.simulator.scenario import Scenario
from planner.simulator.simulation import Result
from shared.messages import Slo

SLO = Slo(ttft_s=1.0, itl_s=0.1)


@dataclass(frozen=True)
class FakeOutcome:
    attainment: float


@dataclass
class FakeScenario:
    """Attains up to a rate, and not beyond it."""

    limit: float
    rates: list[float] = field(default_factory=list)

    def run(self, rate: float, seed: int, *, needed_share: float | None = None) -> tuple[Any, Any]:
        self.rates.append(rate)
        return FakeOutcome(0.95 if rate <= self.limit else 0.5), None


@pytest.mark.parametrize("limit", [0.02, 0.3, 1.0, 7.3, 900.0])
@pytest.mark.parametrize("start", [0.05, 1.0, 40.0])
def test_goodput_is_found_to_the_tolerance_from_anywhere(limit: float, start: float) -> None:
    scenario = FakeScenario(limit)
    found = find_goodput(cast(Scenario, scenario), start=start, lowest=0.001, tolerance=0.03, growth=2.0)
    assert limit / 1.03 <= found.rate <= limit
    assert found.num_runs == len(scenario.rates) <= 40
    assert found.outcome is not None


def test_a_scenario_that_never_attains_has_no_goodput() -> None:
    scenario = FakeScenario(0.0)
    found = find_goodput(cast(Scenario, scenario), start=1.0, lowest=0.1)
    assert (found.rate, found.outcome) == (0.0, None)
    assert min(scenario.rates) >= 0.1


def make_session(num_rounds: int) -> SimSession:
    rounds = tuple(PlannedRound(input_tokens=100, output_tokens=11, delay_s=2.0) for _ in range(num_rounds))
    return SimSession(PlannedSession(index=0, session_id="a", arrival_s=0.0, rounds=rounds))


def make_round(session: SimSession, index: int, sent_at: float, *, ttft_s: float | None) -> SimRound:
    round_ = SimRound(session, index, session.planned.rounds[index], sent_at, sent_at + 1.0, cast(Any, None))
    if ttft_s is not None:
        round_.first_token_at = sent_at + ttft_s
        round_.finished_at = round_.first_token_at + 1.0
        round_.gaps = [(10, 0.1)]
    return round_


def make_result(rounds: list[SimRound], unfinished: list[SimRound], *, end_s: float = 100.0) -> Result:
    return Result(
        rounds=rounds,
        num_offered=0,
        end_s=end_s,
        was_stopped=False,
        kv_bytes_moved=0,
        num_evicted_tokens=0,
        num_preemptions=0,
        unfinished=unfinished,
    )


def test_rounds_that_a_stuck_session_owes_count_as_offered() -> None:
    """A round waits since second 3. Had it, and those after it, just met their objectives (1 s to the first token, 1 s
    for ten more, 2 s of tool), they would have been sent at 7, 11, 15 and 19: by second 16, four are owed."""
    session = make_session(6)
    finished = make_round(session, 0, 0.0, ttft_s=0.5)
    stuck = make_round(session, 1, 3.0, ttft_s=None)
    outcome = summarise(make_result([finished], [stuck]), SLO, until_s=16.0)
    assert outcome.num_rounds == 1 + 4
    assert outcome.attainment == pytest.approx(1 / 5)
    assert outcome.session_attainment == 0.0


def test_a_round_that_may_still_be_on_time_is_not_owed() -> None:
    session = make_session(3)
    finished = make_round(session, 0, 0.0, ttft_s=0.5)
    young = make_round(session, 1, 15.5, ttft_s=None)
    outcome = summarise(make_result([finished], [young], end_s=16.0), SLO, until_s=16.0)
    assert outcome.num_rounds == 1
    assert outcome.attainment == 1.0
    assert outcome.session_attainment == 1.0


@pytest.mark.parametrize(
    ("sent_at", "ttft_s", "attained"),
    [(16.5, None, 1.0), (15.5, 0.8, 1.0), (15.5, 1.2, 0.0), (15.5, None, 0.0), (15.5, 0.2, 0.0)],
    ids=["may be on time", "decodes on time", "first token late", "first token overdue", "decodes too slowly"],
)
def test_a_round_in_flight_counts_against_its_session_once_it_is_late(
    sent_at: float, ttft_s: float | None, attained: float
) -> None:
    session = make_session(3)
    finished = make_round(session, 0, 0.0, ttft_s=0.5)
    in_flight = make_round(session, 1, sent_at, ttft_s=ttft_s)
    in_flight.finished_at = -1.0
    result = make_result([finished], [in_flight], end_s=17.0)
    assert summarise(result, SLO, until_s=17.0 - SLO.ttft_s + 1.0).session_attainment == attained


def test_everything_after_a_failed_round_counts_against_attainment() -> None:
    session = make_session(4)
    first = make_round(session, 0, 0.0, ttft_s=0.5)
    failed = make_round(session, 1, 5.0, ttft_s=None)
    failed.error = "overloaded"
    outcome = summarise(make_result([first, failed], []), SLO)
    assert outcome.num_rounds == 4
    assert outcome.attainment == pytest.approx(0.25)


def test_a_round_that_got_no_token_has_waited_to_the_end_of_the_run() -> None:
    """Who starves belongs into the tail of the TTFTs, and nobody starves unseen by never completing."""
    session = make_session(3)
    finished = make_round(session, 0, 0.0, ttft_s=0.5)
    decoding = make_round(make_session(1), 0, 90.0, ttft_s=4.0)
    stuck = make_round(session, 1, 3.0, ttft_s=None)
    outcome = summarise(make_result([finished], [stuck, decoding]), SLO, until_s=95.0)
    assert (outcome.ttft_p50_s, outcome.ttft_max_s) == (4.0, 97.0)
    warm = summarise(make_result([finished], [stuck, decoding]), SLO, warm_s=5.0, until_s=95.0)
    assert warm.ttft_max_s == 4.0
