"""What the coordinator costs: time and CPU per round, and the latency it adds over a bare NATS request.

    python benchmarks/bench_coordinator.py --out coordinator.json

A real nats-server and a real coordinator process; a fake worker process answers every round at once with --messages
messages of one token. `accepted` is the time from a round's request to its acceptance (after one append to the
record), `finished` to its last stream message; `bare` is a request to the fake worker through the same Bus. CPU is
user + system time of the coordinator and of nats-server (the bare requests' share of the server is not in it).
`core` drives the pure core alone, in this process, without any bus. Medians over --repeats runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import uvloop

from shared import subjects
from shared.bus import Bus, BusMessage
from shared.core.commands import AppendRecord, SendToWorker
from shared.core.coordinator import Coordinator
from shared.core.coordinator_config import CoordinatorConfig
from shared.core.events import (
    ClientRequested,
    CommandReplied,
    HeartbeatSeen,
    RecordAppended,
    StreamSeen,
    WorkerReported,
)
from shared.core.types import SessionKey
from shared.errors import AmpdError
from shared.messages import (
    Ack,
    Heartbeat,
    Message,
    OpenSession,
    RoundEnded,
    RoundFinished,
    RoundTokens,
    RunRound,
    RunRoundAck,
    StopConditions,
    SubmitRound,
    TokensInput,
    Usage,
    WindowStats,
    decode,
    encode,
    pack_token_ids,
    raise_if_error,
)
from shared.nats_bus import connect_nats_bus
from shared.nats_server import NatsServer

CONCURRENCIES = (1, 32, 128)
INPUT = pack_token_ids(list(range(64)))
WORKER_ID = "bench-decode"
ECHO = "bench.echo"
TENANT = "bench"


# ------------------------------------------------------------------------------ the fake worker


def heartbeat(seq: int) -> Heartbeat:
    return Heartbeat(
        worker_id=WORKER_ID,
        incarnation=1,
        role="decode",
        seq=seq,
        model="bench",
        max_context_tokens=1 << 30,
        vocab_size=1 << 15,
        layout_hash="bench",
        kv_endpoints=(),
        num_blocks=1 << 24,
        num_free_blocks=1 << 24,
        block_size=16,
        kv_bytes_per_token=1,
        num_sessions=0,
        num_running=0,
        num_waiting=0,
        num_leases=0,
        queue=(),
        queue_num_tokens=0,
        ttft=WindowStats(),
        itl=WindowStats(),
        prefill_tokens_per_s=0.0,
        decode_step_s=0.0,
        kv_bytes_per_s=0.0,
        draining=False,
    )


def answer_round(run: RunRound) -> tuple[list[Message], RoundEnded]:
    """The stream of a round, and its report: token i is i."""
    num_tokens = run.stop.max_output_tokens
    usage = Usage(
        num_history_tokens=run.num_history_tokens,
        num_input_tokens=run.num_input_tokens,
        num_cached_tokens=0,
        num_output_tokens=num_tokens,
        prefill="local",
        prefill_worker=WORKER_ID,
        decode_worker=WORKER_ID,
    )
    stream: list[Message] = [
        RoundTokens(
            session=run.session,
            round=run.round,
            attempt=run.attempt,
            seq=index,
            start_index=index,
            token_ids=pack_token_ids([index]),
        )
        for index in range(num_tokens)
    ]
    stream.append(
        RoundFinished(
            session=run.session,
            round=run.round,
            attempt=run.attempt,
            seq=num_tokens,
            num_output_tokens=num_tokens,
            finish_reason="length",
            usage=usage,
        )
    )
    report = RoundEnded(
        tenant=run.tenant,
        session=run.session,
        round=run.round,
        attempt=run.attempt,
        worker_id=WORKER_ID,
        incarnation=1,
        output_token_ids=pack_token_ids(list(range(num_tokens))),
        finish_reason="length",
        usage=usage,
        error=None,
    )
    return stream, report


async def run_worker(url: str) -> None:
    """The fake worker's process: ends with its standard input."""
    bus = await connect_nats_bus(url, name=WORKER_ID)

    async def on_command(message: BusMessage) -> None:
        command = decode(message.data)
        if not isinstance(command, RunRound):
            await message.respond(encode(Ack()))
            return
        await message.respond(encode(RunRoundAck(state="started", num_cached_tokens=0, history=None)))
        stream, report = answer_round(command)
        subject = subjects.round_stream(command.tenant, command.session, command.round)
        for part in stream:
            await bus.publish(subject, encode(part))
        await bus.request(subjects.COORDINATOR_EVENT, encode(report), timeout_s=10.0)

    async def echo(message: BusMessage) -> None:
        await message.respond(message.data)

    async def beat() -> None:
        seq = 0
        while True:
            seq += 1
            await bus.publish(subjects.heartbeat(WORKER_ID), encode(heartbeat(seq)))
            await asyncio.sleep(0.5)

    await bus.subscribe(subjects.worker_command(WORKER_ID), on_command)
    await bus.subscribe(ECHO, echo)
    beating = asyncio.create_task(beat())
    await asyncio.to_thread(sys.stdin.read)
    beating.cancel()
    await bus.close()


# ------------------------------------------------------------------------------------ the client


class Client:
    """Plays rounds in sessions of its own; knows when each one's stream has ended."""

    def __init__(self, bus: Bus, num_messages: int) -> None:
        self._bus = bus
        self._num_messages = num_messages
        self._finished: dict[str, asyncio.Future[float]] = {}

    async def start(self) -> None:
        await self._bus.subscribe_ordered(f"ampd.v1.{TENANT}.stream.*.*", self._on_stream)

    def _on_stream(self, message: BusMessage) -> None:
        if b"finished" in message.data[:24]:
            session = message.subject.split(".")[4]
            self._finished.pop(session).set_result(time.perf_counter())

    async def ask(self, session: str, request: Message) -> None:
        subject = subjects.session_request(TENANT, session)
        raise_if_error(decode(await self._bus.request(subject, encode(request), timeout_s=30.0)))

    async def play_round(self, session: str) -> tuple[float, float]:
        """Seconds to acceptance and to the end of the stream."""
        finished: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._finished[session] = finished
        request = SubmitRound(
            input=TokensInput(token_ids=INPUT), stop=StopConditions(max_output_tokens=self._num_messages)
        )
        started = time.perf_counter()
        await self.ask(session, request)
        accepted_s = time.perf_counter() - started
        return accepted_s, await finished - started


async def measure_rounds(client: Client, num_rounds: int, in_flight: int) -> list[tuple[float, float]]:
    sessions = [f"s{secrets.token_hex(6)}" for _ in range(in_flight)]
    for session in sessions:
        await client.ask(session, OpenSession())
    samples: list[tuple[float, float]] = []
    left = num_rounds

    async def play(session: str) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            samples.append(await client.play_round(session))

    await asyncio.gather(*map(play, sessions))
    return samples


async def measure_bare(bus: Bus, num_requests: int, in_flight: int) -> list[float]:
    payload = encode(SubmitRound(input=TokensInput(token_ids=INPUT)))
    samples: list[float] = []

    async def ask() -> None:
        while len(samples) < num_requests:
            started = time.perf_counter()
            await bus.request(ECHO, payload, timeout_s=30.0)
            samples.append(time.perf_counter() - started)

    await asyncio.gather(*(ask() for _ in range(in_flight)))
    return samples


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def measure_once(
    bus: Bus, client: Client, processes: dict[str, psutil.Process], num_rounds: int, in_flight: int
) -> dict[str, float]:
    bare = await measure_bare(bus, num_rounds, in_flight)
    await measure_rounds(client, max(in_flight, 50), in_flight)  # warm up
    before = {name: cpu_s(process) for name, process in processes.items()}
    started = time.perf_counter()
    samples = await measure_rounds(client, num_rounds, in_flight)
    wall_s = time.perf_counter() - started
    cpu_ms = {name: (cpu_s(p) - before[name]) / len(samples) * 1e3 for name, p in processes.items()}
    accepted, finished = [s[0] for s in samples], [s[1] for s in samples]
    return {
        "bare_p50_ms": statistics.median(bare) * 1e3,
        "accepted_p50_ms": statistics.median(accepted) * 1e3,
        "accepted_p99_ms": sorted(accepted)[int(len(accepted) * 0.99)] * 1e3,
        "finished_p50_ms": statistics.median(finished) * 1e3,
        "added_latency_p50_ms": (statistics.median(accepted) - statistics.median(bare)) * 1e3,
        "rounds_per_s": len(samples) / wall_s,
        **{f"{name}_cpu_ms_per_round": value for name, value in cpu_ms.items()},
        "cpu_ms_per_round": sum(cpu_ms.values()),
    }


# --------------------------------------------------------------------------------------- the core


def measure_core(num_rounds: int, num_messages: int) -> dict[str, float]:
    """CPU microseconds of the pure core per round: request, append, ack, stream, report, append."""
    core = Coordinator(CoordinatorConfig())
    key, now = SessionKey(TENANT, "s"), 0.0
    core.on_event(HeartbeatSeen(heartbeat=heartbeat(0)), now)
    opened = ClientRequested(request_id=0, key=key, request=OpenSession(), encoding="msgpack")
    append_open = core.on_event(opened, now)[0]
    assert isinstance(append_open, AppendRecord)
    core.on_event(RecordAppended(key=key, append_id=append_open.append_id), now)
    request = SubmitRound(input=TokensInput(token_ids=INPUT), stop=StopConditions(max_output_tokens=num_messages))
    spent_s = 0.0
    for number in range(num_rounds):
        now += 0.01
        event = ClientRequested(request_id=number, key=key, request=request, encoding="msgpack")
        started = time.process_time()
        append = core.on_event(event, now)[0]
        assert isinstance(append, AppendRecord)
        commands = core.on_event(RecordAppended(key=key, append_id=append.append_id), now)
        (send,) = (command for command in commands if isinstance(command, SendToWorker))
        ack = RunRoundAck(state="started", num_cached_tokens=0, history=None)
        core.on_event(CommandReplied(command_id=send.command_id, reply=ack), now)
        spent_s += time.process_time() - started
        assert isinstance(send.message, RunRound)
        stream, report = answer_round(send.message)
        payloads = [encode(part) for part in stream]
        started = time.process_time()
        core.on_event(StreamSeen(key=key, round=number, payloads=(payloads[0],)), now)
        end = core.on_event(StreamSeen(key=key, round=number, payloads=tuple(payloads[1:])), now)[0]
        assert isinstance(end, AppendRecord)
        core.on_event(WorkerReported(ack_id=number, report=report), now)
        core.on_event(RecordAppended(key=key, append_id=end.append_id), now)
        spent_s += time.process_time() - started
    return {"core_us_per_round": spent_s / num_rounds * 1e6}


# ------------------------------------------------------------------------------------------- main


def median_of(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}


async def run_all(url: str, processes: dict[str, psutil.Process], args: argparse.Namespace) -> dict[str, Any]:
    bus = await connect_nats_bus(url, name="bench-client")
    client = Client(bus, args.messages)
    await client.start()
    await wait_until_ready(client)
    results: dict[str, Any] = {}
    for in_flight in CONCURRENCIES:
        runs = [await measure_once(bus, client, processes, args.rounds, in_flight) for _ in range(args.repeats)]
        results[str(in_flight)] = median_of(runs)
    await bus.close()
    return results


async def wait_until_ready(client: Client) -> None:
    async with asyncio.timeout(60.0):
        while True:
            try:
                await client.ask("ready", OpenSession())
                return
            except AmpdError:
                await asyncio.sleep(0.1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here; default: standard output")
    parser.add_argument("--rounds", type=int, default=2000, help="rounds in a run (default 2000)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median is taken (default 3)")
    parser.add_argument("--messages", type=int, default=8, help="token messages in a round (default 8)")
    parser.add_argument("--worker", metavar="URL", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    if args.worker:
        uvloop.run(run_worker(args.worker))
        return 0
    environment = {**os.environ, "AMPD_CLUSTER_SECRET": secrets.token_hex(32), "AMPD_LOG_LEVEL": "warning"}
    with tempfile.TemporaryDirectory() as folder, NatsServer(Path(folder)) as server:
        worker = subprocess.Popen([sys.executable, __file__, "--worker", server.url], stdin=subprocess.PIPE)
        coordinator = subprocess.Popen(
            [sys.executable, "-m", "services.coordinator", "--nats-url", server.url], env=environment
        )
        try:
            processes = {"coordinator": psutil.Process(coordinator.pid), "nats_server": psutil.Process(server.pid)}
            results = uvloop.run(run_all(server.url, processes, args))
        finally:
            coordinator.terminate()
            coordinator.wait()
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait()
    core = median_of([measure_core(args.rounds, args.messages) for _ in range(args.repeats)])
    document = {
        "in_flight": results,
        **core,
        "config": {
            "rounds": args.rounds,
            "repeats": args.repeats,
            "messages_per_round": args.messages + 1,
            "input_tokens": len(INPUT) // 4,
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
    }
    text = json.dumps(document, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
