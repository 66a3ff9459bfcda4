"""A proxy between a KV receiver and a KV sender that knows frames, and does to them what a test wants."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum
from types import TracebackType

from shared.transport.endpoints import parse_endpoint
from shared.transport.protocol import HEADER, Frame, decode_header


class Fault(Enum):
    CUT = "cut"  # close both sides
    RESET = "reset"  # close the receiver's side with RST
    STALL = "stall"  # forward nothing more, keep the connection open


Tamper = Callable[[int, Frame, bytes], Iterable[bytes | Fault]]


class FaultProxy:
    """Listens on TCP and forwards to `target`. Each frame from the sender goes through tamper(number, frame, raw),
    which gives what is forwarded instead: bytes, and faults. number 0 is the connection's WELCOME."""

    def __init__(self, target: str, tamper: Tamper) -> None:
        self.target = parse_endpoint(target)
        self.tamper = tamper
        self.endpoint = ""
        self.frames: list[Frame] = []  # from the sender, as they were
        self.num_faults = 0
        self.faulted = asyncio.Event()
        self.seen = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._ended = asyncio.Event()

    async def __aenter__(self) -> FaultProxy:
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
        if self.target.path:
            upstream_reader, upstream = await asyncio.open_unix_connection(self.target.path)
        else:
            upstream_reader, upstream = await asyncio.open_connection(self.target.host, self.target.port)
        self._writers.append(upstream)
        upward = asyncio.ensure_future(self._forward(reader, upstream))
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._forward_frames(upstream_reader, writer)
        upward.cancel()
        for end in (writer, upstream):
            end.transport.abort()
            with suppress(ConnectionError):
                await end.wait_closed()
        await asyncio.gather(upward, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):  # a reset is an end as well
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()  # the receiver has closed: the sender is to see it

    async def _forward_frames(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = 0
        while True:
            header = await reader.readexactly(HEADER.size)
            frame = decode_header(header)
            raw = header + await reader.readexactly(frame.length)
            forwarded = b""
            for piece in self.tamper(number, frame, raw):
                if isinstance(piece, Fault):
                    self._note_fault()
                    await self._carry_out(piece, writer)
                    return
                writer.write(piece)
                await writer.drain()
                forwarded += piece
            if forwarded != raw:
                self._note_fault()
            async with self.seen:
                self.frames.append(frame)
                self.seen.notify_all()
            number += 1

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
