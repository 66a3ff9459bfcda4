"""A simulated worker: continuous batching over KV memory.

    segments          runs the steps, several equal ones at a time
    decode_batch      the rounds that decode, and their gaps
    prefill_queue     the prefills that wait or have begun
    prefill_planner   which of them the next step computes
    remote_prefills   those of rounds that decode elsewhere, before they are in the queue
    history_fetcher   KV that comes from another worker or from host memory
    preemption        who loses device memory when nobody idle has any

Order, chunk size and eviction are decided by the functions of shared/core that the live worker calls.
"""

from __future__ import annotations

from planner.simulator.decode_batch import DecodeBatch
from planner.simulator.event_heap import EventHeap
from planner.simulator.history_fetcher import HistoryFetcher
from planner.simulator.kv_memory import KvMemory, SimKv
from planner.simulator.links import Links
from planner.simulator.preemption import Preemption
from planner.simulator.prefill_planner import PrefillPlanner
from planner.simulator.prefill_queue import PrefillQueue, SimPrefill, make_prefill
from planner.simulator.remote_prefills import RemotePrefills
from planner.simulator.rolling_mean import RollingMean
from planner.simulator.rounds import SimRound
from planner.simulator.segments import Segments
from planner.simulator.worker_reports import WorkerReports
from shared.core.load import WorkerLoad
from shared.core.policies import SchedulingPolicy
from shared.core.step_costs import StepCosts

WAIT_S = 0.05


class SimWorker:
    def __init__(
        self,
        reports: WorkerReports,
        events: EventHeap,
        links: Links,
        index: int,
        load: WorkerLoad,
        costs: StepCosts,
        policy: SchedulingPolicy,
        *,
        host_kv_tokens: int,
        itl_slo_s: float,
        max_batch: int,
        pauses: bool,
    ) -> None:
        """`costs` are the true ones, `load` what the scheduler believes. `pauses`: a prefill's steps decode nothing."""
        self.index = index
        self.load = load
        self.node = load.node
        self.costs = costs
        self.memory = KvMemory(costs.num_kv_tokens, host_kv_tokens, policy, costs, load.worker_id)
        self.alive = True
        self.batch = DecodeBatch(policy, costs, itl_slo_s, max_batch)
        self.queue = PrefillQueue()
        self.preemption = Preemption(self.batch, self.queue, self.memory, load)
        self.ttft = RollingMean(policy.window_s)
        self._planner = PrefillPlanner(
            self.queue,
            self.batch,
            self.memory,
            HistoryFetcher(self, events, links),
            self.preemption,
            costs,
            policy,
            itl_slo_s=itl_slo_s,
            max_batch=max_batch,
            pauses=pauses,
        )
        self.remote = RemotePrefills(self, self.queue, self._planner, policy, events, links)
        self.segments = Segments(self, self._planner, events, policy, pauses=pauses)
        self._reports = reports
        self._events = events
        self._policy = policy
        self._is_waiting = False

    # ------------------------------------------------------------------------------- arrivals

    def add_local(self, round_: SimRound, now: float) -> None:
        """A round's prefill here, where it will decode."""
        kv = self.memory.hold(round_.session)
        kv.is_resident = False
        self.batch.rounds[round_] = kv
        self.memory.shrink(kv, min(kv.num_tokens, round_.num_prompt + round_.num_produced - 1))
        self.queue.waiting.append(make_prefill(round_, kv, is_local=True, now=now))
        self.segments.look_again(now)

    def add_remote(self, round_: SimRound, now: float) -> None:
        """Prefill a round that decodes elsewhere; its history is read when it is nearly its turn."""
        kv = self.memory.hold(round_.session)
        if not self._policy.keeps_resident:
            self.memory.shrink(kv, 0)
        self.memory.shrink(kv, min(kv.num_tokens, round_.num_prompt + round_.num_produced - 1))
        kv.is_resident = True
        self.remote.add(make_prefill(round_, kv, is_local=False, now=now), now)

    def expect_remote(self, round_: SimRound) -> None:
        """A round will decode here, and is prefilled elsewhere: its KV stays."""
        kv = self.batch.rounds[round_] = self.memory.hold(round_.session)
        kv.is_resident = False

    def stop_expecting(self, round_: SimRound, now: float) -> None:
        """The prefill elsewhere has come to nothing; the round is placed again."""
        kv = self.batch.rounds.pop(round_, None)
        if kv is not None:
            self.memory.release(kv, now)

    def count_readable(self, round_: SimRound) -> int:
        """KV tokens that the round's prefill worker can read here."""
        kv = self.batch.rounds.get(round_)
        return kv.num_tokens if kv is not None else 0

    def take_kv(self, round_: SimRound, now: float) -> bool:
        """Room for what a remote prefill sends; False when there is none now."""
        kv = self.batch.rounds[round_]
        num_missing = round_.num_prompt + max(0, round_.num_produced - 1) - kv.num_tokens
        if num_missing > 0:
            if not self.memory.make_room(num_missing, now):
                return False
            self.memory.grow(kv, num_missing)
        if kv.num_host_tokens:
            self.memory.num_host_used -= kv.num_host_tokens
            kv.num_host_tokens = 0
        return True

    def join(self, round_: SimRound, now: float) -> None:
        """A round whose KV has arrived decodes from the next step on."""
        self.batch.joining.append(round_)
        self.segments.look_again(now)

    # ------------------------------------------------------------------------ waiting for room

    def wait_for_room(self, now: float) -> None:
        """Everything here waits: for KV on its way, or for room that others hold. Look again soon."""
        if not self._is_waiting:
            self._is_waiting = True
            self._events.at(now + WAIT_S, self._wake, None)

    def _wake(self, _: None, now: float) -> None:
        self._is_waiting = False
        self.remote.stage_next(now)
        self.segments.look_again(now)
        if self._is_waiting and self.segments.running is None:
            self._yield_room(now)

    def _yield_room(self, now: float) -> None:
        """Nothing runs, and nothing has for a while: workers may wait for each other's room. The youngest round that is
        prefilled here for another worker goes there; failing that, KV of sessions that have moved away is given up."""
        waiting, admitted = self.queue.waiting, self.queue.admitted
        on_its_way = any(one.is_fetching for one in waiting) or any(one not in waiting for one in admitted)
        if not self.alive or on_its_way:
            return
        remote = [one.round for one in (*self.remote.unstaged, *waiting) if not one.is_local]
        if remote:
            youngest = max(remote, key=lambda one: (one.sent_at, one.session.index))
            self.drop(youngest, now)
            self._reports.prefill_refused(youngest, self, now)
            return
        for session in list(self.memory.entries):
            if session.running is not None and session.running.moved_from is self:
                self.memory.forget(session)

    # ------------------------------------------------------------------------- rounds and ends

    def end_prefill(self, prefill: SimPrefill, now: float) -> None:
        """It is computed to its end."""
        round_ = prefill.round
        self.queue.end(prefill)
        if self._policy.uses_windows:
            self.ttft.add(now, now - round_.sent_at)
        if prefill.is_local:
            self._reports.prefill_ended(round_, self, now)
            round_.note_token(now)
            if round_.num_produced >= round_.planned.output_tokens:
                self.end_round(round_, now)
            elif self.batch.is_limited or self.batch.is_full:
                self.batch.joining.append(round_)
            else:
                self.batch.begin(round_, now)
            return
        self.remote.end(prefill)
        kv = prefill.kv
        self._reports.prefill_ended(round_, self, now)
        if self._policy.keeps_resident:
            round_.session.resident[self.load.worker_id] = kv.num_tokens
        self._reports.hand_over(round_, self, kv, now)

    def refuse(self, prefill: SimPrefill, now: float) -> None:
        """It does not fit here at all: the round is prefilled where it decodes."""
        self.memory.release(prefill.kv, now)
        self._reports.prefill_refused(prefill.round, self, now)

    def release_remote(self, kv: SimKv, now: float) -> None:
        """The decode worker has the KV of a remote prefill: keep it as resident, or forget it."""
        if not self._policy.keeps_resident and kv.busy == 1:
            self.memory.shrink(kv, 0)
        self.memory.release(kv, now)
        self.remote.stage_next(now)
        self.segments.look_again(now)

    def let_go(self, kv: SimKv, now: float) -> None:
        """A session that has moved away needs its KV here no longer."""
        self.memory.release(kv, now)
        if self.memory.holds(kv) and not kv.busy and kv.key.decode is not self:
            self.memory.forget(kv.key)
        self.segments.look_again(now)

    def end_round(self, round_: SimRound, now: float) -> None:
        """It has its last token."""
        if round_.entry:
            self.batch.stop(round_)
        kv = self.batch.rounds.pop(round_)
        round_.finished_at = now
        self.memory.release(kv, now)
        self._reports.round_ended(round_, now)

    # --------------------------------------------------------------------------------- failure

    def drop(self, round_: SimRound, now: float) -> None:
        """The round starts again elsewhere: its remote prefill here goes, wherever it has got to."""
        for prefill in {*self.remote.unstaged, *self.queue.waiting, *self.queue.admitted}:
            if prefill.round is not round_:
                continue
            self.remote.drop(prefill)
            self.segments.drop(prefill)
            self.memory.release(prefill.kv, now)

    def fail(self, now: float) -> list[SimRound]:
        """The worker dies; returns the rounds that it decoded, computed or waited for."""
        self.segments.stop(now)
        self.alive = False
        prefills = (*self.queue.waiting, *self.remote.unstaged, *self.queue.admitted)
        rounds = [*self.batch.rounds, *(one.round for one in prefills)]
        self.batch.clear()
        for session in list(self.memory.entries):
            self.memory.forget(session)
        self.queue.clear()
        self._planner.clear()
        self.remote.clear()
        return list(dict.fromkeys(rounds))
