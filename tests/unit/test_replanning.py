"""Roles of running workers: the best by brute force, the fewest changes, and changes only when they pay and last."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pytest

from planner.planning.problem import make_problem
from planner.planning.program import PlanProblem
from planner.planning.workload_model import RoundShape, WorkloadModel
from planner.replanning.hints import hint_replicas
from planner.replanning.observed import MIN_ROUNDS, ObservedWorkload
from planner.replanning.replanner import Replanner, ReplanParameters, choose_changes
from planner.replanning.roles import COMFORT, ENOUGH, assess_roles
from planner.replanning.running import RoleCounts, RunningWorker, count_roles
from shared.messages import Slo
from shared.profile_files import load_profile

PROFILE = load_profile("h100-qwen3-32b")
SLO = Slo(ttft_s=5.0, itl_s=0.05)


def make_session(num_input: int, num_output: int, num_rounds: int, delay_s: float) -> tuple[RoundShape, ...]:
    shapes, history = [], 0
    for index in range(num_rounds):
        shapes.append(RoundShape(history, num_input if index == 0 else 200, num_output, delay_s if index else 0.0))
        history = shapes[-1].num_total_tokens
    return tuple(shapes)


CHAT = (make_session(4_000, 200, 3, 5.0), make_session(1_000, 500, 2, 10.0))
AGENT = (make_session(30_000, 300, 12, 8.0),)


@cache
def problem_of(sessions: tuple[tuple[RoundShape, ...], ...], rate: float) -> PlanProblem:
    return make_problem(
        {"h100": PROFILE}, {"h100": 16}, WorkloadModel(sessions=sessions, sessions_per_s=rate), SLO, target=0.9
    )


def make_workers(num_prefill: int, num_both: int, degree: int = 2) -> list[RunningWorker]:
    return [
        RunningWorker(
            worker_id=f"{role}-{index}", gpu_type="h100", parallel_degree=degree, role=role, num_kv_tokens=100 * index
        )
        for role, num in (("prefill", num_prefill), ("both", num_both))
        for index in range(num)
    ]  # type: ignore[misc]


# ------------------------------------------------------------------------------------------ observed


def test_tokens_per_second_are_those_observed_whatever_part_of_a_session_is_seen() -> None:
    observed = ObservedWorkload(window_s=100.0)
    for index in range(400):  # one round a second, four to a session
        history = (index % 4) * 150
        observed.add(f"s{index // 4}", RoundShape(history, 100, 50, 1.0 if history else 0.0), float(index))
    model = observed.model(399.0)
    assert model is not None
    rounds_per_s = model.sessions_per_s * model.num_rounds / len(model.sessions)
    assert rounds_per_s == pytest.approx(1.0, rel=0.02)
    output_tokens = sum(one.num_output_tokens for session in model.sessions for one in session)
    assert model.sessions_per_s * output_tokens / len(model.sessions) == pytest.approx(50.0, rel=0.02)


def test_too_few_rounds_are_no_workload_and_old_ones_are_forgotten() -> None:
    observed = ObservedWorkload(window_s=100.0)
    for index in range(MIN_ROUNDS - 1):
        observed.add("s", RoundShape(0, 10, 10, 0.0), 0.1 * index)
    assert observed.model(10.0) is None
    observed.add("s", RoundShape(0, 10, 10, 0.0), 9.0)
    assert observed.model(10.0) is not None
    assert observed.model(108.0) is None


def test_attainment_is_of_the_rounds_in_the_window() -> None:
    observed = ObservedWorkload(window_s=100.0)
    assert observed.attainment(0.0) == 1.0
    for index in range(10):
        observed.add("s", RoundShape(0, 10, 10, 0.0), float(index), on_time=index >= 5)
    assert observed.attainment(10.0) == 0.5
    assert observed.attainment(104.5) == 1.0


# --------------------------------------------------------------------------------------------- roles


@pytest.mark.parametrize("sessions", [CHAT, AGENT])
@pytest.mark.parametrize("num_both", [1, 3])
def test_roles_equal_brute_force(sessions: tuple[tuple[RoundShape, ...], ...], num_both: int) -> None:
    """Every assignment of roles to 2 x 2 and 3 x 4 GPUs, each with its own linear program."""
    problem = problem_of(sessions, rate=1_000.0)  # more than they can do: the best is wanted
    counts = RoleCounts({("h100", 2): 2, ("h100", 4): 3}, {("h100", 2): 0, ("h100", 4): num_both})

    def capacity(small: int, large: int) -> float:
        fixed = RoleCounts(counts.total, {("h100", 2): small, ("h100", 4): large})
        return assess_roles(replace(problem, rate=1e-6), fixed).now

    capacities = {(a, b): capacity(a, b) for a, b in product(range(3), range(4))}
    found = assess_roles(problem, counts)
    best = max(capacities.values())
    assert found.best == pytest.approx(best, rel=1e-3)
    assert found.now == pytest.approx(capacities[0, num_both], rel=1e-6)
    assert found.proposed >= 0.999 * ENOUGH * best
    changes = {key: key[0] + abs(key[1] - num_both) for key, value in capacities.items() if value >= ENOUGH * best}
    proposed = found.decoding["h100", 2], found.decoding["h100", 4]
    assert proposed[0] + abs(proposed[1] - num_both) == min(changes.values())


def test_no_more_roles_change_than_the_load_needs() -> None:
    workers = make_workers(6, 2)
    little = assess_roles(problem_of(CHAT, 1.0), count_roles(workers))
    assert little.decoding == count_roles(workers).decoding  # they suffice
    rate = 1.2 * little.now
    some, much = (assess_roles(problem_of(CHAT, r), count_roles(workers)) for r in (rate, 1_000.0))
    assert some.proposed >= 0.999 * min(rate / COMFORT, ENOUGH * some.best)
    assert 2 < some.decoding["h100", 2] <= much.decoding["h100", 2]


def test_who_stops_decoding_has_the_least_kv_to_hand_on() -> None:
    workers = make_workers(1, 4)
    assessment = assess_roles(problem_of(CHAT, 1.0), count_roles(workers))
    fewer = replace(assessment, decoding={("h100", 2): 2})
    changes = choose_changes(problem_of(CHAT, 1.0), workers, fewer)
    assert [(change.worker_id, change.role) for change in changes] == [("both-0", "prefill"), ("both-1", "prefill")]
    assert changes[0].cost_s < changes[1].cost_s
    more = replace(assessment, decoding={("h100", 2): 5})
    assert [(c.worker_id, c.role) for c in choose_changes(problem_of(CHAT, 1.0), workers, more)] == [
        ("prefill-0", "both")
    ]
    assert choose_changes(problem_of(CHAT, 1.0), workers, replace(assessment, decoding={("h100", 2): 4})) == []


def test_others_change_in_place_of_those_that_are_pinned() -> None:
    workers = make_workers(3, 2)
    pinned = [replace(worker, pinned=worker.worker_id in ("prefill-0", "both-0")) for worker in workers]
    assessment = assess_roles(problem_of(CHAT, 1.0), count_roles(workers))
    for num_decoding, expected in ((4, ["prefill-1", "prefill-2"]), (1, ["both-1"]), (5, ["prefill-1", "prefill-2"])):
        wanted = replace(assessment, decoding={("h100", 2): num_decoding})
        assert [c.worker_id for c in choose_changes(problem_of(CHAT, 1.0), pinned, wanted)] == expected


# ----------------------------------------------------------------------------------------- replanner


def run(
    replanner: Replanner, rates: list[tuple[float, float]], workers: list[RunningWorker]
) -> list[tuple[float, int]]:
    """Propose every 20 s at the rates (until, sessions per second) and do what is proposed: (when, how many)."""
    done, now = [], 0.0
    for until, rate in rates:
        while now < until:
            proposal = replanner.propose(problem_of(CHAT, rate), workers, now)
            for change in proposal.changes:
                place = next(i for i, w in enumerate(workers) if w.worker_id == change.worker_id)
                workers[place] = replace(workers[place], role=change.role)
            if proposal.changes:
                replanner.note_changed(len(proposal.changes), now)
                done.append((now, len(proposal.changes)))
            now += 20.0
    return done


def test_a_stationary_load_changes_nothing_in_an_hour() -> None:
    workers = make_workers(4, 4)
    rate = 0.8 * assess_roles(problem_of(CHAT, 1.0), count_roles(workers)).now
    assert run(Replanner(), [(3_600.0, rate)], workers) == []


def test_a_load_that_the_roles_cannot_serve_changes_them_once_it_lasts() -> None:
    workers = make_workers(6, 2)
    rate = 1.2 * assess_roles(problem_of(CHAT, 1.0), count_roles(workers)).now
    done = run(Replanner(), [(600.0, rate)], workers)
    assert len(done) == 1
    assert done[0][0] >= ReplanParameters().hold_s
    assert assess_roles(problem_of(CHAT, rate), count_roles(workers)).now > rate


def test_workers_that_are_late_are_at_their_capacity_whatever_the_program_says() -> None:
    workers = make_workers(6, 2)
    problem = problem_of(CHAT, 0.5 * assess_roles(problem_of(CHAT, 1.0), count_roles(workers)).now)
    replanner = Replanner(ReplanParameters(hold_s=0.0))
    assert replanner.propose(problem, workers, 0.0, attainment=0.92).reason == "the roles suffice"
    late = replanner.propose(problem, workers, 20.0, attainment=0.7)
    assert late.load == 1.0
    assert late.changes
    assert {change.role for change in late.changes} == {"both"}


def test_a_load_that_is_served_on_time_changes_nothing_whatever_the_program_says() -> None:
    workers = make_workers(6, 2)
    now = assess_roles(problem_of(CHAT, 1.0), count_roles(workers)).now
    problem = problem_of(CHAT, 1.1 * now)
    replanner = Replanner(ReplanParameters(hold_s=0.0))
    assert replanner.propose(problem, workers, 0.0, attainment=0.97).reason == "the roles suffice"
    assert replanner.propose(problem, workers, 20.0, attainment=0.91).changes
    far_too_much = problem_of(CHAT, 1.3 * now)  # its rounds are long, and those that will be late have not ended
    assert Replanner(ReplanParameters(hold_s=0.0)).propose(far_too_much, workers, 0.0, attainment=0.97).changes


def test_some_late_rounds_below_a_full_load_may_be_chance_and_must_last_longer() -> None:
    workers = make_workers(6, 2)
    problem = problem_of(CHAT, 0.9 * assess_roles(problem_of(CHAT, 1.0), count_roles(workers)).now)
    replanner = Replanner()
    times = range(0, 200, 10)
    changed = [at for at in times if replanner.propose(problem, workers, float(at), attainment=0.91).changes]
    assert changed[0] == ReplanParameters().doubt_s
    assert replanner.propose(problem, workers, 200.0, attainment=0.93).reason == "the roles suffice"
    replanner.propose(problem, workers, 210.0, attainment=0.8)
    assert replanner.propose(problem, workers, 210.0 + ReplanParameters().hold_s, attainment=0.8).changes


def test_late_rounds_that_no_role_would_help_change_nothing() -> None:
    replanner = Replanner(ReplanParameters(hold_s=0.0))
    assert replanner.propose(problem_of(CHAT, 0.1), make_workers(0, 8), 0.0, attainment=0.1).changes == ()


def test_a_short_burst_changes_nothing() -> None:
    workers = make_workers(6, 2)
    now = assess_roles(problem_of(CHAT, 1.0), count_roles(workers)).now
    assert run(Replanner(), [(100.0, 0.3 * now), (110.0, 1.5 * now), (600.0, 0.3 * now)], workers) == []


def test_a_periodic_load_does_not_oscillate() -> None:
    workers = make_workers(6, 2)
    now = assess_roles(problem_of(CHAT, 1.0), count_roles(workers)).now
    rates = [(300.0 * (index + 1), (0.3 if index % 2 else 1.3) * now) for index in range(6)]
    done = run(Replanner(), rates, workers)
    assert sum(num for _, num in done) <= 6  # each worker once at most


def test_changes_are_bounded_by_a_budget() -> None:
    parameters = ReplanParameters(max_changes=2, budget_s=300.0, settle_s=0.0, hold_s=0.0)
    workers = make_workers(7, 1)
    done = run(Replanner(parameters), [(700.0, 1_000.0)], workers)
    assert all(sum(num for at, num in done if start <= at < start + 300.0) <= 2 for start, _ in done)
    assert sum(num for _, num in done) > 2


def test_a_proposal_says_why_nothing_is_changed() -> None:
    workers = make_workers(0, 8)
    enough, hopeless = (Replanner().propose(problem_of(CHAT, rate), workers, 0.0) for rate in (0.1, 1_000.0))
    assert (enough.reason, hopeless.reason) == ("the roles suffice", "no roles would be much better")
    waiting = Replanner().propose(problem_of(CHAT, 1_000.0), make_workers(7, 1), 0.0)
    assert waiting.reason == "waiting whether it lasts"


# --------------------------------------------------------------------------------------------- hints


def test_hints_grow_with_the_rate_and_name_what_runs() -> None:
    workers = make_workers(2, 2)
    small, large = (hint_replicas(problem_of(CHAT, rate), workers) for rate in (1.0, 20.0))
    assert sum(hint.wanted for hint in small) < sum(hint.wanted for hint in large)
    assert {(hint.role, hint.running) for hint in large if hint.running} == {("prefill", 2), ("both", 2)}
    assert all((hint.gpu_type, hint.parallel_degree) == ("h100", 2) for hint in large)
