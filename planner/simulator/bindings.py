"""Which workers there are, and which of them each session is bound to: it decodes there, and is promised memory."""

from __future__ import annotations

from collections.abc import Sequence

from planner.simulator.rounds import SimRound, SimSession
from planner.simulator.worker import SimWorker
from shared.core.binding import choose_binding
from shared.core.load import WorkerLoad
from shared.core.policies import SchedulingPolicy

KV_OVERCOMMIT = 4.0


class Bindings:
    """Invariant: a load's num_sessions and num_promised_tokens are those of the sessions bound to it."""

    def __init__(self, workers: Sequence[SimWorker], policy: SchedulingPolicy) -> None:
        self.by_id = {worker.load.worker_id: worker for worker in workers}
        self._workers = workers
        self._policy = policy
        self.refresh()

    def refresh(self) -> None:
        """A worker has died, come back, or taken another role."""
        alive = [worker for worker in self._workers if worker.alive]
        self._decode_loads = [worker.load for worker in alive if worker.load.takes_decode]
        prefill = [worker.load for worker in alive if worker.load.takes_prefill]
        if not self._policy.fluid_roles:
            prefill = [load for load in prefill if load.role == "prefill"]
        self._prefill_loads = prefill
        self._others: dict[int, list[WorkerLoad]] = {}
        self._movable: dict[int, list[WorkerLoad]] = {}

    def prefill_loads_for(self, worker: SimWorker) -> list[WorkerLoad]:
        """Those that may prefill for rounds that decode on `worker`."""
        if not worker.load.takes_prefill:
            return self._prefill_loads
        others = self._others.get(worker.index)
        if others is None:
            others = [load for load in self._prefill_loads if load is not worker.load]
            self._others[worker.index] = others
        return others

    def movable_from(self, worker: SimWorker) -> list[WorkerLoad]:
        """Those that sessions of `worker` may move to."""
        others = self._movable.get(worker.index)
        if others is None:
            others = self._movable[worker.index] = [load for load in self._decode_loads if load is not worker.load]
        return others

    # -------------------------------------------------------------------------------- sessions

    def bind(self, session: SimSession, num_needed: int, now: float) -> SimWorker | None:
        """Where the session decodes from now on; None when no living worker could hold it."""
        session.decode = self.choose(num_needed, now)
        if session.decode is not None:
            session.decode.load.num_sessions += 1
        return session.decode

    def choose(self, num_needed: int, now: float) -> SimWorker | None:
        """Where a session would be bound now."""
        limit = KV_OVERCOMMIT
        fitting = [
            load
            for load in self._decode_loads
            if num_needed <= load.num_kv_tokens and load.num_promised_tokens + num_needed <= limit * load.num_kv_tokens
        ] or [load for load in self._decode_loads if num_needed <= load.num_kv_tokens]
        load = choose_binding(fitting, self._policy.binding, now)
        return None if load is None else self.by_id[load.worker_id]

    def promise(self, session: SimSession, num_tokens: int) -> None:
        """Instead of what was promised to it before."""
        assert session.decode is not None
        session.decode.load.num_promised_tokens += num_tokens - session.num_promised
        session.num_promised = num_tokens

    def move(self, round_: SimRound, target: SimWorker, *, with_kv: bool = True) -> None:
        """The session is bound to `target` from now on; its KV is held where it is until it has been fetched, or
        forgotten."""
        session, source = round_.session, round_.decode
        num_promised = session.num_promised
        self.promise(session, 0)
        source.load.end_round(session.key)
        source.load.num_sessions -= 1
        target.load.num_sessions += 1
        if not with_kv:
            source.memory.forget(session)
        elif session in source.memory.entries:
            source.memory.hold(session)
            round_.moved_from = source
        session.decode = round_.decode = target
        self.promise(session, num_promised)

    def close(self, session: SimSession) -> None:
        """The session is over: nothing is kept for it."""
        if session.decode is not None:
            self.promise(session, 0)
            session.decode.load.num_sessions -= 1
            session.decode.memory.forget(session)
        for worker_id in list(session.resident):
            kv = self.by_id[worker_id].memory.entries.get(session)
            if kv is not None and not kv.busy:
                self.by_id[worker_id].memory.forget(session)
        session.resident.clear()
