"""The engines a worker can have, behind one interface: --engine torch computes, --engine emulated keeps time."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from services.worker.kv_lanes import wants_shared_pool
from shared.core.chunking import ChunkParameters
from shared.core.measured_costs import build_profile_costs
from shared.core.step_costs import StepCosts
from shared.engine.engine_loop import StepRunner
from shared.engine.names import EngineName
from shared.errors import AmpdError, ErrorCode
from shared.profile_files import load_profile
from shared.text import TextCodec
from shared.transport.client import KvClient
from shared.transport.lanes import Lanes

log = structlog.get_logger(__name__)

MAX_LATE_SHARE = 0.05  # of the emulated time: beyond it the durations measured are the machine's, not the profile's


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEngine:
    """What an engine brings. The token and batch limits are what suits it where the command line says nothing."""

    runner: StepRunner
    codec: TextCodec
    model: str  # the name in heartbeats
    costs: StepCosts | None  # of this worker, in wall seconds; None: no profile was given
    profile: str = ""  # its name
    parallel_degree: int = 1
    host_kv_bytes: int = 0  # host memory for evicted KV, where the command line says nothing
    host_read_s: Callable[[int], float] | None = None  # emulated: how long reading n tokens back lasts
    make_kv_client: Callable[[str, int, Lanes], KvClient]  # (worker_id, incarnation, lanes)
    chunk_tokens: int
    max_prefill_tokens: int
    max_batch: int
    watch: Callable[[], Coroutine[Any, Any, None]] | None = None  # raises when the engine can no longer work
    close: Callable[[], None] = lambda: None  # called once, when the worker stops


def load_engine(args: argparse.Namespace) -> WorkerEngine:
    """Load what the arguments of build_parser ask for. Raises AmpdError INVALID_REQUEST."""
    engine: EngineName = args.engine
    match engine:
        case "torch":
            return _load_torch(args)
        case "emulated":
            return _load_emulated(args)


def _load_torch(args: argparse.Namespace) -> WorkerEngine:
    # torch takes seconds to import: after --help and argument errors, and for this engine alone
    from shared.engine.kv_memory import blocks_in_memory
    from shared.engine.model_runner import ModelRunner

    if args.model_dir is None:
        raise AmpdError(ErrorCode.INVALID_REQUEST, "--engine torch needs --model-dir")
    model_dir: Path = args.model_dir
    profile = load_profile(args.profile) if args.profile else None
    costs = None if profile is None else StepCosts.from_profile(profile, args.parallel_degree)
    runner = ModelRunner.load(
        model_dir,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        num_blocks=blocks_in_memory(
            model_dir,
            dtype=args.dtype,
            device=args.device,
            block_size=args.block_size,
            kv_memory_bytes=int(args.kv_memory_mb * 1e6),
        ),
        block_size=args.block_size,
        attention=args.attention,
        parallel_degree=args.parallel_degree,
        shared_pool=wants_shared_pool(args.kv_transport, args.device),
    )
    return WorkerEngine(
        runner=runner,
        codec=TextCodec.load(model_dir),
        model=model_dir.name,
        costs=costs,
        profile="" if profile is None else profile.name,
        parallel_degree=args.parallel_degree,
        make_kv_client=lambda worker_id, incarnation, lanes: KvClient(
            runner.pool, worker_id=worker_id, incarnation=incarnation, lanes=lanes
        ),
        chunk_tokens=128,
        max_prefill_tokens=512,
        max_batch=64,
        watch=runner.watch,
        close=runner.close,
    )


def _load_emulated(args: argparse.Namespace) -> WorkerEngine:
    from shared.engine.emulated import EmulatedRunner
    from shared.engine.emulated_transfer import EmulatedKvClient, EmulatedLink
    from shared.id_only_codec import IdOnlyCodec

    if not args.profile:
        raise AmpdError(ErrorCode.INVALID_REQUEST, "--engine emulated needs --profile")
    if args.model_dir is not None:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST, "--engine emulated makes up its tokens, so it has no text: leave out --model-dir"
        )
    if args.kv_transport not in ("auto", "tcp"):
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"--engine emulated keeps the time of its profile's links, not of {args.kv_transport}: leave out "
            "--kv-transport",
        )
    profile = load_profile(args.profile)
    runner = EmulatedRunner(
        profile, parallel_degree=args.parallel_degree, time_scale=args.time_scale, block_size=args.block_size
    )

    costs = build_profile_costs(profile, args.parallel_degree, args.time_scale)
    assert costs is not None, "the runner has checked the degree"

    def make_kv_client(worker_id: str, incarnation: int, lanes: Lanes) -> KvClient:
        link = EmulatedLink(costs)
        return EmulatedKvClient(runner.pool, worker_id=worker_id, incarnation=incarnation, link=link)

    def close() -> None:
        """Say how true the emulation was: steps that end late are those of a machine with too little time for us."""
        late_share = runner.late_s / runner.busy_s if runner.busy_s else 0.0
        say = log.warning if late_share > MAX_LATE_SHARE else log.info
        say("emulation_ended", busy_s=round(runner.busy_s, 3), late_share=round(late_share, 4))

    return WorkerEngine(
        runner=runner,
        codec=IdOnlyCodec(vocab_size=runner.vocab_size, eos_token_ids=runner.eos_token_ids),
        model=profile.name,
        costs=costs,
        profile=profile.name,
        parallel_degree=args.parallel_degree,
        host_kv_bytes=profile.host_kv_bytes * args.parallel_degree,
        host_read_s=lambda num_tokens: num_tokens * costs.kv_bytes_per_token / costs.host_bytes_per_s,
        make_kv_client=make_kv_client,
        chunk_tokens=ChunkParameters().chunk_tokens,
        max_prefill_tokens=ChunkParameters().max_prefill_tokens,
        max_batch=512,  # as far as profiles go
        close=close,
    )
