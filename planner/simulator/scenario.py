"""A reproducible simulated run from a trace: which sessions, how long, what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil
from pathlib import Path

from loadgen.plan import Plan, PlannedSession
from loadgen.traces import TraceSession, read_trace
from loadgen.workload import Workload, choose_workload, plan_workload
from planner.simulator.cluster import Cluster
from planner.simulator.failures import Failure
from planner.simulator.outcome import Outcome, summarise
from planner.simulator.role_changes import RoleChange
from planner.simulator.simulation import Result, Simulation
from shared.core.patience import ADMISSION_FACTOR
from shared.core.policies import SchedulingPolicy
from shared.messages import Slo

MIN_SESSIONS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """`workload` needs a duration; its rate and seed are those of each run. Rounds sent after `warm_up_s` count."""

    workload: Workload
    warm_up_s: float
    cluster: Cluster
    policy: SchedulingPolicy
    slo: Slo
    failures: tuple[Failure, ...] = field(default=())
    role_changes: tuple[RoleChange, ...] = field(default=())
    admission_factor: float = ADMISSION_FACTOR
    gap_factor: float = 1.0

    def run(self, rate: float, seed: int, *, needed_share: float | None = None) -> tuple[Outcome, Result]:
        """Simulate sessions arriving at `rate` a second. With `needed_share` the run stops as soon as fewer than that
        share of the rounds can still attain: the outcome then has an attainment of 0."""
        plan = plan_at(self.workload, rate, seed)
        duration_s = self.workload.duration or 0.0
        max_missed = None
        if needed_share is not None:
            max_missed = int(1.3 * (1 - needed_share) * plan.num_rounds) + 20
        simulation = Simulation(
            self.cluster,
            self.policy,
            plan.sessions,
            self.slo,
            failures=self.failures,
            role_changes=self.role_changes,
            admission_factor=self.admission_factor,
            gap_factor=self.gap_factor,
            until_s=duration_s,
            max_missed=max_missed,
        )
        result = simulation.run()
        outcome = summarise(result, self.slo, warm_s=self.warm_up_s, until_s=duration_s - self.slo.ttft_s)
        if result.was_stopped:
            outcome = replace(outcome, attainment=0.0, attainment_p99_itl=0.0, session_attainment=0.0)
        return outcome, result


def choose_warm_up_s(sessions: Sequence[PlannedSession], slo: Slo) -> float:
    """The 90th percentile of how long sessions take whose tokens are just on time: before that the cluster still fills,
    and a rate that it cannot sustain looks as if it could."""
    taken_s = sorted(sum(one.delay_s + one.output_tokens * slo.itl_s for one in session.rounds) for session in sessions)
    return float(ceil(taken_s[int(0.9 * len(taken_s))]))


@lru_cache(maxsize=8)
def _read(path: str) -> tuple[TraceSession, ...]:
    return tuple(read_trace(Path(path)))


@lru_cache(maxsize=32)
def plan_at(workload: Workload, rate: float, seed: int) -> Plan:
    """Poisson arrivals at `rate` for the workload's duration, MIN_SESSIONS at least."""
    assert workload.duration is not None, "a scenario's workload has a duration"
    num_sessions = max(MIN_SESSIONS, round(rate * workload.duration))
    wanted = replace(workload, rate=rate, seed=seed, sessions=num_sessions, duration=None, sample=True)
    return plan_workload(choose_workload(_read(workload.file), wanted), wanted)
