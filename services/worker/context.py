"""What both roles of a worker share."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import structlog

from services.worker.kv_changes import KvChanges
from services.worker.outbox import Outbox
from services.worker.streams import StreamPublisher
from shared import subjects
from shared.bus import Bus
from shared.core.chunking import MAX_STAGED_PREFILLS
from shared.core.policies import SchedulingPolicy, find_policy
from shared.core.step_costs import StepCosts
from shared.core.windows import SlidingWindow
from shared.engine.engine_loop import EngineLoop
from shared.errors import BusError
from shared.messages import Message, PeerMessage, decode, encode, raise_if_error
from shared.text import TextCodec
from shared.transport.client import KvClient
from shared.transport.leases import LeaseTable
from shared.transport.receiver import PullResult

log = structlog.get_logger(__name__)

MAX_TTFT_SAMPLES = 4_096  # of a window
MAX_ITL_SAMPLES = 16_384


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """Bounds of one worker; durations in seconds."""

    max_queued_prefills: int = 256
    max_sessions: int = 4096
    lease_ttl_s: float = 15.0
    peer_timeout_s: float = 2.0
    peer_attempts: int = 3
    kv_progress_timeout_s: float = 5.0
    max_staged: int = MAX_STAGED_PREFILLS  # prefills off the queue that pull or compute
    max_residents: int = 1024  # sessions whose KV is kept for their next prefill
    max_stagings: int = 8  # pulls ahead of a round
    staging_timeout_s: float = 30.0


@dataclass(eq=False)
class WorkerContext:
    worker_id: str
    incarnation: int
    bus: Bus
    engine: EngineLoop
    leases: LeaseTable
    kv_client: KvClient
    kv_endpoints: tuple[str, ...]
    codec: TextCodec
    outbox: Outbox
    streams: StreamPublisher
    clock: Callable[[], float]
    max_context_tokens: int
    policy: SchedulingPolicy = field(default_factory=lambda: find_policy("ampd"))
    costs: StepCosts | None = None  # of this worker's steps; None: not measured
    host_kv_bytes: int = 0  # host memory for evicted KV, where the policy has a host tier
    host_read_s: Callable[[int], float] | None = None  # emulated engine: how long reading n tokens back should last
    parallel_degree: int = 1
    profile: str = ""
    node: str = ""
    limits: WorkerLimits = field(default_factory=WorkerLimits)
    kv_bytes_per_s: float = 0.0
    kv_pulled: Counter[str] = field(default_factory=Counter)  # bytes, by the way they took
    draining: bool = False
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    kv_changes: KvChanges = field(init=False)
    ttft: SlidingWindow = field(init=False)  # over the policy's window_s
    itl: SlidingWindow = field(init=False)

    def __post_init__(self) -> None:
        self.ttft = SlidingWindow(self.policy.window_s, MAX_TTFT_SAMPLES)
        self.itl = SlidingWindow(self.policy.window_s, MAX_ITL_SAMPLES)
        self.kv_changes = KvChanges(self.engine)

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A task that is kept and cancelled with the worker; one that fails ends the process (see WorkerRuntime)."""
        task = asyncio.create_task(coroutine, name=name)
        self.tasks.add(task)
        return task

    def observe_pull(self, result: PullResult, purpose: str, session: str, round_index: int) -> None:
        """purpose: history, increment, move or staging. `end_s`: of the clock that a host's processes share."""
        log.debug(
            "kv_pulled",
            purpose=purpose,
            session=session,
            round=round_index,
            end_s=self.clock(),
            wall_s=result.wall_s,
            waiting_s=result.waiting_s,
            num_bytes=result.num_bytes,
            lane=result.lane,
        )
        self.kv_pulled[result.lane] += result.num_bytes
        active_s = result.wall_s - result.waiting_s
        if active_s > 0 and result.num_bytes > 0:
            rate = result.num_bytes / active_s
            self.kv_bytes_per_s = rate if self.kv_bytes_per_s == 0 else 0.8 * self.kv_bytes_per_s + 0.2 * rate

    async def ask_peer(self, worker_id: str, message: PeerMessage) -> Message:
        """Request to another worker, repeated a few times on time-out (peer messages are idempotent)."""
        data = encode(message)
        last: BusError | None = None
        for _ in range(self.limits.peer_attempts):
            try:
                reply = await self.bus.request(
                    subjects.worker_peer(worker_id), data, timeout_s=self.limits.peer_timeout_s
                )
            except BusError as error:
                last = error
                continue
            return raise_if_error(decode(reply))
        assert last is not None
        raise last
