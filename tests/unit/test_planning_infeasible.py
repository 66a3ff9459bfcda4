"""Requests that cannot be met: the error names the number at fault, what it asks for works, and a bit less does not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import pytest
from planning_samples import (
    SLO,
    PlanRequest,
    at_rate,
    draw_request,
    make_profile,
    make_session,
    make_toy_problem,
    make_workload,
)

from planner.planning.infeasible import explain_infeasible
from planner.planning.plans import solve_plan
from planner.planning.problem import make_problem
from planner.planning.program import Objective, PlanProblem
from planner.planning.workload_model import WorkloadModel
from shared.core.profile import Profile
from shared.errors import ErrorCode
from shared.messages import Slo

NUMBER = r"(\d[\d.]*(?:e[+-]?\d+)?)"


def explain(problem: PlanProblem, workload: WorkloadModel, slo: Slo = SLO) -> str:
    error = explain_infeasible(problem, workload, slo)
    assert error.code is ErrorCode.INVALID_REQUEST
    return error.message


def read_number(pattern: str, message: str) -> float:
    found = re.search(pattern.replace("#", NUMBER), message)
    assert found is not None, message
    return float(found[1])


def is_feasible(problem: PlanProblem, objective: Objective = "goodput") -> bool:
    return solve_plan(problem, objective) is not None


# ------------------------------------------------------------------------------- fails at any rate


def test_a_session_too_long_for_every_worker_names_what_fits() -> None:
    profile = make_profile(kv_tokens={1: 3_000, 2: 7_000})

    def problem_for(num_tokens: int) -> tuple[PlanProblem, WorkloadModel]:
        workload = make_workload(make_session((500, 20, 0.0)), make_session((num_tokens - 100, 100, 0.0)))
        return make_toy_problem(4, profile=profile, workload=workload), workload

    problem, workload = problem_for(9_000)
    assert not is_feasible(problem)
    message = explain(problem, workload)
    assert "9000 tokens" in message
    assert "toy x 2" in message
    named = round(read_number("--max-context #,", message))
    assert is_feasible(problem_for(named)[0])
    assert not is_feasible(problem_for(named + 1)[0])


@pytest.mark.parametrize("kv_tokens", [{2: 10_000, 4: 50_000}, {1: 1_200, 2: 3_000}, {1: 500, 2: 1_500, 4: 8_000}])
def test_fewer_gpus_than_a_worker_has_names_how_many_there_must_be(kv_tokens: dict[int, int]) -> None:
    profile = make_profile(kv_tokens=kv_tokens)
    workload = make_workload()
    problem = make_toy_problem(1, profile=profile, workload=workload)
    assert not is_feasible(problem)
    message = explain(problem, workload)
    assert "1 toy" in message
    named = round(read_number("give at least #", message))
    assert is_feasible(make_toy_problem(named, profile=profile, workload=workload))
    assert not is_feasible(make_toy_problem(named - 1, profile=profile, workload=workload))


def test_of_two_types_either_may_be_given_more_of() -> None:
    profiles = {"a": make_profile("a", kv_tokens={2: 10_000}), "b": make_profile("b", kv_tokens={4: 10_000})}
    problem = make_problem(profiles, {"a": 1, "b": 3}, make_workload(), SLO)
    assert not is_feasible(problem)
    message = explain(problem, make_workload())
    assert "1 a, 3 b" in message
    assert "(a x 2): give at least 2" in message


@pytest.mark.parametrize("num_gpus", [1, 2, 4])
def test_an_itl_below_one_step_names_the_least(num_gpus: int) -> None:
    """More GPUs allow for larger workers, whose steps are shorter."""
    workload = make_workload()

    def problem_for(itl_s: float) -> PlanProblem:
        return make_toy_problem(num_gpus, workload=workload, slo=Slo(ttft_s=1.0, itl_s=itl_s))

    problem = problem_for(0.001)
    assert not is_feasible(problem)
    message = explain(problem, workload, Slo(ttft_s=1.0, itl_s=0.001))
    assert "an ITL of 0.001 s" in message
    assert f"toy x {num_gpus}" in message
    named = read_number("--itl-slo to # or more", message)
    assert is_feasible(problem_for(named))
    assert not is_feasible(problem_for(0.98 * named))


@pytest.mark.parametrize("target", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("num_gpus", [1, 4])
def test_a_ttft_below_a_prefill_names_the_least(num_gpus: int, target: float) -> None:
    sizes = (500, 900, 1_400, 2_000, 2_700, 3_300, 4_100, 5_000, 6_500, 8_000)
    workload = make_workload(*(make_session((size, 10, 0.0), (size // 4, 10, 1.0)) for size in sizes))

    def problem_for(ttft_s: float) -> PlanProblem:
        slo = Slo(ttft_s=ttft_s, itl_s=0.05)
        return make_toy_problem(num_gpus, workload=workload, slo=slo, target=target)

    problem = problem_for(0.002)
    assert not is_feasible(problem)
    message = explain(problem, workload, Slo(ttft_s=0.002, itl_s=0.05))
    assert f"a TTFT of 0.002 s cannot be kept by {target:.0%}" in message
    named = read_number("--ttft-slo to # or more", message)
    assert is_feasible(problem_for(named))
    assert not is_feasible(problem_for(0.98 * named))


def test_a_tenth_of_ten_rounds_is_one() -> None:
    """(1 - 0.9) x 10 is a little below 1 in binary: one late round of ten is still allowed."""
    workload = make_workload(*[make_session((100, 10, 0.0))] * 9, make_session((9_000, 10, 0.0)), rate=1e6)
    problem = make_toy_problem(2, workload=workload, slo=Slo(ttft_s=0.1, itl_s=0.05))
    assert is_feasible(problem)
    assert "TTFT of" not in explain(problem, workload, Slo(ttft_s=0.1, itl_s=0.05)), "it is the rate that is too high"


def test_first_and_later_rounds_may_need_different_workers() -> None:
    """What is named is what the best of each does; a type that is fast at neither is not in the way."""
    profiles = {"slow": make_profile("slow", speed=0.3), "fast": make_profile("fast", speed=2.0)}
    workload = make_workload(make_session((3_000, 10, 0.0), (500, 10, 1.0)))

    def problem_for(ttft_s: float) -> PlanProblem:
        return make_problem(profiles, {"slow": 1, "fast": 1}, workload, Slo(ttft_s=ttft_s, itl_s=0.1), target=0.9)

    message = explain(problem_for(0.01), workload, Slo(ttft_s=0.01, itl_s=0.1))
    named = read_number("--ttft-slo to # or more", message)
    assert is_feasible(problem_for(named))
    assert not is_feasible(problem_for(0.98 * named))


def relax_until_feasible(request: PlanRequest) -> PlanRequest:
    """What the errors ask for, one after another: at most one of each kind."""
    for _ in range(4):
        if is_feasible(request.problem):
            return request
        message = explain(request.problem, request.workload, request.slo)
        if "--itl-slo to" in message:
            slo = Slo(ttft_s=request.slo.ttft_s, itl_s=read_number("--itl-slo to #", message))
            request = replace(request, slo=slo)
        elif "--ttft-slo to" in message:
            slo = Slo(ttft_s=read_number("--ttft-slo to #", message), itl_s=request.slo.itl_s)
            request = replace(request, slo=slo)
        elif "give at least" in message:
            name = re.search(r"\((\w+) x \d+\): give", message)
            assert name is not None
            gpus = {**request.gpus, name[1]: round(read_number("give at least #", message))}
            request = replace(request, gpus=gpus)
        else:
            most = round(read_number("--max-context #,", message))
            sessions = tuple(s for s in request.workload.sessions if s[-1].num_total_tokens <= most)
            request = replace(request, workload=replace(request.workload, sessions=sessions))
    assert is_feasible(request.problem), "what was asked for has been done"
    return request


def test_what_is_asked_for_is_enough_in_the_end() -> None:
    """Requests without a plan at any rate, of every kind."""
    refused: set[str] = set()
    for seed in range(120):
        request = draw_request(seed, most_gpus=4)
        if not is_feasible(request.problem):
            message = explain(request.problem, request.workload, request.slo)
            refused |= {name for name in ("--itl-slo", "--ttft-slo", "give at least") if name in message}
            relax_until_feasible(request)
    assert refused == {"--itl-slo", "--ttft-slo", "give at least"}


# ------------------------------------------------------------------------------- fails at this rate


def count_given(message: str) -> dict[str, int]:
    """{GPU type: how many} that the message asks for."""
    asked = re.search(r"smallest change: .*?((?:\d+ \w+(?: \+ )?)+) in all", message)
    assert asked is not None, message
    return {name: int(number) for number, name in re.findall(r"(\d+) (\w+)", asked[1])}


@pytest.mark.parametrize("seed", range(24))
def test_too_high_a_rate_names_the_highest_and_the_fewest_gpus(seed: int) -> None:
    request = relax_until_feasible(draw_request(seed, most_gpus=5))
    problem = request.problem
    best = solve_plan(problem, "goodput")
    assert best is not None
    asked = at_rate(problem, 1.7 * best.rate)
    assert not is_feasible(asked, "min-gpus")
    message = explain(asked, request.workload, request.slo)
    assert f"cannot serve {asked.rate:g} sessions/s" in message
    rate = read_number("a rate of at most #,", message)
    for objective in ("min-gpus", "min-p95"):
        assert is_feasible(at_rate(problem, rate), objective)
        assert not is_feasible(at_rate(problem, 1.002 * rate), objective)
    check_fewest(asked, count_given(message))


def check_fewest(problem: PlanProblem, given: Mapping[str, int]) -> None:
    """It works, and no fewer GPUs do, whatever of each type."""
    assert is_feasible(with_gpus(problem, given), "min-gpus")
    num_gpus = sum(given.values())
    for numbers in product(range(num_gpus), repeat=len(problem.gpus)):
        if sum(numbers) == num_gpus - 1:
            fewer = dict(zip(problem.gpus, numbers, strict=True))
            assert not is_feasible(with_gpus(problem, fewer), "min-gpus"), fewer


def with_gpus(problem: PlanProblem, gpus: Mapping[str, int]) -> PlanProblem:
    """Types of which there are none are left out."""
    kinds = tuple(kind for kind in problem.kinds if gpus.get(kind.gpu_type, 0))
    return replace(problem, kinds=kinds, gpus={name: number for name, number in gpus.items() if number})


def limits_of(message: str) -> list[str]:
    found = re.search(r"what cannot hold: (.*?);", message)
    assert found is not None, message
    return found[1].split(" or ")


TIGHT = Slo(ttft_s=0.5, itl_s=0.0145)
DECODES = make_workload(make_session((100, 2_000, 0.0)))
IDLE = make_workload(make_session((2_000, 20, 0.0), (50, 20, 300.0)))


@pytest.mark.parametrize(
    ("num_gpus", "profile", "workload", "slo", "limits"),
    [
        (2, make_profile(), make_workload(make_session((4_000, 1, 0.0))), SLO, ["gpus", "time of workers"]),
        (2, make_profile(kv_tokens={1: 3_000}), DECODES, SLO, ["gpus", "KV memory"]),
        (2, make_profile(kv_tokens={1: 3_000}), IDLE, SLO, ["gpus", "KV memory"]),
        (8, make_profile(link_bytes_per_s=1e6), make_workload(), TIGHT, ["gpus", "time of workers", "links"]),
    ],
)
def test_what_cannot_hold_is_what_would_do_if_it_were_not_there(
    num_gpus: int, profile: Profile, workload: WorkloadModel, slo: Slo, limits: list[str]
) -> None:
    problem = make_toy_problem(num_gpus, profile=profile, workload=workload, slo=slo)
    best = solve_plan(problem, "goodput")
    assert best is not None
    assert limits_of(explain(at_rate(problem, -1.02 * best.objective), workload, slo)) == limits


def test_a_ttft_that_only_some_workers_keep_is_named_with_the_rate() -> None:
    profiles = {"slow": make_profile("slow", speed=0.3), "fast": make_profile("fast", speed=2.0)}
    workload = make_workload(make_session((3_000, 10, 0.0)))
    slo = Slo(ttft_s=0.2, itl_s=0.1)
    problem = make_problem(profiles, {"slow": 2, "fast": 2}, workload, slo)
    best = solve_plan(problem, "goodput")
    assert best is not None
    assert "TTFT" in limits_of(explain(at_rate(problem, -1.02 * best.objective), workload, slo))


def test_a_rate_named_is_never_rounded_up() -> None:
    """Of a dozen rates some end in digits that four of them would round up."""
    for seed in range(12):
        speed = 1.0 + seed / 41
        workload = make_workload(make_session((1_777, 31, 0.0)), rate=1e4)
        problem = make_toy_problem(2, profile=make_profile(speed=speed), workload=workload)
        best = solve_plan(problem, "goodput")
        assert best is not None
        rate = read_number("a rate of at most #,", explain(problem, workload))
        assert -best.objective * (1 - 1e-3) <= rate <= -best.objective


def test_no_number_of_gpus_helps_where_there_is_none_to_name() -> None:
    workload = make_workload(rate=1e6)
    message = explain(make_toy_problem(2, workload=workload), workload)
    assert "cannot serve 1e+06 sessions/s" in message
    assert "in all" not in message
    assert "a rate of at most" in message
