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
from services.worker.engines import load_engine
from services.worker.kv_lanes import build_lanes
from services.worker.outbox import Outbox
from services.worker.runtime import WorkerRuntime
from services.worker.streams import StreamPublisher
from shared.engine.engine_loop import EngineLoop, build_scheduler
from shared.engine.names import EngineName
from shared.errors import AmpdError, ErrorCode
from shared.messages import Role
from shared.nats_bus import connect_nats_bus
from shared.policy_flags import add_policy_flags, build_policy, read_policy_options
from shared.service import ServiceContext, run_service
from shared.transport.leases import LeaseTable
from shared.transport.names import TRANSPORT_HELP, TransportName
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
    add("--engine", choices=get_args(EngineName), default="torch", help="emulated: keeps the time of --profile")
    add("--model-dir", type=Path, help="torch: Hugging Face model folder on disk")
    add("--profile", default="", help="timings, by which emulated steps last: a name that ships, or a JSON file's path")
    add("--time-scale", type=float, default=1.0, help="emulated: wall seconds per second of the profile")
    add("--parallel-degree", type=int, default=1, help="processes (torch) or devices (emulated) that hold the model")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--device", default="cpu", help="cpu or cuda[:N] (CUDA paths have not been run on a GPU yet)")
    add("--threads", type=int, default=1, help="CPU threads of the forward pass")
    add("--attention", default="auto", help="attention back end")
    add("--kv-memory-mb", type=float, default=1024, help="size of the KV pool")
    add("--block-size", type=int, default=16, help="tokens in a KV block")
    add("--max-context", type=int, default=0, help="0: what the model takes")
    own = "0: the policy's option, else the engine's own"
    add("--chunk-tokens", type=int, default=0, help=f"prefill tokens in a step that also decodes; {own}")
    add("--max-prefill-tokens", type=int, default=0, help=f"in a step that does not decode; {own}")
    add("--max-batch", type=int, default=0, help="sequences in a step; 0: the engine's own")
    add_policy_flags(parser)
    add("--host-kv-mb", type=float, default=0, help="host memory for evicted KV, if the policy has it; 0: the engine's")
    add("--lease-ttl", type=float, default=15.0, help="seconds a KV lease lives without renewal")
    add("--kv-listen", action="append", help="tcp://HOST:PORT or unix:///PATH, repeatable; default: both, local")
    add("--kv-transport", choices=get_args(TransportName), default="auto", help=TRANSPORT_HELP)
    add("--kv-advertise-host", default="", help="host name other workers reach the TCP socket by")
    own_node = "default: the host's name; an emulated worker is a node of its own, since that is what its link is"
    add("--node", default="", help=f"workers of one node exchange KV over its fast links; {own_node}")
    add("--drain-timeout", type=float, default=10.0, help="seconds running rounds get to finish on SIGTERM")
    return parser


def main(role: Role) -> int:
    args = build_parser(role).parse_args()
    return run_service(functools.partial(run_worker, args=args), name=f"{role}-worker")


async def run_worker(service: ServiceContext, *, args: argparse.Namespace) -> None:
    clock = time.monotonic
    worker_id = args.worker_id or f"{args.role}-{socket.gethostname()}-{secrets.token_hex(3)}"
    incarnation = secrets.randbits(63)
    options = read_policy_options(args.policy_option)
    policy = build_policy(args.policy, args.disable, options)
    engine = load_engine(args)
    runner, chunk = engine.runner, policy.chunk
    own_chunk = chunk.chunk_tokens if "routing.chunk.chunk_tokens" in options else engine.chunk_tokens
    own_prefill = (
        chunk.max_prefill_tokens if "routing.chunk.max_prefill_tokens" in options else engine.max_prefill_tokens
    )
    scheduler = build_scheduler(
        runner,
        chunk_tokens=args.chunk_tokens or own_chunk,
        max_prefill_tokens=args.max_prefill_tokens or own_prefill,
        max_batch=args.max_batch or engine.max_batch,
    )
    leases = LeaseTable(clock)
    secret = _cluster_secret()
    bus = await connect_nats_bus(args.nats_url, name=worker_id, on_lost=service.fail)
    with tempfile.TemporaryDirectory(prefix="ampd-kv-") as socket_dir:
        listen = args.kv_listen or [f"unix://{socket_dir}/kv.sock", "tcp://127.0.0.1:0"]
        lanes = build_lanes(args.kv_transport, runner.pool, worker_id)
        server = KvServer(
            runner.pool, leases, worker_id=worker_id, incarnation=incarnation, secret=secret, listen=listen, lanes=lanes
        )
        endpoints = _advertised(server.start(), args.kv_advertise_host)
        client = engine.make_kv_client(worker_id, incarnation, lanes)
        context = WorkerContext(
            worker_id=worker_id,
            incarnation=incarnation,
            bus=bus,
            engine=EngineLoop(runner, scheduler, clock=clock),
            leases=leases,
            kv_client=client,
            kv_endpoints=endpoints,
            codec=engine.codec,
            outbox=Outbox(bus),
            streams=StreamPublisher(bus),
            clock=clock,
            max_context_tokens=min(args.max_context or runner.max_context_tokens, runner.max_context_tokens),
            policy=policy,
            costs=engine.costs,
            host_kv_bytes=int(args.host_kv_mb * 1e6) or engine.host_kv_bytes,
            host_read_s=engine.host_read_s,
            parallel_degree=engine.parallel_degree,
            profile=engine.profile,
            node=choose_node(args),
            limits=WorkerLimits(lease_ttl_s=args.lease_ttl),
        )
        try:
            runtime = WorkerRuntime(context, role=args.role, model=engine.model)
            if engine.watch is not None:
                context.spawn(engine.watch(), "engine watch")
            await runtime.serve(service.stop, drain_timeout_s=args.drain_timeout)
        finally:
            await client.close()
            server.close()
            lanes.close()
            await bus.close()
            engine.close()


def choose_node(args: argparse.Namespace) -> str:
    node: str = args.node
    return node or ("" if args.engine == "emulated" else socket.gethostname())


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
