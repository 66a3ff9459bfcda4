"""The receiving process of one family: ours and its limits take turns, case by case."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.transport.cases import CASES, GIB, LAYOUT, MIB, NUM_BLOCKS, RECEIVER, SECRET, SENDER, Case, Samples
from benchmarks.transport.lanes import build_lanes
from benchmarks.transport.sender import serve
from shared.core.types import RoundKey
from shared.transport.client import KvClient
from shared.transport.memory import HostKvMemory
from shared.transport.receiver import PullRequest
from shared.transport.tickets import TicketClaims, mint

IDLE_S = 2.0
POLL_S = 50e-6  # of NIXL's own loop that does not spin
Run = Callable[[Case, Samples], None]


def measure_family(family: str, repeats: int, results: Connection) -> None:
    """A process's life: send a dict for every case, then `None`."""
    if family == "nixl-tcp":
        os.environ.update(UCX_TLS="tcp", UCX_NET_DEVICES="lo")
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        sender = context.Process(target=serve, args=(theirs, family, folder))
        sender.start()
        try:
            asyncio.run(_measure(family, repeats, pipe, results))
        finally:
            pipe.send(("stop",))
            sender.join(10)
    results.send(None)


async def _measure(family: str, repeats: int, pipe: Connection, results: Connection) -> None:
    endpoints, plain = pipe.recv()
    memory = HostKvMemory(LAYOUT, NUM_BLOCKS, shared=family == "shm")
    lanes = build_lanes(family, memory, RECEIVER[0])
    client = KvClient(memory, worker_id=RECEIVER[0], incarnation=RECEIVER[1], lanes=lanes)
    limits = _Limits(pipe, memory, plain, family)
    contenders = limits.contenders()
    random = np.random.default_rng(7)
    lane = ""
    for case in CASES:
        samples = {name: Samples(case.num_bytes) for name in ("ampd", *contenders)}
        for repeat in range(repeats + 1):  # the first is a warm-up
            kept = {name: Samples(case.num_bytes) for name in samples} if repeat == 0 else samples
            request = _prepare_pull(pipe, endpoints, case, random)
            with _Measured(kept["ampd"], pipe):
                lane = (await client.start_pull(request).wait()).lane
            for name, run in contenders.items():
                run(case, kept[name])
        results.send(
            {
                "family": family,
                "lane": lane,
                "case": case.name,
                "num_bytes": case.num_bytes,
                **{name: one.summary() for name, one in samples.items()},
            }
        )
    before, started = time.process_time() + _ask(pipe, "cpu"), time.perf_counter()
    await asyncio.sleep(IDLE_S)
    idle_share = (time.process_time() + _ask(pipe, "cpu") - before) / (time.perf_counter() - started)
    results.send({"family": family, "lane": lane, "case": "idle", "cpu_share": idle_share})
    await client.close()
    lanes.close()


def _ask(pipe: Connection, *command: Any) -> Any:
    pipe.send(command)
    return pipe.recv()


class _Measured:
    """Wall time and the CPU time of both processes, of what is done within."""

    def __init__(self, samples: Samples, pipe: Connection) -> None:
        self._samples = samples
        self._pipe = pipe

    def __enter__(self) -> None:
        self._cpu = time.process_time() + _ask(self._pipe, "cpu")
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._samples.wall_s.append(time.perf_counter() - self._started)
        self._samples.cpu_s.append(time.process_time() + _ask(self._pipe, "cpu") - self._cpu)


def _prepare_pull(pipe: Connection, endpoints: list[str], case: Case, random: np.random.Generator) -> PullRequest:
    key = RoundKey("bench", "session", 1, secrets.randbits(31))
    tables = [list(range(case.num_blocks))] * 2
    if case.scattered:
        tables = [random.permutation(NUM_BLOCKS).tolist() for _ in range(2)]
    lease_id, generation = _ask(pipe, "grant", key, tables[0], case.num_tokens)
    claims = TicketClaims(
        key=key,
        source=SENDER[0],
        source_incarnation=SENDER[1],
        destination=RECEIVER[0],
        destination_incarnation=RECEIVER[1],
        max_bytes=GIB,
        ttl_s=60.0,
        nonce=secrets.token_bytes(16),
    )
    return PullRequest(
        key=key,
        endpoints=endpoints,
        ticket=mint(SECRET, claims),
        source=SENDER[0],
        source_incarnation=SENDER[1],
        lease_id=lease_id,
        generation=generation,
        block_table=tables[1],
        token_start=0,
        token_stop=case.num_tokens,
    )


class _Limits:
    """What a family is compared with, on one contiguous buffer each, without leases, tickets or digests."""

    def __init__(self, pipe: Connection, memory: HostKvMemory, plain: Any, family: str) -> None:
        self._pipe = pipe
        self._plain = plain
        self._family = family
        self._memory = memory
        self._target = memory.region.data
        self._address = memory.region.address
        self._source = np.ones(memory.region.data.nbytes, dtype=np.uint8)

    def contenders(self) -> dict[str, Run]:
        if self._family == "shm":
            return {"memcpy": self._copy}
        if self._family.startswith("nixl"):
            return self._nixl_loops()
        found: dict[str, Run] = {"plain": self._socket(0)}
        if self._family == "unix":
            found["plain-1M"] = self._socket(MIB)  # the send buffer that ours asks for
        elif (mooncake := self._mooncake()) is not None:
            found["mooncake"] = mooncake
        return found

    def _copy(self, case: Case, samples: Samples) -> None:
        """By one thread, out of this process's own memory."""
        target = np.frombuffer(self._target, dtype=np.uint8)
        with _Measured(samples, self._pipe):
            np.copyto(target[: case.num_bytes], self._source[: case.num_bytes])

    def _socket(self, send_buffer: int) -> Run:
        """sendall, and recv_into, of a blocking socket."""

        def run(case: Case, samples: Samples) -> None:
            with socket.socket(socket.AF_UNIX if self._family == "unix" else socket.AF_INET) as sock:
                sock.connect(self._plain)
                # the sender is inside this connection until it is closed, and cannot be asked for its CPU time
                before = _ask(self._pipe, "cpu")
                self._pipe.send(("plain", send_buffer, case.num_bytes))
                cpu, started = time.process_time(), time.perf_counter()
                sock.send(b"x")
                received = 0
                while received < case.num_bytes:
                    received += sock.recv_into(self._target[received : case.num_bytes])
                samples.wall_s.append(time.perf_counter() - started)
                cpu = time.process_time() - cpu
            samples.cpu_s.append(cpu + _ask(self._pipe, "cpu") - before)

        return run

    def _nixl_loops(self) -> dict[str, Run]:
        """One read of all the bytes, straight into the target: polled without a pause, and with one."""
        from shared.transport.nixl_agent import HOST, NixlAgent

        metadata, address = _ask(self._pipe, "nixl")
        agent = NixlAgent("loop-receiver")
        agent.register(self._memory.flat)
        peer = agent.add_peer(metadata)

        def loop(pause_s: float) -> Run:
            def run(case: Case, samples: Samples) -> None:
                before = _ask(self._pipe, "cpu")
                self._pipe.send(("nixl-serve", pause_s))
                cpu, started = time.process_time(), time.perf_counter()
                read = agent.read_ranges(peer, HOST, [(address, case.num_bytes)], HOST, self._address)
                while not agent.has_ended(read):
                    if pause_s:
                        time.sleep(pause_s)
                samples.wall_s.append(time.perf_counter() - started)
                cpu = time.process_time() - cpu
                agent.forget(read)
                self._pipe.send(("done",))
                samples.cpu_s.append(cpu + _ask(self._pipe, "cpu") - before)

            return run

        return {"nixl loop": loop(POLL_S), "nixl loop, spinning": loop(0.0)}

    def _mooncake(self) -> Run | None:
        """mooncake-transfer-engine's build without CUDA, over TCP, if it is installed."""
        offered = _ask(self._pipe, "mooncake")
        if offered is None:
            return None
        from mooncake.engine import TransferEngine

        port, address = offered
        engine = TransferEngine()
        engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
        engine.register_memory(self._address, self._target.nbytes)

        def run(case: Case, samples: Samples) -> None:
            with _Measured(samples, self._pipe):
                status = engine.transfer_sync_read(f"127.0.0.1:{port}", self._address, address, case.num_bytes)
            assert status == 0, f"mooncake says {status}"

        return run
