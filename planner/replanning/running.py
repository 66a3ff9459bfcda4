"""The workers that there are, as the program sees them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.planning.problem import make_problem
from planner.planning.program import PlanProblem
from planner.planning.worker_kinds import MeasuredKind
from planner.planning.workload_model import WorkloadModel
from shared.core.profile import Profile
from shared.messages import Role, Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningWorker:
    """`gpu_type`: the name under which its profile is known. num_kv_tokens: of sessions that it would have to hand on
    when it no longer decodes. pinned: its role is not to be changed."""

    worker_id: str
    gpu_type: str
    parallel_degree: int
    role: Role
    num_kv_tokens: int = 0
    pinned: bool = False

    @property
    def decodes(self) -> bool:
        return self.role != "prefill"

    @property
    def kind(self) -> tuple[str, int]:
        return self.gpu_type, self.parallel_degree


@dataclass(frozen=True, slots=True)
class RoleCounts:
    """Of each kind of worker (GPU type, parallel degree): how many there are, and how many of them decode."""

    total: dict[tuple[str, int], int]
    decoding: dict[tuple[str, int], int]


def count_roles(workers: Sequence[RunningWorker]) -> RoleCounts:
    total = Counter(worker.kind for worker in workers)
    decoding = Counter(worker.kind for worker in workers if worker.decodes)
    return RoleCounts(dict(total), {kind: decoding[kind] for kind in total})


def pose_problem(
    workers: Sequence[RunningWorker],
    profiles: Mapping[str, Profile],
    measured: Mapping[tuple[str, int], MeasuredKind],
    workload: WorkloadModel,
    slo: Slo,
) -> PlanProblem:
    """What these workers could do for the workload. `profiles` by GPU type. Raises AmpdError INVALID_REQUEST."""
    gpus = Counter[str]()
    for worker in workers:
        gpus[worker.gpu_type] += worker.parallel_degree
    return make_problem(profiles, gpus, workload, slo, measured=measured)
