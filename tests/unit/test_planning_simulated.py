"""Plans as clusters that are simulated: workers of several GPU types, how long a run is, and which plan is best."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from planning_samples import make_profile

from loadgen.plan import PlannedRound, PlannedSession
from loadgen.traces import TraceRound, TraceSession, write_trace
from loadgen.workload import Workload
from planner.planning import simulated
from planner.planning.plans import SolvedPlan, WorkerCount
from planner.planning.simulated import (
    MAX_CLIMBS,
    Neighbours,
    Setting,
    choose_by_attainment,
    choose_by_goodput,
    make_cluster,
)
from planner.planning.solve import Solution
from planner.simulator.cluster import Cluster, WorkerGroup
from planner.simulator.outcome import Outcome
from planner.simulator.scenario import Scenario
from planner.simulator.simulation import Simulation
from planner.simulator.worker import SimWorker
from shared.core.policies import find_policy
from shared.core.step_costs import StepCosts
from shared.messages import Slo

SLO = Slo(ttft_s=0.5, itl_s=0.05)
SLOW = make_profile("slow-toy", kv_tokens={1: 30_000, 2: 70_000}, host_kv_bytes=10**9)
FAST = make_profile("fast-toy", kv_tokens={1: 50_000, 2: 110_000}, speed=3.0)
PROFILES = {"slow": SLOW, "fast": FAST}


def plan_of(*workers: WorkerCount, rate: float = 10.0) -> SolvedPlan:
    solution = Solution(status="optimal", objective=-rate, gap=0.0, seconds=0.0, values=())
    return SolvedPlan(workers=workers, rate=rate, objective=-rate, solution=solution)


TWO_TYPES = plan_of(
    WorkerCount("prefill", "slow", 2, 1), WorkerCount("both", "fast", 1, 2), WorkerCount("both", "slow", 2, 1)
)


def run(cluster: Cluster, num_sessions: int = 30) -> tuple[list[SimWorker], float]:
    """(its workers, mean TTFT) after sessions of two rounds."""
    rounds = (PlannedRound(1_000, 10, 0.0), PlannedRound(200, 10, 0.1))
    sessions = [PlannedSession(index, f"s{index}", 0.05 * index, rounds) for index in range(num_sessions)]
    simulation = Simulation(cluster, find_policy("adaptive"), sessions, SLO)
    result = simulation.run()
    assert len(result.rounds) == 2 * num_sessions
    assert all(not one.error and one.finished_at > 0.0 for one in result.rounds)
    return list(simulation.workers), sum(one.ttft_s for one in result.rounds) / len(result.rounds)


# ---------------------------------------------------------------------------------------- clusters


def test_a_plan_is_a_cluster_of_both_types() -> None:
    cluster = make_cluster(TWO_TYPES, PROFILES)
    assert cluster.profile is SLOW
    assert [(g.role, g.count, g.parallel_degree, g.profile) for g in cluster.groups] == [
        ("prefill", 1, 2, None),
        ("both", 2, 1, FAST),
        ("both", 1, 2, None),
    ]
    assert cluster.num_devices == TWO_TYPES.num_gpus == 6


def test_each_worker_has_the_costs_and_memory_of_its_own_type() -> None:
    workers, _ = run(make_cluster(TWO_TYPES, PROFILES))
    assert [worker.load.worker_id for worker in workers] == ["prefill-000", "both-000", "both-001", "both-002"]
    assert [worker.memory.capacity for worker in workers] == [70_000, 50_000, 50_000, 70_000]
    assert [worker.load.num_kv_tokens for worker in workers] == [70_000, 50_000, 50_000, 70_000]
    assert [worker.memory.host_capacity for worker in workers] == [20_000, 0, 0, 20_000]
    expected = [
        StepCosts.from_profile(SLOW, 2),
        *[StepCosts.from_profile(FAST, 1)] * 2,
        StepCosts.from_profile(SLOW, 2),
    ]
    for worker, costs in zip(workers, expected, strict=True):
        for known in (worker.costs, worker.load.costs):
            assert known.prefill_s(100, 1_000) == costs.prefill_s(100, 1_000)
            assert known.decode_step_s(4, 500.0) == costs.decode_step_s(4, 500.0)


def test_groups_of_one_role_and_several_types_have_different_names() -> None:
    groups = (
        WorkerGroup(role="decode", count=2, parallel_degree=1),
        WorkerGroup(role="prefill", count=1, parallel_degree=1),
        WorkerGroup(role="decode", count=1, parallel_degree=1, profile=FAST),
    )
    workers, _ = run(Cluster(profile=SLOW, groups=groups))
    assert [worker.load.worker_id for worker in workers] == ["decode-000", "decode-001", "prefill-000", "decode-002"]
    assert len({worker.load.worker_id for worker in workers}) == 4
    assert [worker.memory.capacity for worker in workers] == [30_000, 30_000, 30_000, 50_000]


def test_a_faster_second_type_serves_sooner() -> None:
    slow, fast = (
        plan_of(WorkerCount("both", "slow", 1, 1), WorkerCount("both", second, 1, 1)) for second in ("slow", "fast")
    )
    assert run(make_cluster(fast, PROFILES))[1] < 0.8 * run(make_cluster(slow, PROFILES))[1]


# ---------------------------------------------------------------------------------------- settings


@pytest.fixture
def workload(tmp_path: Path) -> Workload:
    rounds = (TraceRound(input_tokens=500, output_tokens=8), TraceRound(input_tokens=100, output_tokens=8, delay_s=0.2))
    path = tmp_path / "trace.jsonl"
    sessions = (TraceSession(session_id=f"s{index}", arrival_s=0.0, rounds=rounds) for index in range(20))
    write_trace(path, sessions)
    return Workload(file=str(path), rate=1.0, sample=True)


def setting_for(workload: Workload, *, slo: Slo = SLO, target: float = 0.9) -> Setting:
    return Setting(
        profiles=PROFILES,
        workload=workload,
        warm_up_s=1.0,
        rounds_per_session=2.0,
        policy=find_policy("adaptive"),
        slo=slo,
        target=target,
    )


ONE, TWO, THREE = (
    plan_of(WorkerCount("both", gpu_type, 1, count)) for gpu_type, count in (("slow", 1), ("fast", 1), ("slow", 2))
)


def test_a_run_is_measured_for_its_rounds_and_never_for_too_short(workload: Workload) -> None:
    setting = setting_for(workload)
    for rate, measured_s in ((1.0, 1_500.0), (10.0, 150.0), (1_000.0, 10.0)):
        duration_s = setting.scenario(ONE, rate).workload.duration
        assert duration_s == pytest.approx(setting.warm_up_s + measured_s + SLO.ttft_s)


def test_an_objective_longer_than_a_run_leaves_something_to_measure(workload: Workload) -> None:
    """Rounds sent within an objective of the end are not counted."""
    scenario = setting_for(workload, slo=Slo(ttft_s=30.0, itl_s=0.05)).scenario(ONE, 500.0)
    outcome, _ = scenario.run(2.0, 0)
    assert outcome.num_rounds > 20
    assert outcome.attainment > 0.9


class Measured:
    """Stands in for the simulator: a plan attains 0.9 at its goodput, and more below it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, goodputs: dict[SolvedPlan, float]) -> None:
        self.runs: list[tuple[SolvedPlan, float]] = []
        self._goodputs = goodputs
        monkeypatch.setattr(Setting, "scenario", self._make)

    def _make(self, plan: SolvedPlan, rate: float) -> Scenario:
        return cast(Scenario, _FakeScenario(self, plan))

    def run(self, plan: SolvedPlan, rate: float) -> Any:
        self.runs.append((plan, rate))
        return _FakeOutcome(min(1.0, 0.9 * self._goodputs[plan] / rate))


class _FakeScenario:
    def __init__(self, measured: Measured, plan: SolvedPlan) -> None:
        self._measured, self._plan = measured, plan

    def run(self, rate: float, seed: int, *, needed_share: float | None = None) -> tuple[Outcome, None]:
        return cast(Outcome, self._measured.run(self._plan, rate)), None


class _FakeOutcome:
    def __init__(self, attainment: float) -> None:
        self.attainment = attainment


def test_the_plan_with_the_highest_goodput_comes_first(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(monkeypatch, {ONE: 4.0, TWO: 9.0, THREE: 6.0})
    steps = []
    found = choose_by_goodput(setting_for(workload), [ONE, TWO, THREE], on_progress=lambda: steps.append(1))
    assert [one.plan for one in found] == [TWO, ONE, THREE]
    assert [one.goodput_sessions_per_s for one in found] == [
        pytest.approx(9.0, rel=0.03),
        pytest.approx(4.0, rel=0.03),
        0.0,
    ]
    assert found[2].rate == found[0].rate, "shown where the best has its goodput"
    assert sum(plan is THREE for plan, _ in measured.runs) == 2, "out after one run, and one for what is shown"
    assert len(steps) == 3


def test_plans_that_attain_at_no_rate_are_shown_at_that_of_the_program(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch, {ONE: 0.0, TWO: 0.0})
    found = choose_by_goodput(setting_for(workload), [ONE, TWO])
    assert [(one.plan, one.rate, one.goodput_sessions_per_s) for one in found] == [(ONE, 10.0, 0.0), (TWO, 10.0, 0.0)]
    assert all(rate > 0.0 for _, rate in measured.runs)


def test_at_a_given_rate_plans_that_attain_keep_the_programs_order(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    Measured(monkeypatch, {ONE: 1.0, TWO: 3.0, THREE: 9.0})
    found = choose_by_attainment(setting_for(workload), [ONE, TWO, THREE], 3.0)
    assert [one.plan for one in found] == [TWO, THREE, ONE]
    assert all(one.rate == 3.0 and one.goodput_sessions_per_s == 0.0 for one in found)


def neighbours_of(table: dict[SolvedPlan, list[SolvedPlan]]) -> Neighbours:
    return lambda plan: table.get(plan, [])


def test_from_the_best_plan_neighbours_are_climbed_to_as_long_as_they_are_better(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse, better, best = (plan_of(WorkerCount("both", "slow", 2, n)) for n in (1, 2, 3))
    measured = Measured(monkeypatch, {ONE: 4.0, TWO: 3.0, worse: 2.0, better: 6.0, best: 9.0, THREE: 5.0})
    table = {ONE: [worse, better, THREE], better: [ONE, worse, best], best: [better], TWO: [best]}
    found = choose_by_goodput(setting_for(workload), [ONE, TWO], neighbours_of(table))
    assert [one.plan for one in found] == [best, better, ONE, TWO]
    assert sum(plan is worse for plan, _ in measured.runs) == 1, "out after one run, and not seen again"
    assert not any(plan is THREE for plan, _ in measured.runs), "after what is better comes what is beside that"


def test_climbing_ends(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [plan_of(WorkerCount("both", "slow", 1, 1 + n)) for n in range(20)]
    Measured(monkeypatch, {plan: 2.0 + n for n, plan in enumerate(plans)})
    table = {plan: [after] for plan, after in pairwise(plans)}
    found = choose_by_goodput(setting_for(workload), plans[:1], neighbours_of(table))
    assert found[0].plan is plans[MAX_CLIMBS]


def test_at_a_given_rate_neighbours_are_looked_at_while_the_target_is_missed(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch, {ONE: 1.0, TWO: 3.0, THREE: 9.0})
    table = {ONE: [TWO], TWO: [THREE]}
    found = choose_by_attainment(setting_for(workload), [ONE], 3.0, neighbours_of(table))
    assert [one.plan for one in found] == [TWO, ONE]
    assert not any(plan is THREE for plan, _ in measured.runs)


def test_real_runs_prefer_the_faster_worker(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated, "MEASURED_ROUNDS", 100)
    monkeypatch.setattr(simulated, "MIN_MEASURED_S", 2.0)
    slow, fast = replace(ONE, rate=20.0), replace(TWO, rate=60.0)
    best, other = choose_by_goodput(setting_for(workload), [slow, fast])
    assert (best.plan, other.plan) == (fast, slow)
    assert best.goodput_sessions_per_s > 1.5 * other.goodput_sessions_per_s > 0.0
    assert best.outcome.attainment >= 0.9
