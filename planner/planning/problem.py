"""From what a user says to the program's input: profiles, GPUs, a workload and objectives, all checked."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from planner.planning.program import PlanProblem
from planner.planning.worker_kinds import MeasuredKind, measure_kind, measure_load
from planner.planning.workload_model import WorkloadModel
from shared.core.profile import Profile
from shared.errors import AmpdError, ErrorCode
from shared.messages import Slo

MAX_GPUS = 65_536
MAX_RATE = 1e6  # sessions per second: far above it the solver fails


def make_problem(
    profiles: Mapping[str, Profile],
    gpus: Mapping[str, int],
    workload: WorkloadModel,
    slo: Slo,
    *,
    target: float = 0.9,
    measured: Mapping[tuple[str, int], MeasuredKind] | None = None,
) -> PlanProblem:
    """`profiles` and `gpus` by GPU type. `measured`: of running workers, by GPU type and parallel degree; then only
    those degrees are planned with. Raises AmpdError INVALID_REQUEST that names the number at fault."""
    _require(bool(gpus), "no GPUs: give --gpus N, or --gpu-types TYPE:N,...")
    for gpu_type, num_gpus in gpus.items():
        _require(1 <= num_gpus <= MAX_GPUS, f"GPUs of {gpu_type} must be 1 to {MAX_GPUS}, got {num_gpus}")
    rate = workload.sessions_per_s
    _require(rate <= MAX_RATE, f"the rate must be at most {MAX_RATE:g} sessions/s, got {rate:g}")
    _require(0.0 < target < 1.0, f"the share of rounds on time must be between 0 and 1, got {target:g}")
    _check_alike(profiles)
    degrees = {gpu_type: _list_degrees(profiles[gpu_type]) for gpu_type in gpus}
    load = measure_load(workload, slo)
    kinds = tuple(
        measure_kind(
            gpu_type, profiles[gpu_type], degree, workload, load, slo, (measured or {}).get((gpu_type, degree))
        )
        for gpu_type in gpus
        for degree in degrees[gpu_type]
        if measured is None or (gpu_type, degree) in measured
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


def _list_degrees(profile: Profile) -> list[int]:
    """Ascending, those that fit into a node. Each must divide the next: only then do the program's rows say exactly
    which workers can be packed into nodes."""
    node_size = profile.links.devices_per_node
    every = sorted(one.parallel_degree for one in profile.degrees)
    degrees = [degree for degree in every if degree <= node_size]
    _require(bool(degrees), f"profile {profile.name}: its smallest parallel degree is {every[0]}, its nodes have "
                            f"{node_size} GPUs (links.devices_per_node)")  # fmt: skip
    for small, large in pairwise(degrees):
        is_multiple = large > small and large % small == 0
        _require(is_multiple, f"profile {profile.name}: a parallel degree of {large} is no multiple of {small}")
    return degrees


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AmpdError(ErrorCode.INVALID_REQUEST, message)
