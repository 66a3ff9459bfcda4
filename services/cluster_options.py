"""What `ampd up` and `ampd run` can be told, checked, and as flags of worker processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.engine.names import EngineName
from shared.errors import AmpdError, ErrorCode
from shared.messages import ReplanMode
from shared.policy_flags import build_policy, read_policy_options
from shared.profile_files import load_profile
from shared.transport.names import TransportName

EMULATED_SUFFIX = " (emulated)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """What `ampd up` can be told. port 0: any free port. data_dir None: a temporary folder, removed at the end."""

    num_prefill: int = 1
    num_decode: int = 1
    num_both: int = 0  # workers that take prefills and decodes
    engine: EngineName = "torch"
    profile: str | None = None  # timings of the workers, a profile's name or path; the emulated engine needs one
    time_scale: float = 1.0  # emulated: wall seconds per second of the profile
    parallel_degree: int = 1  # processes (torch) or devices (emulated) of every worker
    replan: ReplanMode = "dry-run"  # what the planner does about roles that do not suit the load
    model: str = "smollm2"  # torch
    policy: str = "ampd"
    disabled_parts: tuple[str, ...] = ()  # of the policy
    policy_options: tuple[str, ...] = ()  # PATH=VALUE
    dtype: str = "auto"  # bfloat16 where the processor multiplies it in hardware, else float32
    device: str = "cpu"
    threads: int = 1
    kv_memory_mb: int = 1024
    kv_transport: TransportName = "auto"
    max_context: int | None = None
    port: int = 0
    data_dir: Path | None = None
    log_dir: Path | None = None
    worker_arguments: tuple[str, ...] = ()  # further flags of every worker process
    planner_arguments: tuple[str, ...] = ()  # and of the planner's

    @property
    def served(self) -> str:
        """The model, for people and for the data directory: sessions of another one cannot be resumed."""
        return self.model if self.engine == "torch" else f"{self.profile}{EMULATED_SUFFIX}"


def check_options(options: ClusterOptions) -> None:
    """Raises AmpdError INVALID_REQUEST for options that do not go together, before anything is started."""
    if options.engine == "emulated":
        if options.profile is None:
            raise AmpdError(
                ErrorCode.INVALID_REQUEST, "--engine emulated needs --profile: the name of one, or a profile's file"
            )
        from shared.engine.emulated import check_time_scale  # numpy: only where it is wanted

        check_time_scale(options.time_scale)
    elif options.time_scale != 1.0:
        raise AmpdError(ErrorCode.INVALID_REQUEST, "--time-scale is of the emulated engine: --engine emulated")
    build_policy(options.policy, options.disabled_parts, read_policy_options(options.policy_options))
    if options.profile is not None:
        load_profile(options.profile).degree(options.parallel_degree)


def policy_arguments(options: ClusterOptions) -> list[str]:
    """Flags that tell a process how to schedule: the same for the coordinator and for workers."""
    return [
        f"--policy={options.policy}",
        *(f"--disable={part}" for part in options.disabled_parts),
        *(f"--policy-option={option}" for option in options.policy_options),
        *([] if options.profile is None else [f"--profile={options.profile}"]),
    ]


def engine_arguments(options: ClusterOptions, model_dir: Path | None) -> list[str]:
    """Flags that tell a worker process its engine."""
    if model_dir is None:
        return [
            "--engine=emulated",
            f"--time-scale={options.time_scale}",
            f"--parallel-degree={options.parallel_degree}",
            f"--kv-transport={options.kv_transport}",
        ]
    return [
        f"--model-dir={model_dir}",
        f"--dtype={options.dtype}",
        f"--device={options.device}",
        f"--threads={options.threads}",
        f"--kv-memory-mb={options.kv_memory_mb}",
        f"--parallel-degree={options.parallel_degree}",
        f"--kv-transport={options.kv_transport}",
    ]
