"""KV transport against its limits, measured in the same run: a plain blocking socket of the same family, and memcpy.

The sender is a process of its own. Every case is repeated, the contenders taking turns; medians are reported. CPU is
that of both processes together. `plain` is sendall / recv_into of one contiguous buffer on a socket with default
options; `plain-1M` has the 1 MiB send buffer that the transport asks for on Unix sockets.

Example:
    python benchmarks/bench_transport.py --repeats 5 --out transport.json
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import os
import platform
import secrets
import socket
import statistics
import tempfile
import time
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.console import Console
from rich.table import Table

from shared.core.types import KvLayout, RoundKey
from shared.transport.client import KvClient
from shared.transport.leases import LeaseTable
from shared.transport.memory import HostKvMemory
from shared.transport.receiver import PullRequest
from shared.transport.server import KvServer
from shared.transport.tickets import TicketClaims, mint

LAYOUT = KvLayout("bench", 16, 8, 64, 16, "bfloat16")  # Llama-3.2-1B: 32 KiB a token, 512 KiB a block
NUM_BLOCKS = 512
MIB, GIB = 1 << 20, 1 << 30
BLOCKS = {"1 MiB": 2, "16 MiB": 32, "256 MiB": 512, "512 scattered blocks": 512}
SECRET = b"benchmark ticket secret, 32 byte"


@dataclass
class Samples:
    """Wall and CPU seconds (both processes) of the repeats of one contender in one case."""

    num_bytes: int
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        wall, cpu = statistics.median(self.wall_s), statistics.median(self.cpu_s)
        return {
            "wall_s": wall,
            "gib_per_s": self.num_bytes / wall / GIB,
            "cpu_s_per_gib": cpu * GIB / self.num_bytes,
            "min_wall_s": min(self.wall_s),
            "max_wall_s": max(self.wall_s),
        }


# ------------------------------------------------------------------------------- the sending process


def serve(pipe: Connection, folder: str) -> None:
    """Answer `cpu`, `grant BLOCK_TABLE` and `plain ENDPOINT SNDBUF NUM_BYTES` until told to `stop`."""
    memory = HostKvMemory(LAYOUT, NUM_BLOCKS)
    memory.blocks.reshape(-1).view(np.uint64)[:] = np.arange(memory.blocks.nbytes // 8, dtype=np.uint64)
    leases = LeaseTable(time.monotonic)
    listen = ["tcp://127.0.0.1:0", f"unix://{folder}/kv.sock"]
    server = KvServer(memory, leases, worker_id="sender", incarnation=1, secret=SECRET, listen=listen)
    plain = {"tcp": socket.create_server(("127.0.0.1", 0)), "unix": socket.socket(socket.AF_UNIX)}
    plain["unix"].bind(f"{folder}/plain.sock")
    plain["unix"].listen()
    pipe.send((server.start(), {name: listener.getsockname() for name, listener in plain.items()}))
    data = memory.blocks.data.cast("B")
    while (command := pipe.recv())[0] != "stop":
        match command:
            case ("cpu",):
                pipe.send(time.process_time())
            case ("grant", key, block_table):
                lease = leases.grant(
                    key,
                    block_table,
                    0,
                    len(block_table) * LAYOUT.block_size,
                    ttl_s=60.0,
                    on_end=lambda lease, end: None,
                    complete=True,
                    num_layers=LAYOUT.num_layers,
                )
                pipe.send((lease.lease_id, lease.generation))
            case ("plain", family, send_buffer, num_bytes):
                _send_plain(plain[family], send_buffer, data[:num_bytes])
    server.close()
    for listener in plain.values():
        listener.close()


def _send_plain(listener: socket.socket, send_buffer: int, data: memoryview) -> None:
    connection, _ = listener.accept()
    with connection:
        if send_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        while connection.recv(1):  # each byte asks for the data once
            connection.sendall(data)


# ----------------------------------------------------------------------------- the receiving process


class Bench:
    def __init__(self, pipe: Connection, client: KvClient, memory: HostKvMemory, endpoints: dict[str, str]) -> None:
        self.pipe = pipe
        self.client = client
        self.memory = memory
        self.endpoints = endpoints
        self.round = 0

    def ask(self, *command: Any) -> Any:
        self.pipe.send(command)
        return self.pipe.recv()

    async def measure(self, samples: Samples, action: Callable[[], Awaitable[None]]) -> None:
        cpu = time.process_time() + self.ask("cpu")
        started = time.perf_counter()
        await action()
        samples.wall_s.append(time.perf_counter() - started)
        samples.cpu_s.append(time.process_time() + self.ask("cpu") - cpu)

    def prepare_pull(self, family: str, source: list[int], target: list[int]) -> Callable[[], Awaitable[None]]:
        self.round += 1
        key = RoundKey("bench", "session", self.round, 1)
        lease_id, generation = self.ask("grant", key, source)
        ticket = mint(
            SECRET,
            TicketClaims(
                key=key,
                source="sender",
                source_incarnation=1,
                destination="receiver",
                destination_incarnation=2,
                max_bytes=GIB,
                ttl_s=60.0,
                nonce=secrets.token_bytes(16),
            ),
        )
        request = PullRequest(
            key=key,
            endpoints=[self.endpoints[family]],
            ticket=ticket,
            source="sender",
            source_incarnation=1,
            lease_id=lease_id,
            generation=generation,
            block_table=target,
            token_start=0,
            token_stop=len(target) * LAYOUT.block_size,
        )

        async def pull() -> None:
            await self.client.start_pull(request).wait()

        return pull


def receive_plain(sock: socket.socket, view: memoryview) -> Callable[[], Awaitable[None]]:
    async def receive() -> None:
        sock.send(b"x")
        received = 0
        while received < len(view):
            received += sock.recv_into(view[received:])

    return receive


def copy_memory(source: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> Callable[[], Awaitable[None]]:
    async def copy() -> None:
        np.copyto(target, source)

    return copy


async def run_case(bench: Bench, plain: dict[str, Any], family: str, name: str, repeats: int) -> dict[str, Any]:
    blocks = BLOCKS[name]
    num_bytes = blocks * LAYOUT.bytes_per_block
    data = bench.memory.blocks.data.cast("B")
    flat, other = bench.memory.blocks.reshape(-1), np.ones(num_bytes, dtype=np.uint8)
    order = np.random.default_rng(7)
    results = {contender: Samples(num_bytes) for contender in ("ampd", "plain", "plain-1M", "memcpy")}
    for repeat in range(repeats + 1):  # the first is a warm-up
        tables = [list(range(blocks)), list(range(blocks))]
        if "scattered" in name:
            tables = [order.permutation(NUM_BLOCKS).tolist() for _ in range(2)]
        pull = bench.prepare_pull(family, *tables)
        kept = {key: Samples(num_bytes) for key in results} if repeat == 0 else results
        await bench.measure(kept["ampd"], pull)
        await bench.measure(kept["memcpy"], copy_memory(other, flat[:num_bytes]))
        for contender, send_buffer in (("plain", 0), ("plain-1M", MIB)):
            with socket.socket(socket.AF_UNIX if family == "unix" else socket.AF_INET) as sock:
                sock.connect(plain[family])
                # the sender is inside this connection until it is closed, and cannot be asked for its CPU time
                before = bench.ask("cpu")
                bench.pipe.send(("plain", family, send_buffer, num_bytes))
                cpu, started = time.process_time(), time.perf_counter()
                await receive_plain(sock, data[:num_bytes])()
                kept[contender].wall_s.append(time.perf_counter() - started)
                cpu = time.process_time() - cpu
            kept[contender].cpu_s.append(cpu + bench.ask("cpu") - before)
    summary: dict[str, Any] = {contender: samples.summary() for contender, samples in results.items()}
    for limit in ("plain", "plain-1M", "memcpy"):
        summary[f"ampd_over_{limit}"] = summary["ampd"]["gib_per_s"] / summary[limit]["gib_per_s"]
    return {"family": family, "case": name, "num_bytes": num_bytes, **summary}


def measure_digests(repeats: int) -> dict[str, float]:
    """GiB/s of digests over 1 MiB chunks that are in the cache, as they are after a receive."""
    chunk = np.random.default_rng(7).integers(0, 256, MIB, dtype=np.uint8).tobytes()
    candidates: dict[str, Callable[[bytes], object]] = {
        "xxhash.xxh3_64": xxhash.xxh3_64_digest,
        "xxhash.xxh3_128": xxhash.xxh3_128_digest,
        "zlib.crc32": zlib.crc32,
        "zlib.adler32": zlib.adler32,
        "hashlib.blake2b": lambda data: hashlib.blake2b(data).digest(),
    }
    speeds = {}
    for name, digest in candidates.items():
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            for _ in range(64):
                digest(chunk)
            times.append((time.perf_counter() - started) / 64)
        speeds[name] = MIB / statistics.median(times) / GIB
    return speeds


async def run(args: argparse.Namespace, pipe: Connection) -> dict[str, Any]:
    endpoints, plain = pipe.recv()
    memory = HostKvMemory(LAYOUT, NUM_BLOCKS)
    cases = []
    for family, endpoint in zip(("tcp", "unix"), endpoints, strict=True):
        # a client for each family: a client reuses its connections, whatever their family
        client = KvClient(memory, worker_id="receiver", incarnation=2)
        bench = Bench(pipe, client, memory, {family: endpoint})
        cases.extend([await run_case(bench, plain, family, name, args.repeats) for name in BLOCKS])
        await client.close()
    return {
        "benchmark": "kv_transport",
        "repeats": args.repeats,
        "layout": {name: getattr(LAYOUT, name) for name in LAYOUT.__slots__},
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "digest_gib_per_s": measure_digests(args.repeats),
        "cases": cases,
    }


def print_report(report: dict[str, Any]) -> None:
    table = Table(title=f"KV transport, medians of {report['repeats']}: GiB/s (CPU s/GiB of both processes)")
    for column in ("family", "case", "ampd", "plain", "plain-1M", "memcpy", "ampd / plain", "/ plain-1M", "/ memcpy"):
        table.add_column(column, justify="left" if column in ("family", "case") else "right")
    for case in report["cases"]:
        speeds = [
            f"{case[name]['gib_per_s']:.2f} ({case[name]['cpu_s_per_gib']:.2f})"
            for name in ("ampd", "plain", "plain-1M", "memcpy")
        ]
        ratios = [f"{case[f'ampd_over_{name}']:.0%}" for name in ("plain", "plain-1M", "memcpy")]
        table.add_row(case["family"], case["case"], *speeds, *ratios)
    console = Console()
    console.print(table)
    digests = ", ".join(f"{name} {speed:.1f}" for name, speed in report["digest_gib_per_s"].items())
    console.print(f"digest of 1 MiB in cache, GiB/s: {digests}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measured repeats of each case (default 5)")
    parser.add_argument("--out", type=Path, help="write the report as JSON to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        sender = context.Process(target=serve, args=(theirs, folder))
        sender.start()
        try:
            report = asyncio.run(run(args, pipe))
        finally:
            pipe.send(("stop",))
            sender.join(10)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    print_report(report)


if __name__ == "__main__":
    main()
