"""Who may pull what: tickets, identities, layouts, and peers that do not speak the protocol at all."""

from __future__ import annotations

import asyncio
import resource
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from kv_pair import RECEIVER, SMALL, KvPair

from shared.core.types import RoundKey, Segment
from shared.errors import AmpdError, ErrorCode
from shared.transport.client import KvClient
from shared.transport.endpoints import parse_endpoint
from shared.transport.leases import LeaseEnd
from shared.transport.memory import HostKvMemory
from shared.transport.protocol import (
    HEADER,
    MAGIC,
    MAX_CONTROL_BYTES,
    NO_LEASE,
    NO_SEGMENT,
    PROTOCOL_VERSION,
    FrameKind,
    Hello,
    LeaseId,
    PullBody,
    decode_header,
    encode_body,
    encode_header,
)
from shared.transport.server import KvServer
from shared.transport.tickets import TicketClaims

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def changed(**fields: object) -> Callable[[TicketClaims], TicketClaims]:
    return lambda claims: msgspec.structs.replace(claims, **fields)


WRONG_TICKETS: dict[str, tuple[Callable[[TicketClaims], TicketClaims], ErrorCode]] = {
    "another source": (changed(source="someone"), ErrorCode.KV_TICKET_INVALID),
    "another incarnation of the source": (changed(source_incarnation=99), ErrorCode.WRONG_INCARNATION),
    "another destination": (changed(destination="someone"), ErrorCode.KV_TICKET_INVALID),
    "another incarnation of the destination": (changed(destination_incarnation=99), ErrorCode.KV_TICKET_INVALID),
    "another tenant": (changed(key=RoundKey("other", "session", 1, 1)), ErrorCode.KV_TICKET_INVALID),
    "another attempt": (changed(key=RoundKey("tenant", "session", 1, 2)), ErrorCode.KV_TICKET_INVALID),
    "a byte too few": (changed(max_bytes=8 * SMALL.bytes_per_token - 1), ErrorCode.KV_TICKET_INVALID),
}


@pytest.mark.parametrize("wrong", WRONG_TICKETS)
async def test_a_ticket_for_something_else_is_refused(family: str, tmp_path: Path, wrong: str) -> None:
    change, code = WRONG_TICKETS[wrong]
    async with KvPair(family, tmp_path) as pair:
        lease = pair.grant(0, 8)
        error = await pair.pull_failure(pair.request(lease, claims=change(pair.claims(lease))))
        assert error.code is code
        assert pair.server.counters["refused"] == 1
        assert lease.end is None  # a stranger cannot end a lease
        await pair.pull(pair.request(lease))


async def test_a_ticket_signed_with_another_secret_is_refused(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path) as pair:
        lease = pair.grant(0, 8)
        error = await pair.pull_failure(pair.request(lease, secret=b"not the secret of this cluster"))
        assert error.code is ErrorCode.KV_TICKET_INVALID
        assert "pulls" not in pair.server.counters
        await pair.pull(pair.request(lease))


async def test_who_has_no_ticket_is_told_nothing_of_the_pool(family: str, tmp_path: Path) -> None:
    """Neither what it takes to read it nor, with shm, its descriptor; who has one is told once a connection."""
    async with KvPair(family, tmp_path) as pair:
        lease = pair.grant(0, 8)
        request = pair.request(lease, secret=b"the ticket secret of some others")
        body = encode_body(
            PullBody(
                ticket=request.ticket,
                key=lease.key,
                token_start=0,
                token_stop=8,
                keepalive_s=1.0,
                progress_timeout_s=1.0,
            )
        )
        name = LeaseId(request.source_incarnation, lease.lease_id, lease.generation)
        pull = encode_header(FrameKind.PULL, name, NO_SEGMENT, len(body)) + body

        def talk() -> tuple[bytes, list[int]]:
            with dial(pair) as sock:
                sock.sendall(hello_frame() + pull)
                received, descriptors = b"", []
                while True:
                    data, more, _, _ = socket.recv_fds(sock, 65536, 8)
                    received, descriptors = received + data, descriptors + more
                    if not data:
                        return received, descriptors

        received, descriptors = await asyncio.to_thread(talk)
        kinds = []
        while received:
            frame = decode_header(received[: HEADER.size])
            kinds.append(frame.kind)
            received = received[HEADER.size + frame.length :]
        assert (kinds, descriptors) == ([FrameKind.WELCOME, FrameKind.REFUSED], [])
        async with pair.proxy(lambda number, frame, raw: [raw]) as proxy:
            for _ in range(2):
                granted = pair.grant(0, 8)
                await pair.pull(replace(pair.request(granted), endpoints=[proxy.endpoint]))
            pools = [frame for frame in proxy.frames if frame.kind is FrameKind.POOL]
            assert len(pools) == (0 if family in ("tcp", "unix") else 1)


async def test_a_ticket_works_once(family: str, tmp_path: Path) -> None:
    """Not even for a second lease of the same round."""
    async with KvPair(family, tmp_path) as pair:
        lease = pair.grant(0, 8)
        claims = pair.claims(lease)
        await pair.pull(pair.request(lease, claims=claims))
        await pair.ended(lease)
        again = pair.grant(0, 8, key=lease.key)
        error = await pair.pull_failure(pair.request(again, claims=claims))
        assert error.code is ErrorCode.KV_TICKET_INVALID
        assert "used before" in error.message


async def test_a_ticket_expires_by_the_clock_of_its_source(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path) as pair:
        lease = pair.grant(0, 8, ttl_s=1000)
        pair.clock.now += 61
        error = await pair.pull_failure(pair.request(lease))
        assert error.code is ErrorCode.KV_TICKET_INVALID
        assert "60 s" in error.message


async def test_another_layout_is_refused_by_what_differs(family: str, tmp_path: Path) -> None:
    target = replace(SMALL, block_size=8, dtype="bfloat16")
    async with KvPair(family, tmp_path, target_layout=target) as pair:
        error = await pair.pull_failure(pair.request(pair.grant(0, 8)))
        assert error.code is ErrorCode.KV_LAYOUT_MISMATCH
        assert "block_size" in error.message
        assert "dtype" in error.message
        assert "head_dim" not in error.message


async def test_a_restarted_or_another_worker_is_refused(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path) as pair:
        request = pair.request(pair.grant(0, 8))
        for wanted, words in (
            (replace(request, source_incarnation=12), "restarted"),
            (replace(request, source="someone"), "someone was wanted"),
        ):
            error = await pair.pull_failure(wanted)
            assert error.code is ErrorCode.WRONG_INCARNATION
            assert words in error.message
        await pair.pull(request)


async def test_another_protocol_version_is_refused(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with KvPair(family, tmp_path) as pair:
        monkeypatch.setattr("shared.transport.receiver.PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
        error = await pair.pull_failure(pair.request(pair.grant(0, 8)))
        assert error.code is ErrorCode.KV_LAYOUT_MISMATCH
        assert "same version" in error.message


async def test_leases_that_are_not_there(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path) as pair:
        ended = pair.grant(0, 8)
        assert pair.leases.release(ended.lease_id, ended.generation)
        lease = pair.grant(1, 8)
        assert lease.lease_id == ended.lease_id  # the slot is used again: only the generation differs
        good = pair.request(lease)
        for wrong in (
            pair.request(ended),
            replace(pair.request(lease), generation=ended.generation),
            replace(pair.request(lease), lease_id=77),
            replace(pair.request(lease), token_start=0),
        ):
            error = await pair.pull_failure(wrong)
            assert error.code is ErrorCode.KV_LEASE_INVALID
        await pair.pull(good)
        pair.assert_moved(lease, good)


async def test_a_lease_serves_one_receiver(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path) as pair:
        lease = pair.grant(0, 8, complete=False)
        arrived = asyncio.Event()
        first = pair.client.start_pull(
            replace(pair.request(lease, on_segment=pair.on_loop(arrived)), block_table=[1, 2])
        )
        lease.publish(Segment(0, 3, 0, 4))
        await asyncio.wait_for(arrived.wait(), 30)
        error = await pair.pull_failure(replace(pair.request(lease), block_table=[3, 4]))
        assert error.code is ErrorCode.KV_LEASE_INVALID
        lease.publish(Segment(0, 3, 4, 8))
        lease.finish()
        await first.wait()


# ----------------------------------------------------------------------- peers that speak otherwise


def dial(pair: KvPair) -> socket.socket:
    endpoint = parse_endpoint(pair.endpoints[0])
    if endpoint.path:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(endpoint.path)
    else:
        sock = socket.create_connection((endpoint.host, endpoint.port))
    sock.settimeout(30)
    return sock


def hello_frame() -> bytes:
    body = encode_body(
        Hello(
            protocol=PROTOCOL_VERSION,
            worker_id=RECEIVER[0],
            incarnation=RECEIVER[1],
            layout_hash=SMALL.layout_hash,
            layout=SMALL,
            peer_id="sender",
            peer_incarnation=11,
            lanes=("stream", "shm", "nixl"),
        )
    )
    return encode_header(FrameKind.HELLO, NO_LEASE, NO_SEGMENT, len(body)) + body


def lying_header(kind: int, length: int) -> bytes:
    return HEADER.pack(MAGIC, kind, 0, 0, 0, 0, 0, 0, 0, length)


GARBAGE: dict[str, bytes] = {
    "http": b"GET / HTTP/1.1\r\nHost: here\r\nAccept: */*\r\nUser-Agent: something-or-other/1.0\r\n\r\n",
    "noise": bytes(range(256)) * 8,
    "an unknown kind": lying_header(200, 0),
    "a body of 16 EiB": lying_header(FrameKind.HELLO, 2**64 - 1),
    "a body just over the limit": lying_header(FrameKind.HELLO, MAX_CONTROL_BYTES + 1),
    "a hello that is no MessagePack": lying_header(FrameKind.HELLO, 100) + b"\xc1" * 100,
    "a deeply nested hello": lying_header(FrameKind.HELLO, 4096) + b"\x91" * 4096,
    "a pull before the hello": lying_header(FrameKind.PULL, 0),
    "a segment of 16 EiB": hello_frame() + lying_header(FrameKind.SEGMENT, 2**64 - 1),
    "an empty pull": hello_frame() + lying_header(FrameKind.PULL, 0),
    "a pull that is no MessagePack": hello_frame() + lying_header(FrameKind.PULL, 64) + b"\xc1" * 64,
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_ends_its_connection_only(family: str, tmp_path: Path, name: str) -> None:
    async with KvPair(family, tmp_path) as pair:

        def talk() -> bytes:
            with dial(pair) as sock:
                sock.sendall(GARBAGE[name])
                received = b""
                try:
                    while data := sock.recv(65536):
                        received += data
                except ConnectionResetError:
                    pass  # closed with our bytes unread
                return received

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        received = await asyncio.to_thread(talk)
        assert pair.server.counters["malformed"] == 1
        assert received == b"" or b"malformed_message" in received
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
        await pair.assert_serves()


async def test_a_peer_that_says_nothing_is_hung_up_on(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path, handshake_timeout_s=0.2) as pair:

        def wait() -> bytes:
            with dial(pair) as sock:
                sock.sendall(hello_frame()[:10])
                return sock.recv(1)

        assert await asyncio.to_thread(wait) == b""
        await pair.assert_serves()


async def test_connections_are_bounded(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path, max_connections=2) as pair:
        silent = [dial(pair), dial(pair)]
        error = await pair.pull_failure(pair.request(pair.grant(0, 8)))
        assert error.code in (ErrorCode.OVERLOADED, ErrorCode.KV_TRANSFER_FAILED)  # the reason may be lost to a reset
        for sock in silent:
            sock.close()
        for thread in list(pair.server._connections):
            await asyncio.to_thread(thread.join, 30)
        await pair.assert_serves()


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://0.0.0.0:0", "tcp://[::]:0", "127.0.0.1:80", "tcp://127.0.0.1", "tcp://127.0.0.1:port", "unix://relative",
     "unix:///no/such/folder/kv.sock", "http://127.0.0.1:1", ""],
)  # fmt: skip
async def test_endpoints_that_cannot_be_served_are_named(tmp_path: Path, endpoint: str) -> None:
    async with KvPair("tcp", tmp_path) as pair:
        server = KvServer(
            pair.source,
            pair.leases,
            worker_id="w",
            incarnation=1,
            secret=b"s" * 16,
            listen=["tcp://127.0.0.1:0", endpoint],
        )
        with pytest.raises(AmpdError, match="KV") as caught:
            server.start()
        assert caught.value.code is ErrorCode.INVALID_REQUEST


async def test_a_living_unix_socket_is_not_taken_over_but_a_dead_one_is(tmp_path: Path) -> None:
    async with KvPair("unix", tmp_path) as pair:
        with pytest.raises(AmpdError, match="in use"):
            KvPair("unix", tmp_path)
        await pair.assert_serves()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{tmp_path}/kv.sock")
    async with KvPair("unix", tmp_path) as pair:
        assert (tmp_path / "kv.sock").stat().st_mode & 0o777 == 0o600
        await pair.assert_serves()
    assert not (tmp_path / "kv.sock").exists()


async def test_a_worker_that_is_gone_fails_the_pull(family: str, tmp_path: Path) -> None:
    async with KvPair(family, tmp_path) as pair:
        request = pair.request(pair.grant(0, 8))
        await asyncio.to_thread(pair.server.close)
        error = await pair.pull_failure(request)
        assert error.code is ErrorCode.KV_TRANSFER_FAILED


async def test_an_impostor_at_the_endpoint_is_found_out(tmp_path: Path) -> None:
    """Whoever answers must say who it is, in frames; anything else fails the pull."""
    answers = [b"", b"\0" * 64, struct.pack("<Q", 7) * 100, encode_header(FrameKind.TRAILER, NO_LEASE, NO_SEGMENT, 0)]
    memory = HostKvMemory(SMALL, 4)
    async with KvPair("tcp", tmp_path) as pair:
        client = KvClient(memory, worker_id=RECEIVER[0], incarnation=RECEIVER[1])
        for answer in answers:

            async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: bytes = answer) -> None:
                writer.write(answer)
                await writer.drain()
                writer.close()
                await writer.wait_closed()

            impostor = await asyncio.start_server(reply, "127.0.0.1", 0)
            port = impostor.sockets[0].getsockname()[1]
            request = replace(pair.request(pair.grant(0, 4)), endpoints=[f"tcp://127.0.0.1:{port}"], block_table=[0])
            with pytest.raises(AmpdError) as caught:
                await client.start_pull(request).wait()
            assert caught.value.code is ErrorCode.KV_TRANSFER_FAILED
            impostor.close()
            await impostor.wait_closed()
        await client.close()
        assert memory.blocks.max() == 0
        assert {end for ends in pair.ends.values() for end in ends} <= {LeaseEnd.RELEASED}
