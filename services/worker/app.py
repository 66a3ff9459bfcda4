"""Command line and wiring of a worker process."""

from __future__ import annotations

import argparse
import functools
import os
import secrets
import socket
import tempfile
import time
from pathlib import Path
from typing import get_args

import structlog

from services.worker.context import WorkerContext, WorkerLimits
from services.worker.outbox import Outbox
from services.worker.runtime import WorkerRuntime
from services.worker.streams import StreamPublisher
from shared.engine.engine_loop import EngineLoop, build_scheduler
from shared.errors import AmpdError, ErrorCode
from shared.messages import Role
from shared.nats_bus import connect_nats_bus
from shared.service import ServiceContext, run_service
from shared.text import TextCodec
from shared.transport.client import KvClient
from shared.transport.leases import LeaseTable
from shared.transport.server import KvServer

log = structlog.get_logger(__name__)


def build_parser(role: Role) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m services.{role}_worker",
        description=f"A {role} worker: joins the cluster at --nats-url, leaves on SIGTERM after draining.",
        epilog=f"example: python -m services.{role}_worker --nats-url nats://127.0.0.1:4222 --model-dir models/smollm2",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--nats-url", default=os.environ.get("AMPD_NATS_URL", "nats://127.0.0.1:4222"))
    add("--worker-id", default="", help="unique name; default: role and host name with a random suffix")
    add("--role", choices=get_args(Role), default=role, help="which work it takes")
    add("--model-dir", type=Path, required=True, help="Hugging Face model folder on disk")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--device", default="cpu", help="cpu or cuda[:N] (CUDA paths have not been run on a GPU yet)")
    add("--threads", type=int, default=1, help="CPU threads of the forward pass")
    add("--attention", default="auto", help="attention back end")
    add("--kv-memory-mb", type=float, default=1024, help="size of the KV pool")
    add("--block-size", type=int, default=16, help="tokens in a KV block")
    add("--max-context", type=int, default=0, help="0: what the model takes")
    add("--chunk-tokens", type=int, default=128, help="prefill tokens in a step that also decodes")
    add("--max-prefill-tokens", type=int, default=512, help="prefill tokens in a step that does not decode")
    add("--max-batch", type=int, default=64, help="sequences in a step")
    add("--reordering", choices=("window", "fcfs"), default="window", help="order of the prefill queue")
    add("--lease-ttl", type=float, default=15.0, help="seconds a KV lease lives without renewal")
    add("--kv-listen", action="append", help="tcp://HOST:PORT or unix:///PATH, repeatable; default: both, local")
    add("--kv-advertise-host", default="", help="host name other workers reach the TCP socket by")
    add("--drain-timeout", type=float, default=10.0, help="seconds running rounds get to finish on SIGTERM")
    return parser


def main(role: Role) -> int:
    args = build_parser(role).parse_args()
    return run_service(functools.partial(run_worker, args=args), name=f"{role}-worker")


async def run_worker(service: ServiceContext, *, args: argparse.Namespace) -> None:
    # torch takes seconds to import: after --help and argument errors
    from shared.engine.kv_memory import blocks_in_memory
    from shared.engine.model_runner import ModelRunner

    clock = time.monotonic
    worker_id = args.worker_id or f"{args.role}-{socket.gethostname()}-{secrets.token_hex(3)}"
    incarnation = secrets.randbits(63)
    runner = ModelRunner.load(
        args.model_dir,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        num_blocks=blocks_in_memory(
            args.model_dir,
            dtype=args.dtype,
            device=args.device,
            block_size=args.block_size,
            kv_memory_bytes=int(args.kv_memory_mb * 1e6),
        ),
        block_size=args.block_size,
        attention=args.attention,
    )
    scheduler = build_scheduler(
        runner,
        chunk_tokens=args.chunk_tokens,
        max_prefill_tokens=args.max_prefill_tokens,
        max_batch=args.max_batch,
    )
    leases = LeaseTable(clock)
    secret = _cluster_secret()
    bus = await connect_nats_bus(args.nats_url, name=worker_id, on_lost=service.fail)
    with tempfile.TemporaryDirectory(prefix="ampd-kv-") as socket_dir:
        listen = args.kv_listen or [f"unix://{socket_dir}/kv.sock", "tcp://127.0.0.1:0"]
        server = KvServer(
            runner.pool, leases, worker_id=worker_id, incarnation=incarnation, secret=secret, listen=listen
        )
        endpoints = _advertised(server.start(), args.kv_advertise_host)
        client = KvClient(runner.pool, worker_id=worker_id, incarnation=incarnation)
        context = WorkerContext(
            worker_id=worker_id,
            incarnation=incarnation,
            bus=bus,
            engine=EngineLoop(runner, scheduler, clock=clock),
            leases=leases,
            kv_client=client,
            kv_endpoints=endpoints,
            codec=TextCodec.load(args.model_dir),
            outbox=Outbox(bus),
            streams=StreamPublisher(bus),
            clock=clock,
            max_context_tokens=min(args.max_context or runner.max_context_tokens, runner.max_context_tokens),
            reordering=args.reordering,
            limits=WorkerLimits(lease_ttl_s=args.lease_ttl),
        )
        try:
            runtime = WorkerRuntime(context, role=args.role, model=args.model_dir.name)
            await runtime.serve(service.stop, drain_timeout_s=args.drain_timeout)
        finally:
            await client.close()
            server.close()
            await bus.close()


def _cluster_secret() -> bytes:
    """The key that tickets are signed with, from AMPD_CLUSTER_SECRET (hex) or AMPD_CLUSTER_SECRET_FILE."""
    text = os.environ.get("AMPD_CLUSTER_SECRET", "")
    if path := os.environ.get("AMPD_CLUSTER_SECRET_FILE"):
        text = Path(path).read_text().strip()
    try:
        secret = bytes.fromhex(text)
    except ValueError as error:
        raise AmpdError(ErrorCode.INVALID_REQUEST, "AMPD_CLUSTER_SECRET must be hexadecimal digits") from error
    if len(secret) < 16:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            "AMPD_CLUSTER_SECRET (or _FILE) must hold at least 32 hexadecimal digits, the same for every service",
        )
    return secret


def _advertised(endpoints: tuple[str, ...], host: str) -> tuple[str, ...]:
    """Endpoints as other workers reach them: the TCP host replaced by `host` when given."""
    if not host:
        return endpoints
    return tuple(f"tcp://{host}:{e.rsplit(':', 1)[1]}" if e.startswith("tcp://") else e for e in endpoints)
