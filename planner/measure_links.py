"""KV transfers between two processes of this machine over our own data plane, and copies in memory."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import secrets
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from shared.core.types import KvLayout, RoundKey
from shared.errors import AmpdError, ErrorCode
from shared.transport.client import KvClient
from shared.transport.leases import LeaseTable
from shared.transport.memory import HostKvMemory
from shared.transport.receiver import PullRequest
from shared.transport.server import KvServer
from shared.transport.tickets import TicketClaims, mint

MIB = 1 << 20
TRANSFER_BYTES = (MIB, 4 * MIB, 16 * MIB, 64 * MIB)
COPY_BYTES = 64 * MIB
FAMILIES = ("unix", "tcp")
TTL_S = 60.0
START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class LinkRates:
    """One direction, one transfer at a time. `samples`: (family, bytes, median seconds)."""

    unix_bytes_per_s: float
    tcp_bytes_per_s: float
    copy_bytes_per_s: float
    latency_s: float  # of a transfer of no bytes, the larger of the two families
    samples: tuple[tuple[str, int, float], ...]


def measure_links(layout: KvLayout, *, repeats: int) -> LinkRates:
    """Pull scattered KV blocks of `layout` from another process, the sizes and families taking turns.

    Raises AmpdError INTERNAL if the sending process does not come up.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ampd-profile-") as folder:
        pipe, theirs = context.Pipe()
        sender = context.Process(target=_serve, args=(theirs, layout, folder), daemon=True)
        sender.start()
        theirs.close()
        try:
            if not pipe.poll(START_TIMEOUT_S):
                raise AmpdError(ErrorCode.INTERNAL, f"the sending process is not up after {START_TIMEOUT_S:g} s")
            medians = asyncio.run(_pull_all(layout, pipe, pipe.recv(), repeats))
        finally:
            pipe.close()  # the sender ends at the end of the pipe
            sender.join(10.0)
            if sender.is_alive():
                sender.kill()
    fits = {family: _fit_line([(size, s) for name, size, s in medians if name == family]) for family in FAMILIES}
    return LinkRates(
        unix_bytes_per_s=fits["unix"][0],
        tcp_bytes_per_s=fits["tcp"][0],
        copy_bytes_per_s=_measure_copy(repeats),
        latency_s=max(latency_s for _, latency_s in fits.values()),
        samples=tuple(medians),
    )


def _fit_line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(bytes per second, seconds at 0 bytes) of seconds = latency + bytes / rate, least squares of relative errors."""
    rows = np.array([[1.0, size] for size, _ in points])
    seconds = np.array([s for _, s in points])
    latency_s, per_byte = np.linalg.lstsq(rows / seconds[:, None], np.ones(len(points)), rcond=None)[0]
    if latency_s < 0.0:  # noise: then all of it is bandwidth
        latency_s, per_byte = 0.0, float(np.median(seconds / rows[:, 1]))
    return 1.0 / float(per_byte), float(latency_s)


def _num_blocks(layout: KvLayout, num_bytes: int) -> int:
    return max(1, num_bytes // layout.bytes_per_block)


def _serve(pipe: Connection, layout: KvLayout, folder: str) -> None:
    """The sending process: sends (secret, endpoints), then grants a lease for every (key, block table) it receives."""
    num_blocks = _num_blocks(layout, max(TRANSFER_BYTES))
    memory = HostKvMemory(layout, num_blocks)
    leases = LeaseTable(time.monotonic)
    secret = secrets.token_bytes(32)
    listen = [f"unix://{folder}/kv.sock", "tcp://127.0.0.1:0"]
    server = KvServer(memory, leases, worker_id="sender", incarnation=1, secret=secret, listen=listen)
    pipe.send((secret, tuple(server.start())))
    try:
        while True:
            key, block_table = pipe.recv()
            lease = leases.grant(
                key,
                block_table,
                0,
                len(block_table) * layout.block_size,
                ttl_s=TTL_S,
                on_end=lambda lease, end: None,
                complete=True,
                num_layers=layout.num_layers,
            )
            pipe.send((lease.lease_id, lease.generation))
    except EOFError:
        server.close()


async def _pull_all(
    layout: KvLayout, pipe: Connection, hello: tuple[bytes, tuple[str, ...]], repeats: int
) -> list[tuple[str, int, float]]:
    secret, endpoints = hello
    memory = HostKvMemory(layout, _num_blocks(layout, max(TRANSFER_BYTES)))
    # a client for each family: a client reuses its connections, whatever their family
    clients = {family: KvClient(memory, worker_id="receiver", incarnation=2) for family in FAMILIES}
    order = np.random.default_rng(7)
    seconds: dict[tuple[str, int], list[float]] = {}
    rounds = itertools.count()
    try:
        for repeat in range(repeats + 1):  # the first connects and warms up
            for num_bytes in TRANSFER_BYTES:
                for index, (family, client) in enumerate(clients.items()):
                    blocks = order.permutation(_num_blocks(layout, max(TRANSFER_BYTES))).tolist()
                    table = blocks[: _num_blocks(layout, num_bytes)]
                    key = RoundKey("profile", "links", next(rounds), 1)
                    pipe.send((key, table))
                    request = _build_request(key, endpoints[index], secret, pipe.recv(), table, layout)
                    started = time.perf_counter()
                    await client.start_pull(request).wait()
                    elapsed_s = time.perf_counter() - started
                    if repeat > 0:
                        size = len(table) * layout.bytes_per_block
                        seconds.setdefault((family, size), []).append(elapsed_s)
    finally:
        for client in clients.values():
            await client.close()
    return [(family, size, statistics.median(taken)) for (family, size), taken in seconds.items()]


def _build_request(
    key: RoundKey, endpoint: str, secret: bytes, lease: tuple[int, int], table: list[int], layout: KvLayout
) -> PullRequest:
    claims = TicketClaims(
        key=key,
        source="sender",
        source_incarnation=1,
        destination="receiver",
        destination_incarnation=2,
        max_bytes=2 * max(TRANSFER_BYTES),
        ttl_s=TTL_S,
        nonce=secrets.token_bytes(16),
    )
    return PullRequest(
        key=key,
        endpoints=[endpoint],
        ticket=mint(secret, claims),
        source="sender",
        source_incarnation=1,
        lease_id=lease[0],
        generation=lease[1],
        block_table=table,
        token_start=0,
        token_stop=len(table) * layout.block_size,
        deadline_s=TTL_S,
    )


def _measure_copy(repeats: int) -> float:
    source = np.ones(COPY_BYTES, dtype=np.uint8)
    target = np.zeros(COPY_BYTES, dtype=np.uint8)
    taken = []
    for _ in range(max(3, repeats)):
        started = time.perf_counter()
        np.copyto(target, source)
        taken.append(time.perf_counter() - started)
    return COPY_BYTES / statistics.median(taken)
