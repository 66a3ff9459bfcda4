"""One blocking socket that carries frames: whole ones or a typed error, under a deadline on progress and on the total.

Used by one thread; an Interrupt lets another make its calls fail at once. The socket never blocks for good: the
kernel's SO_RCVTIMEO / SO_SNDTIMEO bound every call, and cost no extra system call each.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence

from shared.errors import ErrorCode, KvTransferError
from shared.transport.protocol import (
    HEADER,
    MAX_CONTROL_BYTES,
    NO_LEASE,
    NO_SEGMENT,
    Body,
    ControlBody,
    Digest,
    Frame,
    FrameKind,
    LeaseId,
    decode_body,
    decode_header,
    encode_body,
    encode_header,
)

MAX_IOVECS = 1024  # IOV_MAX on Linux
PIECE_BYTES = 512 << 10  # sent by one system call, then digested: within the level-2 cache
_UNIX_BUFFER_BYTES = 1 << 20  # two pieces, so that one end need not wait for the other; clamped to net.core.wmem_max
_TIMEVAL = struct.Struct("@ll")


class ConnectionLost(KvTransferError):
    """The socket is of no use any more: broken, stalled, or past its deadline."""


class PeerClosed(ConnectionLost):
    """The peer closed the connection between two frames."""


def set_kernel_timeout(sock: socket.socket, option: int, timeout_s: float) -> None:
    """SO_RCVTIMEO or SO_SNDTIMEO; at least a microsecond, since 0 would mean for ever."""
    microseconds = max(1, int(timeout_s * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(*divmod(microseconds, 1_000_000)))


class Interrupt:
    """Breaks the blocking socket calls of another thread: a connect, accept, send or receive.

    Invariant: a watched socket is closed only after `forget`: what is shut down is never a descriptor's next use.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self.triggered = False

    def watch(self, sock: socket.socket) -> None:
        with self._lock:
            self._sock = sock
            if self.triggered:
                _shut_down(sock)

    def forget(self) -> None:
        with self._lock:
            self._sock = None

    def trigger(self) -> None:
        """From any thread, any number of times: the watched socket, and those watched later, are shut down."""
        with self._lock:
            self.triggered = True
            if self._sock is not None:
                _shut_down(self._sock)


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected any more, or not yet: then triggered tells its user
        sock.shutdown(socket.SHUT_RDWR)


class Channel:
    """`deadline_s` (from now) and `progress_timeout_s` hold until `set_deadlines` is called again."""

    def __init__(self, sock: socket.socket, *, progress_timeout_s: float, deadline_s: float) -> None:
        self.sock = sock
        self._header = memoryview(bytearray(HEADER.size))
        self._kernel_timeout_s = 0.0
        self._body = memoryview(bytearray(MAX_CONTROL_BYTES))
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:  # TCP sizes its buffers itself
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER_BYTES)
        self.set_deadlines(progress_timeout_s=progress_timeout_s, deadline_s=deadline_s)

    def set_deadlines(self, *, progress_timeout_s: float, deadline_s: float) -> None:
        self._progress_timeout_s = progress_timeout_s
        self._deadline = time.monotonic() + deadline_s
        self._bound_kernel_waits(min(progress_timeout_s, deadline_s))

    # -------------------------------------------------------------------------------------- frames

    def send_control(self, kind: FrameKind, body: ControlBody | None = None, lease: LeaseId = NO_LEASE) -> None:
        payload = encode_body(body) if body is not None else b""
        if len(payload) > MAX_CONTROL_BYTES:
            raise KvTransferError(
                ErrorCode.INVALID_REQUEST,
                f"{kind.name} of {len(payload)} bytes is over the limit of {MAX_CONTROL_BYTES}",
            )
        self.send([memoryview(encode_header(kind, lease, NO_SEGMENT, len(payload)) + payload)])

    def receive_header(self) -> memoryview:
        """The bytes of the next frame's header, valid until the next call. Raises PeerClosed at the end of stream."""
        self.receive_into([self._header], may_end=True)
        return self._header

    def receive_frame(self) -> Frame:
        """Raises AmpdError MALFORMED_MESSAGE for what is not a frame."""
        return decode_header(self.receive_header())

    def receive_body(self, frame: Frame, body_type: type[Body]) -> Body:
        """The body of a control frame; its length has been checked by decode_header."""
        body = self._body[: frame.length]
        self.receive_into([body])
        return decode_body(body, body_type)

    def send_descriptor(self, descriptor: int) -> None:
        """Unix sockets only: the peer gets a descriptor of the same open file."""
        try:
            socket.send_fds(self.sock, [b"d"], [descriptor], socket.MSG_NOSIGNAL)
        except OSError as error:
            raise self._failure(error, "took no descriptor") from error

    def receive_descriptor(self) -> int:
        """The caller closes it. Raises ConnectionLost, and KvTransferError where the message came without it."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self.sock, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise self._failure(error, "sent no descriptor") from error
        if not data:
            raise ConnectionLost(ErrorCode.KV_TRANSFER_FAILED, "the peer closed the connection instead")
        if len(descriptors) != 1:  # it sent none, or this process may not have it, or has too many
            for descriptor in descriptors:
                os.close(descriptor)
            raise KvTransferError(ErrorCode.KV_TRANSFER_FAILED, "no descriptor has come with the peer's message")
        return descriptors[0]

    # --------------------------------------------------------------------------------------- bytes

    def send(self, views: Sequence[memoryview], digest: Digest | None = None) -> None:
        """Send every byte, and add them to the digest. Raises ConnectionLost."""
        for piece in cut_into_pieces(views):
            rest = piece
            while rest:
                try:
                    sent = self.sock.sendmsg(rest, (), socket.MSG_NOSIGNAL)
                except OSError as error:
                    raise self._failure(error, "took no byte") from error
                rest = _split(rest, sent)[1]
                self._check_deadline()
            if digest is not None:  # while the receiver already copies
                for view in piece:
                    digest.update(view)

    def receive_into(self, views: Sequence[memoryview], digest: Digest | None = None, *, may_end: bool = False) -> None:
        """Fill every view; with a digest, add their bytes to it as they come.

        Raises ConnectionLost; PeerClosed if may_end and the stream ends before the first byte.
        """
        # payload is taken as it comes and digested while it is in the cache: cheaper than waiting for whole pieces
        flags = socket.MSG_WAITALL if digest is None else 0
        rest = [view for view in views if view.nbytes]
        while rest:
            try:
                received = self.sock.recvmsg_into(rest[:MAX_IOVECS], 0, flags)[0]
            except OSError as error:
                raise self._failure(error, "sent no byte") from error
            if received == 0:
                error_type = PeerClosed if may_end else ConnectionLost
                raise error_type(ErrorCode.KV_TRANSFER_FAILED, "the peer closed the connection before the end")
            may_end = False
            filled, rest = _split(rest, received)
            if digest is not None:
                for view in filled:
                    digest.update(view)
            self._check_deadline()

    def _check_deadline(self) -> None:
        """The total deadline; while it is nearer than the progress timeout it bounds the kernel's wait as well."""
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise ConnectionLost(ErrorCode.KV_TRANSFER_FAILED, "the transfer's deadline has passed")
        if remaining < self._progress_timeout_s:
            self._bound_kernel_waits(remaining)

    def check_progress(self, since: float) -> None:
        """For waits that are not the socket's: nothing has happened since that time. Raises ConnectionLost."""
        self._check_deadline()
        if time.monotonic() - since > self._progress_timeout_s:
            raise ConnectionLost(
                ErrorCode.KV_TRANSFER_FAILED, f"stalled: no byte has come for {self._progress_timeout_s:.3g} s"
            )

    def _bound_kernel_waits(self, timeout_s: float) -> None:
        if timeout_s != self._kernel_timeout_s:
            self._kernel_timeout_s = timeout_s
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                set_kernel_timeout(self.sock, option, timeout_s)

    def _failure(self, error: OSError, what: str) -> ConnectionLost:
        if isinstance(error, BlockingIOError):  # how the kernel reports SO_RCVTIMEO and SO_SNDTIMEO
            if time.monotonic() >= self._deadline:
                return ConnectionLost(ErrorCode.KV_TRANSFER_FAILED, "the transfer's deadline has passed")
            return ConnectionLost(
                ErrorCode.KV_TRANSFER_FAILED, f"stalled: the peer {what} for {self._progress_timeout_s:.3g} s"
            )
        return ConnectionLost(ErrorCode.KV_TRANSFER_FAILED, f"the connection broke: {error.strerror or error}")

    # ----------------------------------------------------------------------------------------- end

    def has_data(self) -> bool:
        """Whether the next receive would not wait: bytes, or the end."""
        poll = select.poll()  # select() would not take descriptors from 1,024 on
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def description(self) -> str:
        """Of the way that bytes take through the connection."""
        return "unix" if self.sock.family == socket.AF_UNIX else "tcp"

    def is_quiet(self) -> bool:
        """Whether an idle connection is still open and says nothing, as it should."""
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False  # end of stream, or bytes nobody asked for

    def close(self) -> None:
        self.sock.close()


def cut_into_pieces(views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The same bytes as lists of at most PIECE_BYTES and MAX_IOVECS: what one system call is given."""
    piece: list[memoryview] = []
    room = PIECE_BYTES
    for view in views:
        start, size = 0, view.nbytes
        while start < size:
            if not room or len(piece) == MAX_IOVECS:
                yield piece
                piece, room = [], PIECE_BYTES
            part = view if size <= room and not start else view[start : start + room]
            piece.append(part)
            start += part.nbytes
            room -= part.nbytes
    if piece:
        yield piece


def _split(views: list[memoryview], count: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first `count` bytes of the views, and what is left of them."""
    index = 0
    while index < len(views) and count >= views[index].nbytes:
        count -= views[index].nbytes
        index += 1
    first, rest = views[:index], views[index:]
    if count:
        first.append(rest[0][:count])
        rest[0] = rest[0][count:]
    return first, rest
