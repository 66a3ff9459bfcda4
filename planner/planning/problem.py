"""From what a user says to the program's input: profiles, GPUs, a workload and objectives, all checked."""

from __future__ import annotations

from collections.abc import Mapping

from planner.planning.program import PlanProblem
from planner.planning.worker_kinds import measure_kind, measure_load
from planner.planning.workload_model import WorkloadModel
from shared.core.profile import Profile
from shared.errors import AmpdError, ErrorCode
from shared.messages import Slo

MAX_GPUS = 65_536


def make_problem(
    profiles: Mapping[str, Profile], gpus: Mapping[str, int], workload: WorkloadModel, slo: Slo, *, target: float = 0.9
) -> PlanProblem:
    """`profiles` and `gpus` by GPU type. Raises AmpdError INVALID_REQUEST that names the number at fault."""
    _require(bool(gpus), "no GPUs: give --gpus N, or --gpu-types TYPE:N,...")
    for gpu_type, num_gpus in gpus.items():
        _require(1 <= num_gpus <= MAX_GPUS, f"GPUs of {gpu_type} must be 1 to {MAX_GPUS}, got {num_gpus}")
    _require(0.0 < target < 1.0, f"the share of rounds on time must be between 0 and 1, got {target:g}")
    _check_alike(profiles)
    load = measure_load(workload, slo)
    kinds = tuple(
        measure_kind(gpu_type, profiles[gpu_type], degree.parallel_degree, workload, load, slo)
        for gpu_type in gpus
        for degree in profiles[gpu_type].degrees
    )
    return PlanProblem(
        kinds=kinds,
        load=load,
        gpus=dict(gpus),
        rate=workload.sessions_per_s,
        target=target,
        variability=(workload.burstiness + 1.0) / 2.0,
    )


def _check_alike(profiles: Mapping[str, Profile]) -> None:
    """Workers of several GPU types exchange KV: they run the same model."""
    first = next(iter(profiles.values()))
    for profile in profiles.values():
        for name in ("model", "kv_bytes_per_token", "vocab_size"):
            ours, theirs = getattr(first, name), getattr(profile, name)
            _require(ours == theirs, f"profiles {first.name} and {profile.name} differ in {name} ({ours} and {theirs})")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AmpdError(ErrorCode.INVALID_REQUEST, message)
