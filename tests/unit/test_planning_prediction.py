"""From utilisation to missed objectives: the closed forms against known values and against simulated queues, and what a
plan is predicted to do."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from planning_samples import (
    SLO,
    at_rate,
    make_profile,
    make_random_problem,
    make_session,
    make_toy_problem,
    make_workload,
)

from planner.planning.plans import SolvedPlan, WorkerCount, fix_plan, solve_plan
from planner.planning.prediction import predict
from planner.planning.program import PlanProblem
from planner.planning.queueing import NEAR_FULL, missed_share, wait_quantile_s
from planner.planning.solve import Solution, solve
from shared.messages import Slo

utilisations = st.floats(0.0, 5.0)
patiences = st.floats(0.0, 200.0)
variabilities = st.floats(0.05, 10.0)


# ------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("utilisation", [0.1, 0.5, 0.9, 0.999, 1.0, 1.001, 1.5, 4.0])
def test_without_patience_the_share_is_that_of_a_server_without_a_queue(utilisation: float) -> None:
    assert missed_share(utilisation, 0.0, 1.0) == pytest.approx(utilisation / (1.0 + utilisation), rel=1e-5)


@pytest.mark.parametrize("patience", [0.0, 1.0, 3.0, 50.0])
def test_at_full_utilisation_it_is_one_over_two_and_the_patience(patience: float) -> None:
    assert missed_share(1.0, patience, 1.0) == pytest.approx(1.0 / (2.0 + patience))
    below, above = (missed_share(1.0 + side * 3 * NEAR_FULL, patience, 1.0) for side in (-1, 1))
    assert below == pytest.approx(1.0 / (2.0 + patience), rel=1e-3)
    assert below < above == pytest.approx(below, rel=1e-3)


def test_with_endless_patience_only_what_is_too_much_is_missed() -> None:
    assert missed_share(0.8, 1e6, 1.0) == pytest.approx(0.0, abs=1e-12)
    assert missed_share(1.25, 1e6, 1.0) == pytest.approx(0.2)
    assert missed_share(4.0, 1e6, 1.0) == pytest.approx(0.75)


@pytest.mark.parametrize(("utilisation", "patience"), [(0.7, 2.0), (0.95, 5.0), (1.0, 3.0), (1.3, 4.0), (2.0, 1.0)])
def test_missed_shares_are_those_of_a_simulated_queue(utilisation: float, patience: float) -> None:
    """M/M/1 with mean service 1: who would wait for longer than `patience` leaves, and is not served."""
    seed = 11
    draws = random.Random(seed)
    num_customers, num_missed, wait = 200_000, 0, 0.0
    for _ in range(num_customers):
        if wait > patience:
            num_missed += 1
        else:
            wait += draws.expovariate(1.0)
        wait = max(0.0, wait - draws.expovariate(utilisation))
    expected = num_missed / num_customers
    assert missed_share(utilisation, patience, 1.0) == pytest.approx(expected, rel=0.05), f"seed {seed}"


@given(utilisations, utilisations, patiences, variabilities)
def test_more_work_misses_more(one: float, other: float, patience: float, variability: float) -> None:
    low, high = sorted((one, other))
    missed = [missed_share(utilisation, patience, variability) for utilisation in (low, high)]
    assert 0.0 <= missed[0] <= missed[1] + 1e-6
    assert missed[1] <= 1.0
    assert missed[1] >= 1.0 - 1.0 / max(1.0, high) - 1e-9, "never more is served than can be"


@given(utilisations, patiences, patiences, variabilities)
def test_more_patience_misses_less(utilisation: float, one: float, other: float, variability: float) -> None:
    low, high = sorted((one, other))
    assert missed_share(utilisation, high, variability) <= missed_share(utilisation, low, variability) + 1e-9


@given(st.floats(0.01, 0.98), st.floats(0.1, 50.0), st.floats(1.0, 10.0))
def test_burstier_work_misses_more_and_waits_longer(utilisation: float, patience: float, variability: float) -> None:
    assert missed_share(utilisation, patience, variability) >= missed_share(utilisation, patience, 1.0) - 1e-12
    assert wait_quantile_s(utilisation, 1.0, variability, 0.95) >= wait_quantile_s(utilisation, 1.0, 1.0, 0.95)


@given(st.floats(0.06, 0.99), st.floats(0.001, 10.0), st.floats(0.5, 0.99))
def test_waits_beyond_the_quantile_are_as_many_as_it_says(
    utilisation: float, service_s: float, quantile: float
) -> None:
    """In M/M/1 a share of utilisation x exp(-(1 - utilisation) t / service) waits for longer than t."""
    wait_s = wait_quantile_s(utilisation, service_s, 1.0, quantile)
    beyond = utilisation * math.exp(-(1.0 - utilisation) * wait_s / service_s)
    assume(wait_s > 0.0)
    assert beyond == pytest.approx(1.0 - quantile)


def test_nobody_waits_on_idle_workers_and_for_ever_on_full_ones() -> None:
    assert wait_quantile_s(0.05, 2.0, 1.0, 0.95) == 0.0
    assert wait_quantile_s(0.9, 2.0, 1.0, 0.95) == pytest.approx(2.0 * 10.0 * math.log(18.0))
    assert wait_quantile_s(1.0, 2.0, 1.0, 0.95) == wait_quantile_s(1.7, 2.0, 1.0, 0.95) == math.inf
    assert missed_share(0.0, 0.0, 1.0) == 0.0


# ---------------------------------------------------------------------------------------- of a plan


def plan_for(problem: PlanProblem) -> SolvedPlan:
    plan = solve_plan(problem, "goodput")
    assert plan is not None
    return plan


PROBLEMS = [
    make_toy_problem(4),
    make_toy_problem(8, slo=Slo(ttft_s=0.5, itl_s=0.0145)),
    make_toy_problem(6, workload=make_workload(make_session((2_000, 100, 0.0), (50, 100, 60.0)), burstiness=5.0)),
    make_toy_problem(4, slo=Slo(ttft_s=0.11, itl_s=0.05)),
]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_attainment_falls_and_latency_rises_with_the_rate(problem: PlanProblem) -> None:
    plan = plan_for(problem)
    slo = Slo(ttft_s=0.2, itl_s=0.05)
    told = [predict(problem, plan, share * plan.rate, slo) for share in (0.1, 0.5, 0.8, 0.95, 1.0, 1.2, 2.0)]
    assert all(more.attainment < less.attainment for less, more in pairwise(told) if less.attainment < 0.9999)
    assert all(more.ttft_p95_s >= less.ttft_p95_s for less, more in pairwise(told))
    assert told[0].attainment > 0.85
    assert told[-1].attainment <= 0.5 * 1.05, "twice what is served"
    assert told[-1].ttft_p95_s == math.inf
    assert len({(one.capacity_sessions_per_s, one.goodput_sessions_per_s) for one in told}) == 1, "of any rate"


@pytest.mark.parametrize("problem", PROBLEMS)
def test_goodput_is_the_rate_at_which_the_target_is_just_met(problem: PlanProblem) -> None:
    plan = plan_for(problem)
    for target in (0.3, 0.9, 0.95):
        asked = at_target(problem, target)
        goodput = predict(asked, plan, 1.0, SLO).goodput_sessions_per_s
        assert predict(asked, plan, 0.999 * goodput, SLO).attainment >= target
        assert predict(asked, plan, 1.001 * goodput, SLO).attainment < target


def at_target(problem: PlanProblem, target: float) -> PlanProblem:
    return replace(problem, target=target)


def test_capacity_is_what_the_program_says_of_the_same_workers() -> None:
    problem = PROBLEMS[1]
    plan = plan_for(problem)
    program, lp = fix_plan(problem, plan)
    told = predict(problem, plan, 1.0, SLO)
    assert told.capacity_sessions_per_s == pytest.approx(solve(lp).values[program.rate])
    assert told.capacity_sessions_per_s >= plan.rate * (1 - 1e-6)


def test_what_limits_a_plan_adds_up_to_one() -> None:
    num_plans = 0
    for seed in range(25):
        problem = make_random_problem(seed, most_gpus=6)
        plan = solve_plan(problem, "goodput")
        if plan is None:
            continue
        num_plans += 1
        binding = predict(problem, plan, plan.rate, SLO).binding
        assert sum(share for _, share in binding) == pytest.approx(1.0, abs=1e-4), f"seed {seed}"
        assert [share for _, share in binding] == sorted((share for _, share in binding), reverse=True)
    assert num_plans > 15


def test_one_percent_more_of_what_limits_a_plan_brings_its_share_of_one_percent() -> None:
    """The shares against finite differences: of the memory, and of the time of the workers that there are."""
    workload = make_workload(make_session((2_000, 100, 0.0), (300, 100, 3.0)))
    profile = make_profile(kv_tokens={1: 20_000})
    problem = make_toy_problem(3, workload=workload, profile=profile)
    plan = plan_for(problem)
    told = predict(problem, plan, 1.0, SLO)
    shares = dict(told.binding)
    memory = sum(share for name, share in shares.items() if "KV memory" in name)
    assert 0.05 < memory < 0.95
    more = make_toy_problem(3, workload=workload, profile=make_profile(kv_tokens={1: 20_200}))
    gained = predict(more, plan, 1.0, SLO).capacity_sessions_per_s / told.capacity_sessions_per_s - 1.0
    assert gained == pytest.approx(0.01 * memory, rel=0.05)


@pytest.mark.parametrize(
    ("problem", "strongest"),
    [
        (make_toy_problem(2, workload=make_workload(make_session((3_000, 1, 0.0)))), "time of"),
        (make_toy_problem(2, profile=make_profile(kv_tokens={1: 3_000})), "KV memory of decode workers"),
    ],
)
def test_what_is_scarce_is_what_limits(problem: PlanProblem, strongest: str) -> None:
    plan = plan_for(problem)
    name, share = predict(problem, plan, plan.rate, SLO).binding[0]
    assert name.startswith(strongest)
    assert share > 0.5


def test_links_limit_a_plan_that_prefills_elsewhere() -> None:
    """One worker prefills, one decodes and has no room for a chunk: whatever is served goes over the link."""
    problem = make_toy_problem(2, profile=make_profile(kv_tokens={1: 400_000}, link_bytes_per_s=5e7))
    plan = SolvedPlan(
        workers=(WorkerCount("prefill", "toy", 1, 1), WorkerCount("both", "toy", 1, 1)),
        rate=1.0,
        objective=-1.0,
        solution=Solution(status="optimal", objective=-1.0, gap=0.0, seconds=0.0, values=()),
    )
    told = predict(problem, plan, 1.0, SLO)
    assert 0.0 < told.local_share < 1.0
    assert any("links" in name for name, _ in told.binding)
    faster = make_toy_problem(2, profile=make_profile(kv_tokens={1: 400_000}, link_bytes_per_s=5e9))
    assert predict(faster, plan, 1.0, SLO).local_share < told.local_share


def test_itl_is_that_of_the_modes_and_keeps_to_the_objective() -> None:
    for problem, itl_s in zip(PROBLEMS, (0.05, 0.0145, 0.05, 0.05), strict=True):
        told = predict(problem, plan_for(problem), 1.0, SLO)
        assert 0.01 < told.itl_p95_s <= 0.9 * itl_s * (1 + 1e-9)


def test_a_plan_that_serves_nothing_is_predicted_to_attain_nothing() -> None:
    """A prefill of any round is late on the only worker there is."""
    problem = make_toy_problem(1, slo=Slo(ttft_s=0.001, itl_s=0.05))
    workers = (WorkerCount("both", "toy", 1, 1),)
    nothing = SolvedPlan(
        workers=workers,
        rate=0.0,
        objective=0.0,
        solution=Solution(status="optimal", objective=0.0, gap=0.0, seconds=0.0, values=()),
    )
    told = predict(problem, nothing, 1.0, Slo(ttft_s=0.001, itl_s=0.05))
    assert (told.attainment, told.capacity_sessions_per_s, told.goodput_sessions_per_s) == (0.0, 0.0, 0.0)
    assert told.ttft_p95_s == math.inf


def test_late_prefills_are_missed_however_few_sessions_come() -> None:
    workload = make_workload(*[make_session((100, 5, 0.0))] * 19, make_session((6_000, 5, 0.0)))
    slo = Slo(ttft_s=0.2, itl_s=0.05)
    problem = make_toy_problem(1, workload=workload, slo=slo)
    told = predict(at_rate(problem, 0.001), plan_for(problem), 0.001, slo)
    assert told.attainment == pytest.approx(0.95)
