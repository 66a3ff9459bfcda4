"""One simulated run, from names and numbers to records: what `ampd simulate` and `loadgen compare` call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from loadgen.plan import Plan
from loadgen.records import RoundRecord, RunInfo
from loadgen.run import describe_machine
from loadgen.workload import Workload
from planner.simulator.cluster import Cluster, WorkerGroup
from planner.simulator.failures import Failure
from planner.simulator.results import describe_result, record_rounds
from planner.simulator.simulation import Simulation
from shared.core.policies import SchedulingPolicy
from shared.core.profile import Profile
from shared.errors import AmpdError, ErrorCode
from shared.messages import Slo
from shared.policy_flags import build_policy, read_policy_options
from shared.profile_files import load_profile

StepModel = Literal["mixed", "pause"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSetup:
    """The cluster, how it schedules, and what goes wrong. Workers are numbered through the groups, in their order."""

    profile: str
    groups: tuple[WorkerGroup, ...]
    policy: str
    disabled_parts: tuple[str, ...] = ()
    policy_options: tuple[str, ...] = ()  # PATH=VALUE
    slo: Slo = field(default_factory=Slo)
    step_model: StepModel = "mixed"
    predicted_scale: float = 1.0  # the scheduler's durations over the true ones
    gap_factor: float = 1.0  # its tool times over the true ones
    bandwidth_scale: float = 1.0
    control_scale: float = 1.0  # of the time that our own messages take
    failures: tuple[Failure, ...] = ()

    def build_policy(self) -> SchedulingPolicy:
        return build_policy(self.policy, self.disabled_parts, read_policy_options(self.policy_options))

    def build_cluster(self) -> Cluster:
        return Cluster(
            profile=load_profile(self.profile),
            groups=tuple(group for group in self.groups if group.count),
            predicted_scale=self.predicted_scale,
            bandwidth_scale=self.bandwidth_scale,
            control_scale=self.control_scale,
            pauses=self.step_model == "pause",
        )


def check_setup(setup: SimulationSetup) -> None:
    """Raises AmpdError INVALID_REQUEST that says what to change, before anything is simulated."""
    cluster = setup.build_cluster()
    setup.build_policy()
    for group in cluster.groups:
        cluster.profile.degree(group.parallel_degree)
    if not any(group.role != "prefill" for group in cluster.groups):
        raise AmpdError(ErrorCode.INVALID_REQUEST, "no worker decodes: give at least one with --decode or --both")
    num_workers = sum(group.count for group in cluster.groups)
    for failure in setup.failures:
        if failure.index >= num_workers:
            raise AmpdError(
                ErrorCode.INVALID_REQUEST,
                f"--fail {failure.index}@...: there are {num_workers} workers, numbered from 0: prefill workers first, "
                "then decode workers, then those for both",
            )


def simulate_plan(
    setup: SimulationSetup, plan: Plan, on_progress: Callable[[int], None] | None = None
) -> tuple[list[RoundRecord], dict[str, Any]]:
    """Every offered round's record, and the report's `simulation`. `on_progress` is told how many rounds have ended."""
    cluster = setup.build_cluster()
    simulation = Simulation(
        cluster, setup.build_policy(), plan.sessions, setup.slo, failures=setup.failures, gap_factor=setup.gap_factor
    )
    started_s = time.perf_counter()
    result = simulation.run(on_progress)
    wall_s = time.perf_counter() - started_s
    return record_rounds(result, plan.sessions), {**describe_setup(setup, cluster), **describe_result(result, wall_s)}


def describe_setup(setup: SimulationSetup, cluster: Cluster) -> dict[str, Any]:
    return {
        "profile": describe_profile(cluster.profile),
        "cluster": cluster.describe(),
        "num_devices": cluster.num_devices,
        "disabled_parts": list(setup.disabled_parts),
        "policy_options": list(setup.policy_options),
        "step_model": setup.step_model,
        "predicted_scale": setup.predicted_scale,
        "gap_factor": setup.gap_factor,
        "bandwidth_scale": setup.bandwidth_scale,
        "control_scale": setup.control_scale,
        "failures": [asdict(failure) for failure in setup.failures],
    }


def describe_profile(profile: Profile) -> dict[str, Any]:
    provenance = {key: profile.provenance[key] for key in ("kind", "source") if key in profile.provenance}
    return {"name": profile.name, "device": profile.device, "provenance": provenance}


def describe_run(
    setup: SimulationSetup,
    workload: Workload,
    plan: Plan,
    trace: dict[str, Any],
    simulation: dict[str, Any],
    warm_up_s: float = 0.0,
) -> RunInfo:
    """With a duration, rounds sent after it are left out of the report: sessions no longer arrive by then."""
    return RunInfo(
        kind="simulated",
        policy=setup.policy,
        model=load_profile(setup.profile).model,
        seed=workload.seed,
        slo=setup.slo,
        rounds_offered=plan.num_rounds,
        sessions_offered=len(plan.sessions),
        config={**asdict(workload), "profile": setup.profile, "policy": setup.policy, "warm_up": warm_up_s},
        trace=trace,
        machine=describe_machine(),
        warm_up_s=warm_up_s,
        until_s=workload.duration,
        simulation=simulation,
    )
