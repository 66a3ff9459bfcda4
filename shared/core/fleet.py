"""The workers as the coordinator knows them: alive or lost, what they reported, and what was promised to them."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from shared.core.binding import BindingName, choose_binding
from shared.core.load import WorkerLoad
from shared.core.measured_costs import WorkerCosts
from shared.core.profile import Profile
from shared.core.records import WorkerRef
from shared.messages import Heartbeat, Role

MAX_DEAD_INCARNATIONS = 256  # remembered, so that a late heartbeat of a dead process does not revive it


@dataclass(slots=True, eq=False)
class RoleChange:
    """A worker takes another role (see role_changes.py): whatever role its heartbeats tell, decisions look at the new
    one, until a heartbeat tells it, too, or `until`."""

    role: Role
    previous: Role
    until: float
    is_acknowledged: bool = False
    waiting: list[int] = field(default_factory=list)  # requests to be answered


@dataclass(slots=True, eq=False)
class WorkerState:
    """One incarnation of one worker. `alive` is False once it is lost; its next heartbeat revives it.

    `load` is what decisions look at: kept up to date by what is routed here and what ends.
    """

    heartbeat: Heartbeat
    last_seen: float
    costs: WorkerCosts
    load: WorkerLoad
    alive: bool = True
    suspect_until: float = 0.0
    change: RoleChange | None = None

    @classmethod
    def of(cls, heartbeat: Heartbeat, now: float, profile: Profile | None, cost_scale: float) -> WorkerState:
        costs = WorkerCosts.of(heartbeat, profile, cost_scale)
        load = WorkerLoad(
            worker_id=heartbeat.worker_id,
            incarnation=heartbeat.incarnation,
            role=heartbeat.role,
            costs=costs.costs,
            num_kv_tokens=count_kv_tokens(heartbeat),
            node=number_node(heartbeat),
            ttft=heartbeat.ttft,
            itl=heartbeat.itl,
        )
        return cls(heartbeat, now, costs, load)

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
        return self.load.num_kv_tokens

    def takes_work(self, now: float) -> bool:
        return self.alive and not self.heartbeat.draining and now >= self.suspect_until

    def take_heartbeat(self, heartbeat: Heartbeat, *, corrects: bool) -> None:
        """A newer heartbeat of the same process: its windows, role and rates, and, with `corrects`, how long its steps
        take against its profile."""
        load = self.load
        self.heartbeat = heartbeat
        if self.change is None:
            load.role = heartbeat.role
        load.ttft, load.itl = heartbeat.ttft, heartbeat.itl
        load.num_kv_tokens = count_kv_tokens(heartbeat)
        load.node = number_node(heartbeat)
        if self.costs.follow(heartbeat):
            load.costs = self.costs.costs
        if corrects and self.costs.are_of_profile:  # the others follow its rates
            scale = self.costs.costs.scale
            load.prefill_correction = heartbeat.prefill_scale / scale if heartbeat.prefill_scale > 0.0 else 1.0
            load.decode_correction = heartbeat.decode_scale / scale if heartbeat.decode_scale > 0.0 else 1.0


def count_kv_tokens(heartbeat: Heartbeat) -> int:
    return max(1, heartbeat.num_blocks * heartbeat.block_size)


def number_node(heartbeat: Heartbeat) -> int:
    """The node as a number; a worker that names none is a node of its own."""
    name = f"node:{heartbeat.node}" if heartbeat.node else f"worker:{heartbeat.worker_id}"
    return zlib.crc32(name.encode())


class Fleet:
    """Every worker heard of, by id; at most one incarnation each."""

    def __init__(
        self,
        heartbeat_timeout_s: float,
        worker_memory_s: float,
        *,
        profile: Profile | None = None,
        cost_scale: float = 1.0,
        corrects: bool = False,
    ) -> None:
        self.workers: dict[str, WorkerState] = {}
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._worker_memory_s = worker_memory_s
        self._profile = profile
        self._cost_scale = cost_scale
        self._corrects = corrects
        self._dead: dict[WorkerRef, None] = {}

    def note_heartbeat(self, heartbeat: Heartbeat, now: float) -> tuple[WorkerState | None, WorkerState | None]:
        """(the worker, the incarnation it replaced). (None, None) for a late heartbeat of a replaced process."""
        known = self.workers.get(heartbeat.worker_id)
        if known is not None and known.incarnation == heartbeat.incarnation:
            known.last_seen = now
            known.alive = True
            if heartbeat.seq >= known.heartbeat.seq:
                known.take_heartbeat(heartbeat, corrects=self._corrects)
            return known, None
        if WorkerRef(heartbeat.worker_id, heartbeat.incarnation) in self._dead:
            return None, None
        if known is not None:
            self._bury(known)
        worker = WorkerState.of(heartbeat, now, self._profile, self._cost_scale)
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

    def forget_old(self, now: float) -> None:
        """Forget workers lost long ago."""
        old = [w for w in self.workers.values() if not w.alive and now - w.last_seen > self._worker_memory_s]
        for worker in old:
            self._bury(worker)

    def shift_last_seen(self, by_s: float) -> None:
        """The coordinator itself stood still: silence meanwhile says nothing about the workers."""
        for worker in self.workers.values():
            worker.last_seen += by_s

    def list_decode(self, model: str | None, now: float) -> list[WorkerState]:
        """Workers that can be bound to a session of `model` (None: of any)."""
        return [
            w
            for w in self.workers.values()
            if w.takes_work(now) and w.load.takes_decode and (model is None or w.heartbeat.model == model)
        ]

    def list_prefill(self, decode: WorkerState, avoid: Collection[str], now: float) -> list[WorkerState]:
        """Workers that can prefill for `decode`: the KV layout is the same, and they are not it."""
        layout_hash = decode.heartbeat.layout_hash
        return [
            w
            for w in self.workers.values()
            if w.load.takes_prefill
            and w is not decode
            and w.takes_work(now)
            and w.worker_id not in avoid
            and w.heartbeat.layout_hash == layout_hash
        ]

    def _bury(self, worker: WorkerState) -> None:
        worker.alive = False
        del self.workers[worker.worker_id]
        self._dead[worker.ref] = None
        if len(self._dead) > MAX_DEAD_INCARNATIONS:
            del self._dead[next(iter(self._dead))]


def choose_decode_worker(
    candidates: Iterable[WorkerState],
    num_needed_tokens: int,
    avoid: Collection[str],
    kv_overcommit: float,
    binding: BindingName,
    now: float,
) -> WorkerState | None:
    """The worker that `binding` chooses of those whose pool can hold the round at all and that have not been promised
    more than `kv_overcommit` pools to rounds in flight. Workers in `avoid` only if there is no other."""
    fitting = [worker for worker in candidates if fits(worker, num_needed_tokens, kv_overcommit)]
    wanted = [worker for worker in fitting if worker.worker_id not in avoid] or fitting
    chosen = choose_binding((worker.load for worker in wanted), binding, now)
    return next((worker for worker in wanted if worker.load is chosen), None)


def fits(worker: WorkerState, num_needed_tokens: int, kv_overcommit: float) -> bool:
    capacity = worker.num_kv_tokens
    return (
        num_needed_tokens <= capacity and worker.load.num_active_tokens + num_needed_tokens <= kv_overcommit * capacity
    )
