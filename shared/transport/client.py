"""The receiving side's threads and connections: pulls started from the asyncio loop, carried out off it.

One thread a running pull, at most max_concurrent, which are kept; the others wait in order. A connection that ended a
pull cleanly is kept for the next one to the same worker incarnation, a bounded number for a bounded time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import structlog

from shared.errors import AmpdError, ErrorCode, KvTransferError
from shared.transport.channel import Channel, Interrupt
from shared.transport.endpoints import connect, preferred_endpoints
from shared.transport.lanes import Lanes, LaneUnusable
from shared.transport.protocol import KvMemory
from shared.transport.receiver import (
    Connection,
    PullRequest,
    PullResult,
    as_transfer_error,
    greet,
    receive_kv,
)

log = structlog.get_logger(__name__)

__all__ = ["KvClient", "Pull", "PullRequest", "PullResult"]

_MAX_CONNECT_S = 2.0
_MAX_WAITING_PULLS = 4096
_MAX_IDLE_CONNECTIONS = 64
_MAX_IDLE_PER_PEER = 8
_MAX_BARRED = 256


class Pull:
    """One pull, from start_pull to its result."""

    def __init__(self, request: PullRequest, client: KvClient) -> None:
        self.request = request
        self.started_at = time.monotonic()
        self.interrupt = Interrupt()
        self.future: Future[PullResult] = Future()  # done = no thread touches the memory any more
        self.done = asyncio.wrap_future(self.future)
        self._client = client

    @property
    def remaining_s(self) -> float:
        return self.started_at + self.request.deadline_s - time.monotonic()

    async def wait(self) -> PullResult:
        """The result, or KvTransferError: then the blocks' bytes must not be used, and are no longer written.

        Cancelling the waiting task does not stop the pull: call cancel() before the blocks are used for anything else.
        """
        return await asyncio.shield(self.done)

    async def cancel(self) -> None:
        """Stop the pull. On return its thread no longer touches the memory. A pull that has ended is left as it is."""
        self.request_stop()
        await asyncio.wait([self.done])

    def request_stop(self) -> None:
        """Begin to cancel; cancel() also waits for it."""
        self.interrupt.trigger()
        self._client.drop_waiting(self)


class _Idle(NamedTuple):
    since: float
    connection: Connection


class KvClient:
    """Pulls KV into `memory`. start_pull and close are for the thread of one asyncio loop.

    `lanes`: how KV may come (default: through the connection); not closed here.
    """

    def __init__(
        self,
        memory: KvMemory,
        *,
        worker_id: str,
        incarnation: int,
        lanes: Lanes | None = None,
        max_concurrent: int = 32,
        idle_timeout_s: float = 30.0,
    ) -> None:
        self._memory = memory
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._lanes = lanes or Lanes()
        self._max_concurrent = max_concurrent
        self._idle_timeout_s = idle_timeout_s
        self._lock = threading.Lock()
        self._waiting: deque[Pull] = deque()
        self._running: set[Pull] = set()
        self._threads = ThreadPoolExecutor(max_concurrent, thread_name_prefix=f"kv-pull:{worker_id}")
        self._idle: list[_Idle] = []  # oldest first
        self._barred: dict[tuple[str, int], set[str]] = {}  # lanes by which a peer's pool cannot be read; oldest first
        self._closed = False
        self._reaper: asyncio.TimerHandle | None = None

    def start_pull(self, request: PullRequest) -> Pull:
        """Start a pull, or queue it behind max_concurrent others; its deadline runs from now.

        Raises ValueError for a range that the block table cannot hold, AmpdError OVERLOADED or DRAINING.
        """
        _check_request(request, self._memory.layout.block_size)
        loop = asyncio.get_running_loop()
        pull = Pull(request, self)
        with self._lock:
            if self._closed:
                raise AmpdError(ErrorCode.DRAINING, "the KV client is closed")
            if len(self._waiting) >= _MAX_WAITING_PULLS:
                raise AmpdError(ErrorCode.OVERLOADED, f"{_MAX_WAITING_PULLS} KV pulls wait", retry_after_s=1.0)
            self._waiting.append(pull)
        self._start_waiting()
        timer = loop.call_later(request.deadline_s, self.drop_waiting, pull)  # a running one minds its own deadline

        def settle(done: asyncio.Future[PullResult]) -> None:
            timer.cancel()
            if not done.cancelled():
                done.exception()  # seen: a pull that nobody waits for any more may fail without a warning

        pull.done.add_done_callback(settle)
        if self._reaper is None:
            self._reaper = loop.call_later(self._idle_timeout_s, self._reap, loop)
        return pull

    async def close(self) -> None:
        """Cancel every pull, wait for their threads, close every connection."""
        with self._lock:
            self._closed = True
            pulls = [*self._waiting, *self._running]
        for pull in pulls:
            pull.request_stop()
        for pull in pulls:
            await pull.cancel()
        self._threads.shutdown()  # each pull has set its result: what is left of it is its return
        if self._reaper is not None:
            self._reaper.cancel()
        self._close_idle(since_before=float("inf"))

    # -------------------------------------------------------------------------------- waiting pulls

    def _start_waiting(self) -> None:
        refused: list[Pull] = []
        with self._lock:
            while self._waiting and len(self._running) < self._max_concurrent:
                pull = self._waiting.popleft()
                self._running.add(pull)
                try:
                    self._threads.submit(self._run, pull)
                except RuntimeError:  # the system gives no more threads
                    self._running.remove(pull)
                    refused.append(pull)
        for pull in refused:
            pull.future.set_exception(KvTransferError(ErrorCode.OVERLOADED, "no thread can be started to pull KV"))

    def drop_waiting(self, pull: Pull) -> None:
        """Fail a pull that has no thread yet; others are left alone."""
        with self._lock:
            if pull not in self._waiting:
                return
            self._waiting.remove(pull)
        pull.future.set_exception(_cancelled_or_late(pull))

    # ------------------------------------------------------------------------------ in pull threads

    def _run(self, pull: Pull) -> None:
        with self._lock:
            if pull not in self._running:
                return  # refused for want of a thread; the pool had queued it all the same
        result: PullResult | None = None
        failure: BaseException | None = None
        try:
            result = self._pull(pull)
        except AmpdError as error:
            failure = _cancelled_or_late(pull) if pull.interrupt.triggered else as_transfer_error(error)
        except BaseException as error:  # a bug, here or in on_segment: for whoever waits
            failure = error
        with self._lock:
            self._running.remove(pull)
        self._start_waiting()
        if failure is not None:
            pull.future.set_exception(failure)
        elif result is not None:
            pull.future.set_result(result)

    def _pull(self, pull: Pull) -> PullResult:
        request = pull.request
        connection = self._open(pull)
        channel = connection.channel
        try:
            channel.set_deadlines(progress_timeout_s=request.progress_timeout_s, deadline_s=max(1e-3, pull.remaining_s))
            result = receive_kv(connection, self._memory, request, pull.started_at, pull.interrupt)
        except BaseException as error:
            pull.interrupt.forget()
            channel.close()
            if isinstance(error, LaneUnusable):
                self._bar_lane(connection, error)
            raise
        pull.interrupt.forget()
        self._keep(connection)
        return result

    def _open(self, pull: Pull) -> Connection:
        """A greeted connection to the source, watched by the pull's interrupt."""
        request = pull.request
        while (idle := self._take_idle((request.source, request.source_incarnation))) is not None:
            pull.interrupt.watch(idle.channel.sock)
            if idle.channel.is_quiet():
                return idle
            pull.interrupt.forget()
            idle.channel.close()
        failure = KvTransferError(
            ErrorCode.KV_TRANSFER_FAILED,
            f"no endpoint of worker {request.source} can be reached from here: {', '.join(request.endpoints)}",
        )
        with self._lock:
            barred = frozenset(self._barred.get((request.source, request.source_incarnation), ()))
        for endpoint in preferred_endpoints(request.endpoints):
            timeout_s = max(1e-3, min(_MAX_CONNECT_S, request.progress_timeout_s, pull.remaining_s))
            if pull.interrupt.triggered:
                break
            try:
                sock = connect(endpoint, timeout_s, pull.interrupt)
            except OSError as error:
                failure = KvTransferError(ErrorCode.KV_TRANSFER_FAILED, f"cannot connect to {endpoint}: {error}")
                continue
            channel = Channel(
                sock, progress_timeout_s=request.progress_timeout_s, deadline_s=max(1e-3, pull.remaining_s)
            )
            try:
                return greet(channel, self._memory, self._lanes, self._worker_id, self._incarnation, request, barred)
            except AmpdError as error:
                # another worker may live at a Unix path of the same name here: the next endpoint may be right
                failure = as_transfer_error(error)
                pull.interrupt.forget()
                channel.close()
        raise failure

    def _bar_lane(self, connection: Connection, error: LaneUnusable) -> None:
        """The next pulls from this worker incarnation go another way, if it has one."""
        assert connection.lane is not None
        with self._lock:
            self._barred.setdefault(connection.peer, set()).add(connection.lane.name)
            while len(self._barred) > _MAX_BARRED:
                del self._barred[next(iter(self._barred))]
        log.warning("kv_lane_unusable", peer=connection.peer[0], lane=connection.lane.name, error=error.message)

    # ------------------------------------------------------------------------------ idle connections

    def _take_idle(self, peer: tuple[str, int]) -> Connection | None:
        with self._lock:
            for index in range(len(self._idle) - 1, -1, -1):
                if self._idle[index].connection.peer == peer:
                    return self._idle.pop(index).connection
        return None

    def _keep(self, connection: Connection) -> None:
        with self._lock:
            held = sum(idle.connection.peer == connection.peer for idle in self._idle)
            if not self._closed and held < _MAX_IDLE_PER_PEER and len(self._idle) < _MAX_IDLE_CONNECTIONS:
                self._idle.append(_Idle(time.monotonic(), connection))
                return
        connection.channel.close()

    def _close_idle(self, *, since_before: float) -> None:
        with self._lock:
            late = [idle for idle in self._idle if idle.since <= since_before]
            self._idle = [idle for idle in self._idle if idle.since > since_before]
        for idle in late:
            idle.connection.channel.close()

    def _reap(self, loop: asyncio.AbstractEventLoop) -> None:
        self._close_idle(since_before=time.monotonic() - self._idle_timeout_s)
        with self._lock:
            busy = bool(self._idle or self._running or self._waiting)
        self._reaper = loop.call_later(self._idle_timeout_s, self._reap, loop) if busy else None


def _cancelled_or_late(pull: Pull) -> KvTransferError:
    if pull.interrupt.triggered:
        return KvTransferError(ErrorCode.CANCELLED, "the pull was cancelled")
    return KvTransferError(ErrorCode.KV_TRANSFER_FAILED, "the pull's deadline passed while it waited for other pulls")


def _check_request(request: PullRequest, block_size: int) -> None:
    if not 0 <= request.token_start < request.token_stop <= len(request.block_table) * block_size:
        raise ValueError(
            f"tokens [{request.token_start}, {request.token_stop}) do not lie within {len(request.block_table)} blocks"
        )
    if request.progress_timeout_s <= 0 or request.deadline_s <= 0:
        raise ValueError("a pull needs positive timeouts")
