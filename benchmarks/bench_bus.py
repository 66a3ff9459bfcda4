"""Bus and session log: request latency and CPU against nats-py alone, append latency, load rate.

    python benchmarks/bench_bus.py --out bus.json

Client and responder are separate processes on a nats-server started here; CPU is user + system time of a process.
Medians over --repeats runs. `append` fsyncs every second (the default) or, `append_fsync`, before each answer.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import nats
import uvloop

from shared.bus import BusMessage
from shared.core.types import SessionKey
from shared.nats_bus import connect_nats_bus
from shared.nats_server import NatsServer
from shared.record_log import JetStreamRecordLog

PAYLOAD = bytes(1024)
RECORD = bytes(2048)
CONCURRENCIES = (1, 32, 128)
Call = Callable[[], Awaitable[Any]]


async def respond(url: str, kind: str) -> None:
    """The responder process: one line on stdin asks for its CPU seconds so far; the end of stdin ends it."""
    if kind == "bus":
        bus = await connect_nats_bus(url, name="responder")

        async def echo(message: BusMessage) -> None:
            await message.respond(message.data)

        await bus.subscribe("bench.echo", echo)
    else:
        client = await nats.connect(url)

        async def echo_plain(message: Any) -> None:
            await message.respond(message.data)

        await client.subscribe("bench.echo", cb=echo_plain)
        await client.flush()
    print("ready", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(time.process_time(), flush=True)


async def measure(call: Call, num_calls: int, in_flight: int) -> dict[str, float]:
    """Latencies in us and calls a second of num_calls calls, in_flight at once; CPU of this process."""
    latencies: list[float] = []
    left = num_calls

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            started = time.perf_counter()
            await call()
            latencies.append(time.perf_counter() - started)

    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(caller() for _ in range(in_flight)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    latencies.sort()
    return {
        "p50_us": statistics.median(latencies) * 1e6,
        "p99_us": latencies[int(len(latencies) * 0.99)] * 1e6,
        "calls_per_s": num_calls / wall,
        "client_cpu_us": cpu / num_calls * 1e6,
    }


async def measure_requests(url: str, kind: str, num_calls: int, in_flight: int) -> dict[str, float]:
    responder = subprocess.Popen(  # noqa: ASYNC220 - outside what is timed
        [sys.executable, __file__, "--respond", kind, "--url", url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert responder.stdin is not None
    assert responder.stdout is not None

    def ask_cpu() -> float:
        print("cpu", file=responder.stdin, flush=True)
        return float(responder.stdout.readline())

    responder.stdout.readline()
    if kind == "bus":
        bus = await connect_nats_bus(url, name="client")
        call: Call = functools.partial(bus.request, "bench.echo", PAYLOAD, timeout_s=30.0)
        close: Call = bus.close
    else:
        client = await nats.connect(url)
        call = functools.partial(client.request, "bench.echo", PAYLOAD, timeout=30.0)
        close = client.close
    await measure(call, 200, in_flight)  # warm up
    before = ask_cpu()
    result = await measure(call, num_calls, in_flight)
    result["responder_cpu_us"] = (ask_cpu() - before) / num_calls * 1e6
    await close()
    responder.stdin.close()
    responder.wait()
    responder.stdout.close()
    return result


async def measure_appends(url: str, num_calls: int, in_flight: int) -> dict[str, float]:
    bus = await connect_nats_bus(url, name="appender")
    log = await JetStreamRecordLog.open(bus)
    free = [SessionKey("bench", f"{in_flight}-{i}-{time.monotonic_ns()}") for i in range(in_flight)]
    last = dict.fromkeys(free, 0)

    async def append() -> None:
        key = free.pop()
        last[key] = await log.append(key, RECORD, expected_sequence=last[key])
        free.append(key)

    result = await measure(append, num_calls, in_flight)
    await bus.close()
    return result


async def measure_load(url: str) -> dict[str, float]:
    bus = await connect_nats_bus(url, name="loader")
    log = await JetStreamRecordLog.open(bus)
    started = time.perf_counter()
    num_records = 0
    async for _ in log.load():
        num_records += 1
    seconds = time.perf_counter() - started
    await bus.close()
    return {"records": num_records, "seconds": seconds, "records_per_s": num_records / seconds}


def median_of(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


async def run_all(server: NatsServer, synced: NatsServer, num_calls: int, repeats: int) -> dict[str, Any]:
    async def repeat(once: Callable[[], Awaitable[dict[str, float]]]) -> dict[str, float]:
        return median_of([await once() for _ in range(repeats)])

    results: dict[str, Any] = {"request_nats_py": {}, "request_bus": {}, "append": {}, "append_fsync": {}}
    for n in CONCURRENCIES:
        results["request_nats_py"][n] = await repeat(lambda n=n: measure_requests(server.url, "plain", num_calls, n))
        results["request_bus"][n] = await repeat(lambda n=n: measure_requests(server.url, "bus", num_calls, n))
        results["append"][n] = await repeat(lambda n=n: measure_appends(server.url, num_calls, n))
        results["append_fsync"][n] = await repeat(lambda n=n: measure_appends(synced.url, max(num_calls // 5, 10), n))
    results["load"] = await repeat(lambda: measure_load(server.url))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here; default: standard output")
    parser.add_argument("--requests", type=int, default=3000, help="calls in a run (default 3000)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median is taken (default 3)")
    parser.add_argument("--respond", choices=("bus", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.respond:
        uvloop.run(respond(args.url, args.respond))
        return 0
    with (
        tempfile.TemporaryDirectory() as folder,
        NatsServer(Path(folder) / "a") as server,
        NatsServer(Path(folder) / "b", sync_interval="always") as synced,
    ):
        results = uvloop.run(run_all(server, synced, args.requests, args.repeats))
    results["config"] = {
        "requests": args.requests,
        "repeats": args.repeats,
        "payload_bytes": len(PAYLOAD),
        "record_bytes": len(RECORD),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    text = json.dumps(results, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
