"""The sending process: our server, and what it is compared with, by commands over a pipe."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.transport.cases import LAYOUT, NUM_BLOCKS, SECRET, SENDER
from benchmarks.transport.lanes import build_lanes
from shared.transport.leases import LeaseTable
from shared.transport.memory import HostKvMemory
from shared.transport.server import KvServer


def serve(pipe: Connection, family: str, folder: str) -> None:
    """Say the endpoints, then answer commands until told to `stop`."""
    memory = HostKvMemory(LAYOUT, NUM_BLOCKS, shared=family == "shm")
    memory.blocks.reshape(-1).view(np.uint64)[:] = np.arange(memory.blocks.nbytes // 8, dtype=np.uint64)
    data = memory.region.data
    leases = LeaseTable(time.monotonic)
    on_unix = family in ("unix", "shm")
    lanes = build_lanes(family, memory, SENDER[0])
    server = KvServer(
        memory,
        leases,
        worker_id=SENDER[0],
        incarnation=SENDER[1],
        secret=SECRET,
        listen=[f"unix://{folder}/kv.sock" if on_unix else "tcp://127.0.0.1:0"],
        lanes=lanes,
    )
    plain = socket.socket(socket.AF_UNIX if on_unix else socket.AF_INET)
    plain.bind(f"{folder}/plain.sock" if on_unix else ("127.0.0.1", 0))
    plain.listen()
    pipe.send((server.start(), plain.getsockname()))
    with contextlib.ExitStack() as stack:
        while (command := pipe.recv())[0] != "stop":
            match command:
                case ("cpu",):
                    pipe.send(time.process_time())
                case ("grant", key, block_table, num_tokens):
                    lease = leases.grant(
                        key,
                        block_table,
                        0,
                        num_tokens,
                        ttl_s=60.0,
                        on_end=lambda lease, end: None,
                        complete=True,
                        num_layers=LAYOUT.num_layers,
                    )
                    pipe.send((lease.lease_id, lease.generation))
                case ("plain", send_buffer, num_bytes):
                    _send_plain(plain, send_buffer, data[:num_bytes])
                case ("nixl",):
                    pipe.send(_offer_nixl(memory, stack))
                case ("nixl-serve", pause_s):
                    _NIXL[0](pipe, pause_s)
                case ("mooncake",):
                    pipe.send(_offer_mooncake(memory))
    server.close()
    lanes.close()
    plain.close()


def _send_plain(listener: socket.socket, send_buffer: int, data: memoryview) -> None:
    connection, _ = listener.accept()
    with connection:
        if send_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        while connection.recv(1):  # each byte asks for the data once
            connection.sendall(data)


_NIXL: list[Callable[[Connection, float], None]] = []
_MOONCAKE: list[Any] = []  # engines, kept


def _offer_nixl(memory: HostKvMemory, stack: contextlib.ExitStack) -> tuple[bytes, int]:
    """(metadata, address) of the pool, at an agent of its own."""
    from shared.transport.nixl_agent import NixlAgent

    agent = NixlAgent("loop-sender")
    registered = agent.register(memory.flat)
    stack.callback(agent.deregister, registered)

    def make_progress(pipe: Connection, pause_s: float) -> None:
        """Until the receiver says that it has what it wanted."""
        while not pipe.poll():
            agent.progress()
            if pause_s:
                time.sleep(pause_s)
        pipe.recv()

    _NIXL.append(make_progress)
    return agent.metadata, memory.region.address


def _offer_mooncake(memory: HostKvMemory) -> tuple[int, int] | None:
    """(RPC port, address) of the pool; None: mooncake is not installed."""
    try:
        from mooncake.engine import TransferEngine  # type: ignore[import-not-found]
    except ImportError:
        return None
    engine = TransferEngine()
    engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
    engine.register_memory(memory.region.address, memory.region.data.nbytes)
    _MOONCAKE.append(engine)
    return engine.get_rpc_port(), memory.region.address
