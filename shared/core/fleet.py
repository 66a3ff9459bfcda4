"""The workers as the coordinator knows them: alive or lost, what they reported, and what was promised to them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from shared.core.records import WorkerRef
from shared.core.routing import WorkerLoad
from shared.core.types import SessionKey
from shared.messages import Heartbeat

MAX_DEAD_INCARNATIONS = 256  # remembered, so that a late heartbeat of a dead process does not revive it


@dataclass(slots=True)
class RoutedPrefill:
    attempt: int
    num_tokens: int


@dataclass(slots=True, eq=False)
class WorkerState:
    """One incarnation of one worker. `alive` is False once it is lost; its next heartbeat revives it."""

    heartbeat: Heartbeat
    last_seen: float
    alive: bool = True
    suspect_until: float = 0.0
    num_promised_tokens: int = 0  # of all sessions bound here
    running: dict[SessionKey, int] = field(default_factory=dict)  # rounds in flight here, with the KV they may need
    num_running_tokens: int = 0
    prefills: dict[SessionKey, RoutedPrefill] = field(default_factory=dict)  # routed here, not ended
    num_routed_tokens: int = 0  # routed here since the newest heartbeat
    owed_drops: set[SessionKey] = field(default_factory=set)  # sessions to drop when it can be reached again

    @property
    def worker_id(self) -> str:
        return self.heartbeat.worker_id

    @property
    def incarnation(self) -> int:
        return self.heartbeat.incarnation

    @property
    def ref(self) -> WorkerRef:
        return WorkerRef(self.worker_id, self.incarnation)

    @property
    def num_kv_tokens(self) -> int:
        return self.heartbeat.num_blocks * self.heartbeat.block_size

    @property
    def num_free_kv_tokens(self) -> int:
        """KV room beyond what is used and what is promised to the sessions bound here (negative: over-promised)."""
        used = (self.heartbeat.num_blocks - self.heartbeat.num_free_blocks) * self.heartbeat.block_size
        return self.num_kv_tokens - max(used, self.num_promised_tokens)

    def takes_work(self, now: float) -> bool:
        return self.alive and not self.heartbeat.draining and now >= self.suspect_until

    def load(self) -> WorkerLoad:
        beat = self.heartbeat
        return WorkerLoad(
            worker_id=beat.worker_id,
            incarnation=beat.incarnation,
            ttft=beat.ttft,
            itl=beat.itl,
            queue_num_tokens=beat.queue_num_tokens,
            routed_num_tokens=self.num_routed_tokens,
            num_outstanding=len(self.prefills),
        )

    def begin_running(self, key: SessionKey, num_tokens: int) -> None:
        self.end_running(key)
        self.running[key] = num_tokens
        self.num_running_tokens += num_tokens

    def end_running(self, key: SessionKey) -> None:
        self.num_running_tokens -= self.running.pop(key, 0)

    def begin_prefill(self, key: SessionKey, attempt: int, num_tokens: int) -> None:
        self.prefills[key] = RoutedPrefill(attempt, num_tokens)
        self.num_routed_tokens += num_tokens

    def end_prefill(self, key: SessionKey) -> None:
        self.prefills.pop(key, None)


class Fleet:
    """Every worker heard of, by id; at most one incarnation each."""

    def __init__(self, heartbeat_timeout_s: float, worker_memory_s: float) -> None:
        self.workers: dict[str, WorkerState] = {}
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._worker_memory_s = worker_memory_s
        self._dead: dict[WorkerRef, None] = {}

    def note_heartbeat(self, heartbeat: Heartbeat, now: float) -> tuple[WorkerState | None, WorkerState | None]:
        """(the worker, the incarnation it replaced). (None, None) for a late heartbeat of a replaced process."""
        known = self.workers.get(heartbeat.worker_id)
        if known is not None and known.incarnation == heartbeat.incarnation:
            known.last_seen = now
            known.alive = True
            if heartbeat.seq >= known.heartbeat.seq:
                known.heartbeat = heartbeat
                known.num_routed_tokens = 0
            return known, None
        if WorkerRef(heartbeat.worker_id, heartbeat.incarnation) in self._dead:
            return None, None
        if known is not None:
            self._bury(known)
        worker = WorkerState(heartbeat, last_seen=now)
        self.workers[heartbeat.worker_id] = worker
        return worker, known

    def find(self, ref: WorkerRef) -> WorkerState | None:
        """The worker if it is alive and still the same process."""
        worker = self.workers.get(ref.worker_id)
        return worker if worker is not None and worker.alive and worker.incarnation == ref.incarnation else None

    def has_replaced(self, ref: WorkerRef) -> bool:
        """Another process runs under this id: the one meant is gone for good."""
        worker = self.workers.get(ref.worker_id)
        return worker is not None and worker.incarnation != ref.incarnation

    def list_silent(self, now: float) -> list[WorkerState]:
        return [w for w in self.workers.values() if w.alive and now - w.last_seen > self._heartbeat_timeout_s]

    def forget_old(self, now: float) -> list[str]:
        """Forget workers lost long ago; returns their ids."""
        old = [w for w in self.workers.values() if not w.alive and now - w.last_seen > self._worker_memory_s]
        for worker in old:
            self._bury(worker)
        return [worker.worker_id for worker in old]

    def shift_last_seen(self, by_s: float) -> None:
        """The coordinator itself stood still: silence meanwhile says nothing about the workers."""
        for worker in self.workers.values():
            worker.last_seen += by_s

    def list_decode(self, model: str | None, now: float) -> list[WorkerState]:
        """Workers that can be bound to a session of `model` (None: of any)."""
        return [
            w
            for w in self.workers.values()
            if w.takes_work(now) and w.heartbeat.role != "prefill" and (model is None or w.heartbeat.model == model)
        ]

    def list_prefill(self, decode: WorkerState, avoid: Collection[str], now: float) -> list[WorkerState]:
        """Workers that can prefill for `decode`: the KV layout is the same, and they are not it."""
        return [
            w
            for w in self.workers.values()
            if w.takes_work(now)
            and w.heartbeat.role != "decode"
            and w is not decode
            and w.worker_id not in avoid
            and w.heartbeat.layout_hash == decode.heartbeat.layout_hash
        ]

    def _bury(self, worker: WorkerState) -> None:
        worker.alive = False
        del self.workers[worker.worker_id]
        self._dead[worker.ref] = None
        if len(self._dead) > MAX_DEAD_INCARNATIONS:
            del self._dead[next(iter(self._dead))]


def choose_decode_worker(
    candidates: Iterable[WorkerState], num_needed_tokens: int, avoid: Collection[str], kv_overcommit: float
) -> WorkerState | None:
    """The worker with the most free KV memory, what is promised there counted as used (the paper's binding).

    Only workers whose pool can hold the round at all and that have not been promised more than `kv_overcommit`
    pools to rounds in flight. Workers in `avoid` only if there is no other. Equal: the lower id.
    """
    fitting = [worker for worker in candidates if fits(worker, num_needed_tokens, kv_overcommit)]
    return min(
        fitting,
        key=lambda worker: (worker.worker_id in avoid, -worker.num_free_kv_tokens, worker.worker_id),
        default=None,
    )


def fits(worker: WorkerState, num_needed_tokens: int, kv_overcommit: float) -> bool:
    capacity = worker.num_kv_tokens
    return num_needed_tokens <= capacity and worker.num_running_tokens + num_needed_tokens <= kv_overcommit * capacity
