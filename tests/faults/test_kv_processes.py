"""Peers that are processes of their own, killed and stopped in the middle of a transfer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from kv_pair import LARGE, ON_UNIX_SOCKETS, RECEIVER, SECRET, SENDER, KvPair

from shared.core.types import RoundKey
from shared.errors import ErrorCode, KvTransferError
from shared.transport.leases import LeaseEnd
from shared.transport.tickets import mint

pytestmark = pytest.mark.usefixtures("nothing_leaks")

SCRIPT = Path(__file__).with_name("kv_peer_process.py")
# 64 MiB: more than the sockets between two processes hold (the kernel lets a TCP buffer grow to 32 MiB and
# more), so that a transfer whose receiver stands still cannot have been sent whole
NUM_BLOCKS = 256


class Peer:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), 60)
        message: dict[str, Any] = json.loads(line)
        return message

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    async def stop(self) -> None:
        """SIGSTOP, and proof that it has taken effect."""
        self.signal(signal.SIGSTOP)
        await asyncio.to_thread(os.waitid, os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)
        assert psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert await self.process.wait() == -signal.SIGKILL


@asynccontextmanager
async def peer_process(role: str, **options: Any) -> AsyncIterator[Peer]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        SCRIPT,
        role,
        json.dumps({"layout": asdict(LARGE), "num_blocks": NUM_BLOCKS, **options}),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        yield Peer(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_a_sender_in_the_middle(family: str, tmp_path: Path, how: str) -> None:
    key = RoundKey("tenant", "session", 1, 1)
    listen = f"unix://{tmp_path}/peer.sock" if family in ON_UNIX_SOCKETS else "tcp://127.0.0.1:0"
    async with (
        KvPair(family, tmp_path, layout=LARGE, num_blocks=NUM_BLOCKS) as pair,
        peer_process(
            "sender",
            family=family,
            worker_id=SENDER[0],
            incarnation=SENDER[1],
            secret=SECRET.decode(),
            listen=listen,
            key=key,
        ) as peer,
    ):
        offered = await peer.read()
        local = pair.grant(0, offered["num_tokens"], key=key)  # only to fill in the request
        arrived = asyncio.Event()
        request = replace(
            pair.request(local, on_segment=pair.on_loop(arrived), progress_timeout_s=1.0),
            endpoints=offered["endpoints"],
            lease_id=offered["lease_id"],
            generation=offered["generation"],
        )
        pull = pair.client.start_pull(request)
        await asyncio.wait_for(arrived.wait(), 30)
        await (peer.kill() if how == "killed" else peer.stop())
        with pytest.raises(KvTransferError) as caught:
            await pull.wait()
        assert caught.value.code is ErrorCode.KV_TRANSFER_FAILED
        pair.target.blocks.fill(3)
        if how == "stopped":  # awake again, it finds the connection gone and gives its lease up
            assert "stalled" in caught.value.message
            peer.signal(signal.SIGCONT)
            assert await peer.read() == {"ended": "failed"}
        assert pair.target.blocks.min() == pair.target.blocks.max() == 3
        await pair.assert_serves()


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_a_receiver_in_the_middle(family: str, tmp_path: Path, how: str) -> None:
    async with KvPair(family, tmp_path, layout=LARGE, num_blocks=NUM_BLOCKS) as pair:
        lease = pair.grant(0, NUM_BLOCKS * LARGE.block_size)
        request = {
            "key": lease.key,
            "endpoints": list(pair.endpoints),
            "ticket": mint(SECRET, pair.claims(lease)).hex(),
            "source": SENDER[0],
            "source_incarnation": SENDER[1],
            "lease_id": lease.lease_id,
            "generation": lease.generation,
            "block_table": list(range(NUM_BLOCKS)),
            "token_start": lease.token_start,
            "token_stop": lease.token_stop,
            "progress_timeout_s": 1.0,
        }
        async with peer_process(
            "receiver", family=family, worker_id=RECEIVER[0], incarnation=RECEIVER[1], request=request
        ) as peer:
            assert await peer.read() == {"arrived": True}
            await (peer.kill() if how == "killed" else peer.stop())
            assert await pair.ended(lease) is LeaseEnd.FAILED
            assert pair.server.counters["failed"] == 1
            if how == "stopped":  # awake again, it must not take half a transfer for a whole one
                assert "stalled" in lease.reason
                peer.signal(signal.SIGCONT)
                peer.go_on()
                assert await peer.read() == {"result": "kv_transfer_failed"}
        await pair.assert_serves()


async def test_a_nixl_read_over_tcp_from_a_stopped_sender_hurts_nobody(tmp_path: Path) -> None:
    """It goes on when the sender does: by then its pull has failed, and its blocks are somebody else's."""
    key = RoundKey("tenant", "session", 1, 1)
    async with KvPair("tcp", tmp_path, layout=LARGE, num_blocks=NUM_BLOCKS) as pair:
        sending = peer_process(
            "sender",
            family="nixl-tcp",
            worker_id=SENDER[0],
            incarnation=SENDER[1],
            secret=SECRET.decode(),
            listen="tcp://127.0.0.1:0",
            key=key,
        )
        async with sending as sender:
            offered = await sender.read()
            local = pair.grant(0, offered["num_tokens"], key=key)  # only to fill in the request
            request = {
                "key": key,
                "endpoints": offered["endpoints"],
                "ticket": mint(SECRET, pair.claims(local)).hex(),
                "source": SENDER[0],
                "source_incarnation": SENDER[1],
                "lease_id": offered["lease_id"],
                "generation": offered["generation"],
                "block_table": list(range(NUM_BLOCKS)),
                "token_start": 0,
                "token_stop": offered["num_tokens"],
                "progress_timeout_s": 1.0,
            }
            receiving = peer_process(
                "receiver",
                family="nixl-tcp",
                worker_id=RECEIVER[0],
                incarnation=RECEIVER[1],
                request=request,
                watch=True,
            )
            async with receiving as receiver:
                assert await receiver.read() == {"arrived": True}
                await sender.stop()
                receiver.go_on()
                assert await receiver.read() == {"result": "kv_transfer_failed"}
                assert (await receiver.read())["quarantined"] >= 1
                sender.signal(signal.SIGCONT)
                assert await sender.read() == {"ended": "failed"}
                receiver.go_on()
                assert await receiver.read() == {"quarantined": 0, "untouched": True}
