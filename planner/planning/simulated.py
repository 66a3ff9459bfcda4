"""The program's best plans, simulated with the policy that will run on them: the best of them is the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loadgen.workload import Workload
from planner.planning.plans import SolvedPlan, WorkerCount
from planner.simulator.cluster import Cluster, WorkerGroup
from planner.simulator.goodput import find_goodput
from planner.simulator.outcome import Outcome
from planner.simulator.scenario import Scenario
from shared.core.policies import SchedulingPolicy
from shared.core.profile import Profile
from shared.messages import Slo

MEASURED_ROUNDS = 3_000  # a run is measured for about as many, or as long as MIN_MEASURED_S
MIN_MEASURED_S = 10.0
GAIN = 1.02  # a plan must do this much better to replace the best so far
GROWTH = 1.15
MAX_CLIMBS = 4

Neighbours = Callable[[SolvedPlan], Sequence[SolvedPlan]]
Progress = Callable[[], None]  # called after each plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all plans are simulated with. `workload`: its rate is that of each run, its duration set here."""

    profiles: Mapping[str, Profile]
    workload: Workload
    warm_up_s: float
    rounds_per_session: float
    policy: SchedulingPolicy
    slo: Slo
    target: float = 0.9
    seed: int = 0

    def scenario(self, plan: SolvedPlan, rate: float) -> Scenario:
        """A run of it is measured until its last TTFT objective, which may be longer than what is measured."""
        measured_s = max(MIN_MEASURED_S, MEASURED_ROUNDS / (rate * self.rounds_per_session))
        return Scenario(
            workload=replace(self.workload, duration=self.warm_up_s + measured_s + self.slo.ttft_s),
            warm_up_s=self.warm_up_s,
            cluster=make_cluster(plan, self.profiles),
            policy=self.policy,
            slo=self.slo,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """`outcome` is at `rate`. goodput: 0 when another plan was better and this one was not measured to its end, when it
    attains at no rate, and where it was not asked for."""

    plan: SolvedPlan
    rate: float
    outcome: Outcome
    goodput_sessions_per_s: float


def make_cluster(plan: SolvedPlan, profiles: Mapping[str, Profile]) -> Cluster:
    first = profiles[plan.workers[0].gpu_type]
    groups = tuple(
        WorkerGroup(
            role=one.role,
            count=one.replicas,
            parallel_degree=one.parallel_degree,
            profile=None if profiles[one.gpu_type] is first else profiles[one.gpu_type],
        )
        for one in plan.workers
    )
    return Cluster(profile=first, groups=groups)


def simulate_at(setting: Setting, plan: SolvedPlan, rate: float) -> Outcome:
    return setting.scenario(plan, rate).run(rate, setting.seed)[0]


def choose_by_goodput(
    setting: Setting,
    plans: Sequence[SolvedPlan],
    neighbours: Neighbours = lambda _: (),
    on_progress: Progress = lambda: None,
) -> list[Simulated]:
    """Best first. A plan that does not meet the target just above the best goodput so far is out after one run, and a
    neighbour that does not is not in the list."""
    found: list[Simulated] = []

    def enter(plan: SolvedPlan, is_neighbour: bool) -> bool:
        best = max((one.goodput_sessions_per_s for one in found), default=0.0)
        start, goodput = best * GAIN or plan.rate, 0.0
        scenario = setting.scenario(plan, start)
        if best == 0.0 or _attains(scenario, start, setting):
            result = find_goodput(
                scenario, start=start, lowest=start / 20, target=setting.target, growth=GROWTH, seed=setting.seed
            )
            goodput = result.rate
        is_better = goodput > best
        if is_better or not is_neighbour:
            rate = goodput or best or plan.rate
            outcome, _ = scenario.run(rate, setting.seed)
            found.append(Simulated(plan=plan, rate=rate, outcome=outcome, goodput_sessions_per_s=goodput))
        return is_better

    _climb(plans, neighbours, enter, on_progress)
    return sorted(found, key=lambda one: -one.goodput_sessions_per_s)


def choose_by_attainment(
    setting: Setting,
    plans: Sequence[SolvedPlan],
    rate: float,
    neighbours: Neighbours = lambda _: (),
    on_progress: Progress = lambda: None,
) -> list[Simulated]:
    """At a given rate: those that meet the target first, in the order of the program; then by attainment. Neighbours
    are looked at while none meets it."""
    found: list[Simulated] = []

    def enter(plan: SolvedPlan, is_neighbour: bool) -> bool:
        best = max((one.outcome.attainment for one in found), default=-1.0)
        if is_neighbour and best >= setting.target:
            return False
        outcome = simulate_at(setting, plan, rate)
        is_better = outcome.attainment > best
        if is_better or not is_neighbour:
            found.append(Simulated(plan=plan, rate=rate, outcome=outcome, goodput_sessions_per_s=0.0))
        return is_better

    _climb(plans, neighbours, enter, on_progress)
    return sorted(found, key=lambda one: -min(setting.target, one.outcome.attainment))


def _climb(
    plans: Sequence[SolvedPlan],
    neighbours: Neighbours,
    enter: Callable[[SolvedPlan, bool], bool],
    on_progress: Progress,
) -> None:
    """All plans enter; then neighbours of the best one, until one is better, and the same with that one, MAX_CLIMBS
    times at most. enter: (plan, whether it is a neighbour) -> whether it is the best so far."""
    entered: set[frozenset[WorkerCount]] = set()

    def enter_all(candidates: Sequence[SolvedPlan], *, are_neighbours: bool) -> Iterator[SolvedPlan]:
        for plan in candidates:
            workers = frozenset(plan.workers)
            if workers in entered:
                continue
            entered.add(workers)
            is_best = enter(plan, are_neighbours)
            on_progress()
            if is_best:
                yield plan

    bests = list(enter_all(plans, are_neighbours=False))
    best = bests[-1] if bests else None
    for _ in range(MAX_CLIMBS):
        if best is None:
            return
        best = next(enter_all(neighbours(best), are_neighbours=True), None)


def _attains(scenario: Scenario, rate: float, setting: Setting) -> bool:
    outcome, _ = scenario.run(rate, setting.seed, needed_share=setting.target)
    return outcome.attainment >= setting.target
