"""Plans: the same seed gives the same arrivals; cuts keep what they promise."""

from __future__ import annotations

import pytest

from loadgen.plan import Cuts, make_plan, plan_rounds, poisson_arrivals, recorded_arrivals
from loadgen.replay import make_input
from loadgen.traces import TraceRound, TraceSession
from shared.errors import AmpdError
from shared.messages import ChatMessage


def session(
    name: str, *rounds: tuple[int, int, float | None], arrival_s: float = 0.0, known: bool = False
) -> TraceSession:
    return TraceSession(
        session_id=name,
        arrival_s=arrival_s,
        rounds=tuple(TraceRound(input_tokens=i, output_tokens=o, delay_s=d) for i, o, d in rounds),
        meta={"arrival_known": known},
    )


TRACE = [session(f"s{index}", (10, 2, None), (5, 1, 3.0)) for index in range(50)]


def test_poisson_arrivals_repeat_with_the_seed_and_have_the_rate() -> None:
    arrivals = poisson_arrivals(4000, rate=2.0, seed=1)
    assert arrivals == poisson_arrivals(4000, rate=2.0, seed=1)
    assert arrivals != poisson_arrivals(4000, rate=2.0, seed=2)
    assert arrivals[0] == 0.0
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(2000, rel=0.06)
    # twice the rate is the same draw, compressed: rates are compared on the same pattern
    assert poisson_arrivals(4000, rate=4.0, seed=1)[-1] == pytest.approx(arrivals[-1] / 2)


def test_recorded_arrivals_start_at_zero_and_scale_to_a_rate() -> None:
    trace = [
        session("a", (1, 1, None), arrival_s=10.5, known=True),
        session("b", (1, 1, None), arrival_s=14.5, known=True),
    ]
    assert recorded_arrivals(trace, rate=None, seed=0) == [0.0, 4.0]
    assert recorded_arrivals(trace, rate=0.5, seed=0) == [0.0, 2.0]


def test_times_on_mooncakes_grid_are_spread_within_it() -> None:
    trace = [session(f"s{i}", (1, 1, None), arrival_s=3.0 * (i // 10), known=True) for i in range(40)]
    arrivals = recorded_arrivals(trace, rate=None, seed=3)
    assert arrivals == recorded_arrivals(trace, rate=None, seed=3)
    assert len(set(arrivals)) == 40
    for index, arrival_s in enumerate(arrivals):
        assert abs(arrival_s - 3.0 * (index // 10)) <= 3.0


def test_default_arrivals() -> None:
    known = [session(f"s{i}", (1, 1, None), arrival_s=1.0 + i, known=True) for i in range(3)]
    assert make_plan(known).arrivals == "recorded"
    assert make_plan(known).rate == pytest.approx(1.0)
    assert make_plan(known, rate=5.0).arrivals == "poisson"
    assert make_plan(TRACE).arrivals == "poisson"
    with pytest.raises(AmpdError, match="--arrivals poisson"):
        make_plan(TRACE, arrivals="recorded")
    with pytest.raises(AmpdError, match="no sessions"):
        make_plan([])


def test_sessions_are_the_first_or_a_sample_by_the_seed() -> None:
    first = make_plan(TRACE, num_sessions=5, seed=1)
    assert [one.session_id for one in first.sessions] == ["s0", "s1", "s2", "s3", "s4"]
    assert [one.index for one in first.sessions] == [0, 1, 2, 3, 4]
    sample = make_plan(TRACE, num_sessions=5, sample=True, seed=1)
    assert sample == make_plan(TRACE, num_sessions=5, sample=True, seed=1)
    assert [one.session_id for one in sample.sessions] != [one.session_id for one in first.sessions]
    assert len({one.session_id for one in sample.sessions}) == 5
    assert make_plan(TRACE, num_sessions=5).num_rounds == 10


def test_delays_are_capped_and_missing_ones_are_zero() -> None:
    cuts = Cuts()
    rounds = session("a", (1, 1, None), (1, 1, None), (1, 1, 70.0)).rounds
    assert [one.delay_s for one in plan_rounds(rounds, None, 60.0, cuts)] == [0.0, 0.0, 60.0]
    assert cuts.delays_capped == 1


@pytest.mark.parametrize(
    ("rounds", "max_context", "expected"),
    [
        ([(10, 5), (4, 1)], 20, [(10, 5), (4, 1)]),  # exactly full
        ([(10, 5), (4, 2)], 20, [(10, 5)]),  # one token too many: the tail goes
        ([(10, 5), (40, 2), (1, 1)], 20, [(10, 5)]),  # and nothing after it
        ([(100, 5), (4, 1)], 40, [(30, 5), (4, 1)]),  # truncated just as far as the later rounds need
        ([(100, 5), (10, 1), (20, 4)], 40, [(20, 5), (10, 1)]),  # but not below half
        ([(4, 100)], 40, [(4, 36)]),  # an output alone too long
        ([(100, 100)], 40, [(20, 20)]),
    ],
)
def test_max_context(rounds: list[tuple[int, int]], max_context: int, expected: list[tuple[int, int]]) -> None:
    trace = session("a", *((num_input, num_output, None) for num_input, num_output in rounds))
    planned = plan_rounds(trace.rounds, max_context, None, Cuts())
    assert [(one.input_tokens, one.output_tokens) for one in planned] == expected


def test_cuts_are_counted() -> None:
    trace = [session("a", (100, 5, None), (10, 1, 9.0), (20, 4, 0.1)), session("b", (5, 5, None))]
    cuts = make_plan(trace, max_context=40, max_delay_s=1.0).cuts
    assert (cuts.inputs_truncated, cuts.rounds_dropped, cuts.sessions_cut, cuts.delays_capped) == (1, 1, 1, 1)


def test_text_is_not_truncated() -> None:
    one = TraceRound(input_tokens=500, output_tokens=4, messages=(ChatMessage(role="user", content="x" * 2000),))
    with pytest.raises(AmpdError, match="larger --max-context"):
        plan_rounds((one,), 100, None, Cuts())


def test_random_inputs_repeat_and_leave_special_tokens_out() -> None:
    planned = make_plan([session("a", (5000, 2, None))]).sessions[0].rounds[0]
    ids = make_input(planned, seed=3, session_index=1, round_index=2, vocab_size=1000)
    assert ids == make_input(planned, seed=3, session_index=1, round_index=2, vocab_size=1000)
    assert ids != make_input(planned, seed=3, session_index=1, round_index=3, vocab_size=1000)
    assert len(ids) == 5000
    assert min(ids) >= 250  # type: ignore[type-var]
    assert max(ids) < 1000  # type: ignore[type-var,operator]
