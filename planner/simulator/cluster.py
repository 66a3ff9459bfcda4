"""What is simulated: how many workers of each kind, with which parallel degree, from which profile."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from planner.simulator.event_heap import EventHeap
from planner.simulator.links import Links
from planner.simulator.worker import SimWorker
from planner.simulator.worker_reports import WorkerReports
from shared.core.load import WorkerLoad
from shared.core.policies import SchedulingPolicy
from shared.core.profile import Profile
from shared.core.step_costs import StepCosts
from shared.errors import AmpdError, ErrorCode
from shared.messages import Role, Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGroup:
    """`profile`: of another GPU type than the cluster's own."""

    role: Role
    count: int
    parallel_degree: int
    profile: Profile | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`predicted_scale`: the scheduler's durations over the true ones, for what-if runs. `control_scale`: of the time
    that our own messages take, and of the heartbeats' period. `pauses`: the step model in which a local prefill stops
    the batch, instead of running in mixed steps."""

    profile: Profile
    groups: tuple[WorkerGroup, ...]
    predicted_scale: float = 1.0
    bandwidth_scale: float = 1.0
    control_scale: float = 1.0
    pauses: bool = False
    max_batch: int = 512  # sequences that decode in a step: profiles know no more
    kv_tokens: int | None = None  # of each worker; None: what the profile says

    @property
    def num_devices(self) -> int:
        return sum(group.count * group.parallel_degree for group in self.groups)

    def describe(self) -> str:
        return " + ".join(f"{g.count} {g.role} x {g.parallel_degree}" for g in self.groups if g.count)


def build_workers(
    reports: WorkerReports,
    events: EventHeap,
    links: Links,
    cluster: Cluster,
    policy: SchedulingPolicy,
    slo: Slo,
) -> list[SimWorker]:
    """Workers fill the nodes one after another. Raises AmpdError for a cluster that cannot serve."""
    if not any(group.count for group in cluster.groups if group.role != "prefill"):
        raise AmpdError(ErrorCode.INVALID_REQUEST, "no worker decodes: give at least one with --decode or --both")
    workers: list[SimWorker] = []
    numbers: Counter[str] = Counter()
    num_devices = 0
    for group in cluster.groups:
        profile = group.profile or cluster.profile
        for _ in range(group.count):
            true_costs = StepCosts.from_profile(profile, group.parallel_degree)
            believed = StepCosts.from_profile(profile, group.parallel_degree, scale=cluster.predicted_scale)
            if cluster.kv_tokens is not None:
                true_costs.num_kv_tokens = cluster.kv_tokens
            load = WorkerLoad(
                worker_id=f"{group.role}-{numbers[group.role]:03d}",
                incarnation=1,
                role=group.role,
                costs=believed,
                num_kv_tokens=true_costs.num_kv_tokens,
                node=num_devices // profile.links.devices_per_node,
            )
            host_kv_tokens = profile.host_kv_bytes * group.parallel_degree // profile.kv_bytes_per_token
            workers.append(
                SimWorker(
                    reports,
                    events,
                    links,
                    len(workers),
                    load,
                    true_costs,
                    policy,
                    host_kv_tokens=host_kv_tokens,
                    itl_slo_s=slo.itl_s,
                    max_batch=cluster.max_batch,
                    pauses=cluster.pauses,
                )
            )
            numbers[group.role] += 1
            num_devices += group.parallel_degree
    return workers
