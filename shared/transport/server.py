"""The sending side: one thread an endpoint accepts, one thread a connection sends leased KV to whoever has a ticket.

Order of a pull: the ticket's signature and claims, then the lease, then sizes; nothing is allocated for a peer before
(a connection's two small buffers are fixed). The lease is checked before every frame and after the last byte.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from shared.errors import AmpdError, ErrorCode
from shared.transport.channel import Channel, ConnectionLost, Interrupt
from shared.transport.endpoints import listen, parse_endpoint
from shared.transport.lanes import Lane, Lanes
from shared.transport.leases import Lease, LeaseEnd, LeaseTable
from shared.transport.protocol import (
    KEEPALIVE_S,
    PROTOCOL_VERSION,
    Frame,
    FrameKind,
    Hello,
    KvMemory,
    LeaseId,
    PoolBody,
    PullBody,
    Refused,
    check_peer,
)
from shared.transport.sender import RangeSender, SegmentSender, StreamSender, send_lease
from shared.transport.tickets import UsedNonces, check_secret, verify

_MAX_PROGRESS_TIMEOUT_S = 30.0


class KvServer:
    """Serves the leases of `leases` from `memory`. `listen`: endpoints such as tcp://127.0.0.1:0, unix:///path.

    `counters` counts since the start: connections, refused (typed refusals), malformed, pulls, delivered, failed,
    bytes_sent (payload), accept_errors. `lanes`: how KV may leave (default: through the connection); not closed here.
    """

    def __init__(
        self,
        memory: KvMemory,
        leases: LeaseTable,
        *,
        worker_id: str,
        incarnation: int,
        secret: bytes,
        listen: Sequence[str],
        lanes: Lanes | None = None,
        max_connections: int = 256,
        handshake_timeout_s: float = 5.0,
        idle_timeout_s: float = 60.0,
    ) -> None:
        check_secret(secret)
        self._memory = memory
        self._leases = leases
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._secret = secret
        self._listen = tuple(listen)
        self._lanes = lanes or Lanes()
        self._max_connections = max_connections
        self._handshake_timeout_s = handshake_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._nonces = UsedNonces()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()
        self._acceptors: list[tuple[threading.Thread, Interrupt]] = []
        self._connections: dict[threading.Thread, Interrupt] = {}
        self._unix_paths: list[Path] = []

    def start(self) -> tuple[str, ...]:
        """Listen on every endpoint; returns them as they are to be advertised. Raises AmpdError INVALID_REQUEST."""
        advertised: list[str] = []
        try:
            for text in self._listen:
                sock, endpoint = listen(text, self._max_connections)
                advertised.append(endpoint)
                if path := parse_endpoint(endpoint).path:
                    self._unix_paths.append(Path(path))
                self._start_thread(sock)
        except AmpdError:
            self.close()
            raise
        return tuple(advertised)

    def close(self) -> None:
        """Shut every socket and join every thread; pulls in progress fail. A second call does nothing."""
        self._closing.set()
        for thread, interrupt in self._acceptors:
            interrupt.trigger()
            thread.join()
        with self._lock:
            connections = list(self._connections.items())
        for _, interrupt in connections:
            interrupt.trigger()
        for thread, _ in connections:
            thread.join()
        for path in self._unix_paths:
            path.unlink(missing_ok=True)
        self._acceptors.clear()
        self._unix_paths.clear()

    @property
    def counters(self) -> Mapping[str, int]:
        with self._lock:
            return dict(self._counters)

    def _count(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counters[name] += amount

    # --------------------------------------------------------------------------------- connections

    def _start_thread(self, listener: socket.socket) -> None:
        interrupt = Interrupt()
        interrupt.watch(listener)
        thread = threading.Thread(
            target=self._accept, args=(listener, interrupt), name=f"kv-accept:{self._worker_id}", daemon=True
        )
        self._acceptors.append((thread, interrupt))
        thread.start()

    def _accept(self, listener: socket.socket, interrupt: Interrupt) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = listener.accept()
            except OSError:  # closing; or out of descriptors, which passes when a connection ends
                if not self._closing.wait(0.05):
                    self._count("accept_errors")
                continue
            self._admit_connection(sock)
        interrupt.forget()
        listener.close()

    def _admit_connection(self, sock: socket.socket) -> None:
        watch = Interrupt()
        thread = threading.Thread(
            target=self._serve, args=(sock, watch), name=f"kv-serve:{self._worker_id}", daemon=True
        )
        with self._lock:
            admitted = len(self._connections) < self._max_connections
            if admitted:
                self._connections[thread] = watch
                self._counters["connections"] += 1
        try:
            if not admitted:
                raise AmpdError(ErrorCode.OVERLOADED, f"{self._max_connections} KV connections are open")
            watch.watch(sock)
            thread.start()
        except (AmpdError, RuntimeError) as error:  # RuntimeError: the system gives no more threads
            watch.forget()
            with self._lock:
                self._connections.pop(thread, None)
            refusal = (
                error if isinstance(error, AmpdError) else AmpdError(ErrorCode.OVERLOADED, "no thread to serve it")
            )
            self._refuse(Channel(sock, progress_timeout_s=0.1, deadline_s=0.1), refusal)
            sock.close()

    def _serve(self, sock: socket.socket, watch: Interrupt) -> None:
        """A connection's whole life."""
        timeout_s = self._handshake_timeout_s
        channel = Channel(sock, progress_timeout_s=timeout_s, deadline_s=timeout_s)
        try:
            peer, lane = self._greet(channel)
            pool_is_known = lane is None
            while not self._closing.is_set():
                self._serve_pull(channel, peer, lane, pool_is_known)
                pool_is_known = True
                channel.set_deadlines(progress_timeout_s=self._idle_timeout_s, deadline_s=self._idle_timeout_s)
        except ConnectionLost:
            pass  # an idle or broken connection; what it cost a lease has been recorded with the lease
        except AmpdError as error:
            self._refuse(channel, error)
        finally:
            watch.forget()
            channel.close()
            with self._lock:
                del self._connections[threading.current_thread()]

    def _refuse(self, channel: Channel, error: AmpdError) -> None:
        self._count("malformed" if error.code is ErrorCode.MALFORMED_MESSAGE else "refused")
        with contextlib.suppress(ConnectionLost):  # a peer that does not listen to why
            channel.send_control(FrameKind.REFUSED, Refused(code=error.code, message=error.message[:500]))

    def _greet(self, channel: Channel) -> tuple[Hello, Lane | None]:
        theirs = channel.receive_body(_expect(channel.receive_frame(), FrameKind.HELLO), Hello)
        layout = self._memory.layout
        mine = Hello(
            protocol=PROTOCOL_VERSION,
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            layout_hash=layout.layout_hash,
            layout=layout,
            peer_id=theirs.worker_id,
            peer_incarnation=theirs.incarnation,
            lanes=(),
        )
        check_peer(theirs, mine)  # seen from the receiver, which named whom it wants
        name = self._lanes.choose(channel, theirs.lanes)
        channel.send_control(FrameKind.WELCOME, msgspec.structs.replace(mine, lanes=(name,)))
        return theirs, self._lanes.find(name)

    # --------------------------------------------------------------------------------------- pulls

    def _serve_pull(self, channel: Channel, peer: Hello, lane: Lane | None, pool_is_known: bool) -> None:
        frame = _expect(channel.receive_frame(), FrameKind.PULL)
        body = channel.receive_body(frame, PullBody)
        lease = self._admit(peer, frame.lease, body)
        self._count("pulls")
        end, reason = LeaseEnd.FAILED, "the transfer broke off"
        try:
            channel.set_deadlines(
                progress_timeout_s=_clamp(body.progress_timeout_s, 0.01, _MAX_PROGRESS_TIMEOUT_S), deadline_s=math.inf
            )
            if lane is not None and not pool_is_known:  # it reads the whole pool: only who has a ticket may know it
                channel.send_control(FrameKind.POOL, PoolBody(description=lane.describe()), frame.lease)
                lane.hand_over(channel)
            self._send(channel, lane, frame.lease, lease, body)
            _expect(channel.receive_frame(), FrameKind.DELIVERED)
            end, reason = LeaseEnd.DELIVERED, ""
        except AmpdError as error:
            reason = error.message
            raise
        finally:
            self._count("delivered" if end is LeaseEnd.DELIVERED else "failed")
            self._leases.end(lease, end, reason)

    def _admit(self, peer: Hello, name: LeaseId, body: PullBody) -> Lease:
        """The lease, if this peer may pull it now. Raises AmpdError KV_TICKET_INVALID, WRONG_INCARNATION,
        KV_LEASE_INVALID or OVERLOADED."""
        claims = verify(self._secret, body.ticket)
        if claims.source != self._worker_id:
            raise AmpdError(ErrorCode.KV_TICKET_INVALID, f"the ticket is for worker {claims.source}")
        if claims.source_incarnation != self._incarnation or name.incarnation != self._incarnation:
            raise AmpdError(ErrorCode.WRONG_INCARNATION, f"worker {self._worker_id} has restarted since")
        if (claims.destination, claims.destination_incarnation) != (peer.worker_id, peer.incarnation):
            raise AmpdError(
                ErrorCode.KV_TICKET_INVALID,
                f"the ticket is for worker {claims.destination}, incarnation {claims.destination_incarnation}",
            )
        if claims.key != body.key:
            raise AmpdError(ErrorCode.KV_TICKET_INVALID, "the ticket is for another round or attempt")
        lease = self._leases.find(name.lease_id, name.generation)
        if lease.key != claims.key:
            raise AmpdError(ErrorCode.KV_LEASE_INVALID, "the lease is of another round or attempt")
        now = self._leases.clock()
        if now > lease.granted_at + claims.ttl_s:
            raise AmpdError(ErrorCode.KV_TICKET_INVALID, f"the ticket's {claims.ttl_s:.3g} s have passed")
        if not lease.token_start <= body.token_start < body.token_stop <= lease.token_stop:
            raise AmpdError(
                ErrorCode.KV_LEASE_INVALID,
                f"the lease is of tokens [{lease.token_start}, {lease.token_stop}), "
                f"not [{body.token_start}, {body.token_stop})",
            )
        num_bytes = (body.token_stop - body.token_start) * self._memory.layout.bytes_per_token
        if num_bytes > claims.max_bytes:
            raise AmpdError(
                ErrorCode.KV_TICKET_INVALID, f"the ticket allows {claims.max_bytes} bytes, {num_bytes} are asked for"
            )
        self._nonces.use(claims, now)
        lease.begin_pull()
        return lease

    def _send(self, channel: Channel, lane: Lane | None, name: LeaseId, lease: Lease, body: PullBody) -> None:
        memory = self._memory
        sender: SegmentSender = StreamSender(channel, name, memory, lease)
        if lane is not None:
            sender = RangeSender(channel, name, lane, lease)
        serving = lane.serving() if lane is not None else contextlib.nullcontext()
        keepalive_s = _clamp(body.keepalive_s, 0.01, KEEPALIVE_S)
        try:
            with serving:
                send_lease(channel, name, lease, body, sender, memory.layout, keepalive_s)
        finally:
            self._count("bytes_sent", sender.num_bytes)


def _expect(frame: Frame, kind: FrameKind) -> Frame:
    if frame.kind is not kind:
        raise AmpdError(ErrorCode.MALFORMED_MESSAGE, f"{kind.name} was due, {frame.kind.name} came")
    return frame


def _clamp(value: float, low: float, high: float) -> float:
    return max(low, min(value, high)) if value == value else high  # a peer may send NaN
