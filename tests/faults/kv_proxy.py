"""A proxy between a KV receiver and a KV sender that knows frames, and does to them what a test wants."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import TracebackType

from shared.transport.endpoints import parse_endpoint
from shared.transport.protocol import HEADER, Frame, FrameKind, decode_header


class Fault(Enum):
    CUT = "cut"  # close both sides
    RESET = "reset"  # close the receiver's side with RST
    STALL = "stall"  # forward nothing more, keep the connection open


Tamper = Callable[[int, Frame, bytes], Iterable[bytes | Fault]]


def is_payload(frame: Frame) -> bool:
    """Whether it carries KV, or says where KV lies."""
    return frame.kind in (FrameKind.SEGMENT, FrameKind.RANGES)


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    header = await reader.readexactly(HEADER.size)
    return header + await reader.readexactly(decode_header(header).length)


class FaultProxy:
    """Listens on TCP, or in `folder` on a Unix socket that also passes on the descriptor behind a POOL, and
    forwards to `target`. Each frame from the sender goes through tamper(number, frame, raw), which gives what is
    forwarded instead: bytes, and faults. number 0 is the connection's WELCOME."""

    def __init__(self, target: str, tamper: Tamper, *, folder: Path | None = None) -> None:
        self.target = parse_endpoint(target)
        self.tamper = tamper
        self.folder = folder
        self.endpoint = ""
        self.frames: list[Frame] = []  # from the sender, as they were
        self.num_faults = 0
        self.faulted = asyncio.Event()
        self.seen = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._ended = asyncio.Event()

    async def __aenter__(self) -> FaultProxy:
        if self.folder is not None:
            path = self.folder / "proxy.sock"
            self._server = await asyncio.start_unix_server(self._connected, path)
            self.endpoint = f"unix://{path}"
        else:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
            self.endpoint = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._server.close()
        self._ended.set()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._tasks)
        await self._server.wait_closed()

    async def wait_for_frames(self, predicate: Callable[[list[Frame]], bool]) -> None:
        async with self.seen:
            await asyncio.wait_for(self.seen.wait_for(lambda: predicate(self.frames)), 30)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.append(task)
        self._writers.append(writer)
        sock = await asyncio.to_thread(self._dial)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            number = await self._pass_on_opening(reader, sock, writer) if self.folder is not None else 0
            if number is not None:
                await self._pass_on_rest(reader, sock, writer, number)
        sock.close()
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async def _pass_on_opening(
        self, reader: asyncio.StreamReader, sock: socket.socket, writer: asyncio.StreamWriter
    ) -> int | None:
        """WELCOME, and POOL with its descriptor. Returns how many frames that were; None: a fault ended it."""
        for number in range(2):
            request = await read_frame(reader)
            raw, descriptor = await asyncio.to_thread(self._exchange, sock, request)
            try:
                if not await self._pass_on(number, raw, writer):
                    return None
                if descriptor is not None:
                    end = writer.get_extra_info("socket")
                    with socket.socket(end.family, end.type, fileno=os.dup(end.fileno())) as duplicate:
                        socket.send_fds(duplicate, [b"d"], [descriptor])
            finally:
                if descriptor is not None:
                    os.close(descriptor)
        return 2

    async def _pass_on_rest(
        self, reader: asyncio.StreamReader, sock: socket.socket, writer: asyncio.StreamWriter, number: int
    ) -> None:
        upstream_reader, upstream = await (
            asyncio.open_unix_connection(sock=sock) if self.target.path else asyncio.open_connection(sock=sock)
        )
        self._writers.append(upstream)
        upward = asyncio.ensure_future(self._forward(reader, upstream))
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while await self._pass_on(number, await read_frame(upstream_reader), writer):
                number += 1
        upward.cancel()
        upstream.transport.abort()
        with suppress(ConnectionError):
            await upstream.wait_closed()
        await asyncio.gather(upward, return_exceptions=True)

    def _dial(self) -> socket.socket:
        if self.target.path:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self.target.path)
            return sock
        return socket.create_connection((self.target.host, self.target.port))

    def _exchange(self, sock: socket.socket, request: bytes) -> tuple[bytes, int | None]:
        """The sender's answer, and the descriptor behind it if it is a POOL."""
        sock.sendall(request)
        header = sock.recv(HEADER.size, socket.MSG_WAITALL)
        if len(header) < HEADER.size:
            raise asyncio.IncompleteReadError(header, HEADER.size)
        frame = decode_header(header)
        body = sock.recv(frame.length, socket.MSG_WAITALL) if frame.length else b""
        if frame.kind is not FrameKind.POOL:
            return header + body, None
        _, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
        return header + body, descriptors[0]

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):  # a reset is an end as well
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()  # the receiver has closed: the sender is to see it

    async def _pass_on(self, number: int, raw: bytes, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        frame = decode_header(raw[: HEADER.size])
        forwarded = b""
        for piece in self.tamper(number, frame, raw):
            if isinstance(piece, Fault):
                self._note_fault()
                await self._carry_out(piece, writer)
                return False
            writer.write(piece)
            await writer.drain()
            forwarded += piece
        if forwarded != raw:
            self._note_fault()
        async with self.seen:
            self.frames.append(frame)
            self.seen.notify_all()
        return True

    def _note_fault(self) -> None:
        self.num_faults += 1
        self.faulted.set()

    async def _carry_out(self, fault: Fault, writer: asyncio.StreamWriter) -> None:
        match fault:
            case Fault.CUT:
                writer.close()
                await writer.wait_closed()
            case Fault.RESET:
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            case Fault.STALL:
                await self._ended.wait()
