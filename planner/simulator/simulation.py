"""The event heap, and the coordinator's part: binding, routing, staging, admission, with the functions of shared/core.

Everything is deterministic: events of one time are handled in the order in which they were planned.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadgen.plan import PlannedSession
from planner.simulator.cluster import Cluster, build_workers
from planner.simulator.kv_memory import SimKv
from planner.simulator.links import Links
from planner.simulator.rounds import SimRound, SimSession
from planner.simulator.worker import SimWorker
from shared.core.binding import choose_binding
from shared.core.load import WorkerLoad, transfer_s
from shared.core.patience import ADMISSION_FACTOR, measure_excess_wait_s
from shared.core.policies import SchedulingPolicy
from shared.core.routing import RoutingDecision, RoutingView
from shared.messages import Slo, WindowStats

HEARTBEAT_S = 0.5
LOCAL_CONTROL_S = 0.002  # from the client's request to the decode worker's queue, and a token back
REMOTE_CONTROL_S = 0.004  # one hop more, and the offer
RETRY_S = 0.02
MAX_RETRIES = 100
MIN_STAGED_TOKENS = 64
KV_OVERCOMMIT = 4.0

Handler = Callable[[Any, float], None]


@dataclass(frozen=True, slots=True)
class Failure:
    """The worker at `index` dies at `at` and comes back, empty, after `down_s` (None: never)."""

    index: int
    at: float
    down_s: float | None = None


@dataclass(slots=True)
class Counters:
    local: int = 0
    remote: int = 0
    rejected: int = 0
    refused_prefills: int = 0
    staged: int = 0
    staged_tokens: int = 0
    rebinds: int = 0
    moves: int = 0
    failures: int = 0
    events: int = 0
    decision_s: float = 0.0


@dataclass(slots=True)
class Result:
    """Every offered round, in the order in which they ended (or were given up), and what it took."""

    rounds: list[SimRound]
    num_offered: int
    end_s: float
    was_stopped: bool  # by max_missed: the rest was not simulated
    kv_bytes_moved: int
    num_evicted_tokens: int
    num_preemptions: int
    unfinished: list[SimRound]  # in flight when the simulation was stopped
    counters: Counters = field(default_factory=Counters)


class Simulation:
    def __init__(
        self,
        cluster: Cluster,
        policy: SchedulingPolicy,
        sessions: Sequence[PlannedSession],
        slo: Slo,
        *,
        failures: Sequence[Failure] = (),
        admission_factor: float = ADMISSION_FACTOR,
        gap_factor: float = 1.0,
        until_s: float | None = None,
        max_missed: int | None = None,
    ) -> None:
        """`gap_factor`: tool times are mispredicted by it. `until_s`: rounds unfinished then count as failed.
        `max_missed`: stop as soon as more rounds have missed an objective (a search needs no more to know)."""
        self.policy = policy
        self.slo = slo
        self.links = Links(bandwidth_scale=cluster.bandwidth_scale)
        self.workers = build_workers(self, cluster, policy, slo)
        self.counters = Counters()
        self.now = 0.0
        self._heap: list[tuple[float, int, Handler, Any]] = []
        self._num_planned = 0
        self._by_id = {worker.load.worker_id: worker for worker in self.workers}
        self._rounds: list[SimRound] = []
        self._sessions = [SimSession(planned) for planned in sessions]
        self._num_open = len(self._sessions)
        self._admission_factor = admission_factor
        self._gap_factor = gap_factor
        self._until_s = until_s
        self._num_missed = 0
        self._max_missed = max_missed if max_missed is not None else 1 << 60
        self._failures = failures
        self._refresh_lists()

    # --------------------------------------------------------------------------------- events

    def at(self, time: float, handler: Handler, argument: Any) -> None:
        self._num_planned += 1
        heapq.heappush(self._heap, (time, self._num_planned, handler, argument))

    def run(self, on_progress: Callable[[int], None] | None = None) -> Result:
        for session in self._sessions:
            self.at(session.arrival, self._open, session)
        for failure in self._failures:
            self.at(failure.at, self._fail, failure)
        if self.policy.uses_windows:
            self.at(0.0, self._heartbeat, None)
        heap, pop = self._heap, heapq.heappop
        until_s = self._until_s if self._until_s is not None else float("inf")
        num_events = 0
        while heap and self._num_open and self._num_missed <= self._max_missed:
            now, _, handler, argument = pop(heap)
            if now > until_s:
                break
            self.now = now
            num_events += 1
            handler(argument, now)
            if on_progress is not None and num_events % 20_000 == 0:
                on_progress(len(self._rounds))
        self.counters.events = num_events
        return Result(
            rounds=self._rounds,
            num_offered=sum(len(session.planned.rounds) for session in self._sessions),
            end_s=self.now,
            was_stopped=self._num_missed > self._max_missed,
            kv_bytes_moved=self.links.num_bytes,
            num_evicted_tokens=sum(worker.memory.num_evicted_tokens for worker in self.workers),
            num_preemptions=sum(worker.num_preemptions for worker in self.workers),
            unfinished=[session.running for session in self._sessions if session.running is not None],
            counters=self.counters,
        )

    def _heartbeat(self, _: None, now: float) -> None:
        for worker in self.workers:
            mean, count = worker.ttft.mean(now)
            worker.load.ttft = WindowStats(count=count, mean=mean)
            mean, count = worker.itl.mean(now)
            worker.load.itl = WindowStats(count=count, mean=mean)
        self.at(now + HEARTBEAT_S, self._heartbeat, None)

    def _refresh_lists(self) -> None:
        alive = [worker for worker in self.workers if worker.alive]
        self._decode_loads = [worker.load for worker in alive if worker.load.takes_decode]
        prefill = [worker.load for worker in alive if worker.load.takes_prefill]
        if not self.policy.fluid_roles:
            dedicated = [load for load in prefill if load.role == "prefill"]
            prefill = dedicated
        self._prefill_loads = prefill
        self._others: dict[int, list[WorkerLoad]] = {}
        self._movable: dict[int, list[WorkerLoad]] = {}

    def _prefill_loads_for(self, worker: SimWorker) -> list[WorkerLoad]:
        if not worker.load.takes_prefill:
            return self._prefill_loads
        others = self._others.get(worker.index)
        if others is None:
            others = [load for load in self._prefill_loads if load is not worker.load]
            self._others[worker.index] = others
        return others

    # --------------------------------------------------------------------------------- rounds

    def _open(self, session: SimSession, now: float) -> None:
        if self._bind(session, session.planned.rounds[0].input_tokens, now) is None:
            self._give_up(session, 0, "no_worker", now)
            return
        self._send(session, 0, now)

    def _bind(self, session: SimSession, num_needed: int, now: float) -> SimWorker | None:
        limit = KV_OVERCOMMIT
        fitting = [
            load
            for load in self._decode_loads
            if num_needed <= load.num_kv_tokens and load.num_promised_tokens + num_needed <= limit * load.num_kv_tokens
        ] or [load for load in self._decode_loads if num_needed <= load.num_kv_tokens]
        load = choose_binding(fitting, self.policy.binding, now)
        session.decode = None if load is None else self._by_id[load.worker_id]
        if load is not None:
            load.num_sessions += 1
        return session.decode

    def _send(self, session: SimSession, index: int, now: float) -> None:
        """The client sends a round."""
        planned = session.planned.rounds[index]
        assert session.decode is not None
        if index:
            session.gaps.add((now - session.ended_at) * self._gap_factor)
        round_ = SimRound(session, index, planned, now, now + self.slo.ttft_s, session.decode)
        session.running = round_
        round_.num_history = session.num_tokens
        self._promise(session, session.num_tokens + planned.input_tokens + planned.output_tokens)
        if round_.num_prompt + planned.output_tokens > session.decode.memory.capacity:
            self._fail_round(round_, "context_too_long", now)
            return
        self._place(round_, now)

    def _promise(self, session: SimSession, num_tokens: int) -> None:
        assert session.decode is not None
        session.decode.load.num_promised_tokens += num_tokens - session.num_promised
        session.num_promised = num_tokens

    def _view(self, round_: SimRound, now: float, *, local_only: bool) -> RoutingView:
        session, decode = round_.session, round_.decode
        kv = decode.memory.entries.get(session)
        total = round_.num_prompt + round_.num_produced
        cached = min(kv.num_tokens, total - 1) if kv is not None else 0
        restorable = min(cached + kv.num_host_tokens, total - 1) if kv is not None else 0
        return RoutingView(
            now=now,
            num_cached_tokens=cached,
            num_total_tokens=total,
            first_round=round_.index == 0,
            slo=self.slo,
            decode=decode.load,
            prefill_workers=[] if local_only else self._prefill_loads_for(decode),
            num_restorable_tokens=restorable,
            num_needed_tokens=round_.num_prompt + round_.planned.output_tokens,
            movable=self._movable_from(decode) if self.policy.moves_sessions and not local_only else (),
            resident=session.resident,
            waited_s=now - round_.sent_at,
        )

    def _movable_from(self, worker: SimWorker) -> list[WorkerLoad]:
        others = self._movable.get(worker.index)
        if others is None:
            others = self._movable[worker.index] = [load for load in self._decode_loads if load is not worker.load]
        return others

    def _move(self, round_: SimRound, target: SimWorker) -> None:
        """The session is bound to `target` from now on; its KV is held where it is until it has been fetched."""
        session, source = round_.session, round_.decode
        num_promised = session.num_promised
        self._promise(session, 0)
        source.load.end_round(session.key)
        source.load.num_sessions -= 1
        target.load.num_sessions += 1
        if session in source.memory.entries:
            source.memory.hold(session)
            round_.moved_from = source
        session.decode = round_.decode = target
        self._promise(session, num_promised)
        self.counters.moves += 1

    def _place(self, round_: SimRound, now: float, *, local_only: bool = False) -> None:
        view = self._view(round_, now, local_only=local_only)
        decision = self.policy.route(view, self.policy.routing)
        chosen = decision.chosen
        is_new = round_.index == 0 and round_.attempt == 1
        if self.policy.admission and is_new and self._is_too_late(decision, view):
            self.counters.rejected += 1
            self._fail_round(round_, "overloaded", now)
            return
        round_.decision = decision
        round_.num_cached = view.num_total_tokens - chosen.num_new_tokens
        round_.work_s = chosen.work_s
        round_.placed_at = now
        target = self._by_id[decision.worker_id]
        if decision.moves_session:
            self._move(round_, target)
        round_.decode.load.begin_round(round_.session.key, view.num_needed_tokens)
        target.load.begin_prefill(round_.session.key, chosen.num_new_tokens, chosen.work_s, view.deadline, now)
        if decision.placement == "local":
            self.counters.local += 1
            self.at(now + LOCAL_CONTROL_S, self._start_local, (round_, round_.attempt))
        else:
            self.counters.remote += 1
            self.at(now + LOCAL_CONTROL_S + REMOTE_CONTROL_S, self._start_remote, (round_, round_.attempt, target))

    def _is_too_late(self, decision: RoutingDecision, view: RoutingView) -> bool:
        return measure_excess_wait_s(decision.options, self.slo, view.waited_s, self._admission_factor) > 0.0

    def _start_local(self, argument: tuple[SimRound, int], now: float) -> None:
        round_, attempt = argument
        if attempt != round_.attempt or round_.error:
            return
        round_.decode.add_local(round_, now)

    def _start_remote(self, argument: tuple[SimRound, int, SimWorker], now: float) -> None:
        round_, attempt, target = argument
        if attempt != round_.attempt or round_.error:
            return
        if not target.alive:
            self.restart(round_, target, now)
            return
        round_.decode.expect_remote(round_)
        target.add_remote(round_, now)

    def prefill_ended(self, round_: SimRound, worker: SimWorker, now: float) -> None:
        """A worker's prefill is computed: what the scheduler learns from it."""
        worker.load.end_prefill(round_.session.key, now)
        if self.policy.corrects and round_.decision is not None and round_.started_at >= 0.0 and worker.batch == 0:
            predicted_s = worker.load.costs.prefill_s(round_.num_cached, round_.decision.chosen.num_new_tokens)
            worker.load.observe_prefill(predicted_s, now - round_.started_at)
        if worker is round_.decode:
            self._began_decoding(round_)

    def _began_decoding(self, round_: SimRound) -> None:
        load = round_.decode.load
        load.begin_decoding(round_.session.key, round_.num_prompt + round_.num_produced)

    def hand_over(self, round_: SimRound, source: SimWorker, kv: SimKv, now: float, retries: int = 0) -> None:
        """A remote prefill is done: its KV goes to the decode worker, most of it while it was computed."""
        decode = round_.decode
        held = decode.memory.entries[round_.session]
        num_moved = round_.num_prompt + max(0, round_.num_produced - 1) - held.num_tokens
        if not decode.take_kv(round_, now):
            if retries < MAX_RETRIES:
                self.at(now + RETRY_S, self._retry_hand_over, (round_, round_.attempt, source, kv, retries + 1))
                return
            source.release_remote(kv, now)
            self.prefill_refused(round_, source, now)
            return
        num_bytes = num_moved * source.costs.kv_bytes_per_token
        round_.kv_bytes_written += num_bytes
        done_at = self.links.transfer(source, decode, num_moved, now, now - round_.started_at)
        round_.transfer_s += done_at - now
        self.at(done_at, self._handed_over, (round_, round_.attempt, source, kv))

    def _retry_hand_over(self, argument: tuple[SimRound, int, SimWorker, SimKv, int], now: float) -> None:
        round_, attempt, source, kv, retries = argument
        if self._goes_on(round_, attempt, source, kv, now):
            self.hand_over(round_, source, kv, now, retries)
        else:
            source.release_remote(kv, now)

    def _goes_on(self, round_: SimRound, attempt: int, source: SimWorker, kv: SimKv, now: float) -> bool:
        """Whether the KV that `source` sends is still there and still wanted; if it is gone, the round starts again."""
        if attempt != round_.attempt or round_.error:
            return False
        if not source.memory.holds(kv):
            self.restart(round_, source, now)
            return False
        return True

    def _handed_over(self, argument: tuple[SimRound, int, SimWorker, SimKv], now: float) -> None:
        round_, attempt, source, kv = argument
        goes_on = self._goes_on(round_, attempt, source, kv, now)
        source.release_remote(kv, now)
        if not goes_on:
            return
        if round_.first_token_at < 0.0:
            round_.first_token_at = now
        else:
            round_.gaps.append((1, now - round_.last_token_at))
        round_.last_token_at = now
        round_.num_produced += 1
        self._began_decoding(round_)
        if round_.num_produced >= round_.planned.output_tokens:
            round_.decode._end_round(round_, now)
        else:
            round_.decode.join(round_, now)

    def prefill_refused(self, round_: SimRound, worker: SimWorker, now: float) -> None:
        """A prefill worker cannot take it (no room): it is prefilled where it decodes."""
        self.counters.refused_prefills += 1
        worker.load.end_prefill(round_.session.key, now)
        decode = round_.decode
        kv = decode._decoding.pop(round_, None)
        if kv is not None:
            decode.memory.release(kv, now)
        round_.attempt += 1
        self._place(round_, now, local_only=True)

    def round_ended(self, round_: SimRound, now: float) -> None:
        session = round_.session
        self._rounds.append(round_)
        if round_.ttft_s > self.slo.ttft_s or round_.tpot_s > self.slo.itl_s:
            self._num_missed += 1
        round_.decode.load.end_round(session.key)
        session.running = None
        session.num_tokens = round_.num_prompt + round_.planned.output_tokens
        session.ended_at = now
        if round_.index + 1 < len(session.planned.rounds):
            self._promise(session, session.num_tokens)
            delay_s = session.planned.rounds[round_.index + 1].delay_s
            self.at(now + delay_s, self._send_next, (session, round_.index + 1))
            if self.policy.stages:
                self._stage(session, now)
        else:
            self._close(session)

    def _send_next(self, argument: tuple[SimSession, int], now: float) -> None:
        session, index = argument
        if session.decode is None or not session.decode.alive:
            needed = session.num_tokens + session.planned.rounds[index].input_tokens
            self.counters.rebinds += 1
            session.num_promised = 0
            if self._bind(session, needed, now) is None:
                self._give_up(session, index, "no_worker", now)
                return
        self._send(session, index, now)

    def _close(self, session: SimSession) -> None:
        self._num_open -= 1
        if session.decode is not None:
            self._promise(session, 0)
            session.decode.load.num_sessions -= 1
            session.decode.memory.forget(session)
        for worker_id in list(session.resident):
            kv = self._by_id[worker_id].memory.entries.get(session)
            if kv is not None and not kv.busy:
                self._by_id[worker_id].memory.forget(session)
        session.resident.clear()

    def _fail_round(self, round_: SimRound, error: str, now: float) -> None:
        round_.error = error
        round_.decode.load.end_round(round_.session.key)
        round_.session.running = None
        self._rounds.append(round_)
        self._num_missed += len(round_.session.planned.rounds) - round_.index
        self._close(round_.session)

    def _give_up(self, session: SimSession, index: int, error: str, now: float) -> None:
        """A round that no worker can take."""
        planned = session.planned.rounds[index]
        self._fail_round(SimRound(session, index, planned, now, now, self.workers[0]), error, now)

    # -------------------------------------------------------------------------------- staging

    def _stage(self, session: SimSession, now: float) -> None:
        """While the tool runs, the KV that the holder of the session's prefix lacks moves there."""
        if not session.resident or session.decode is None:
            return
        worker_id = max(session.resident, key=lambda one: (session.resident[one], one))
        holder, decode = self._by_id[worker_id], session.decode
        kv = holder.memory.entries.get(session)
        source = decode.memory.entries.get(session)
        if holder is decode or kv is None or source is None or kv.busy or source.busy:
            return
        num_tokens = source.num_tokens - kv.num_tokens
        if num_tokens < MIN_STAGED_TOKENS or self.links.idle_at(decode, holder) > now:
            return
        if transfer_s(decode.load, holder.load, num_tokens) > session.gaps.mean_s * self._gap_factor:
            return
        if not holder.memory.make_room(num_tokens, now, evict=False):
            return
        kv = holder.memory.hold(session)
        source = decode.memory.hold(session)
        holder.memory.grow(kv, num_tokens)
        done_at = self.links.transfer(decode, holder, num_tokens, now, 0.0)
        self.counters.staged += 1
        self.counters.staged_tokens += num_tokens
        self.at(done_at, self._staged, (session, holder, kv, decode, source))

    def _staged(self, argument: tuple[SimSession, SimWorker, SimKv, SimWorker, SimKv], now: float) -> None:
        session, holder, kv, decode, source = argument
        holder.memory.release(kv, now)
        decode.memory.release(source, now)
        if holder.memory.holds(kv):
            session.resident[holder.load.worker_id] = kv.num_tokens

    # -------------------------------------------------------------------------------- failure

    def _fail(self, failure: Failure, now: float) -> None:
        """A worker dies: its rounds start again elsewhere, with what the client has seen as forced prefix."""
        worker = self.workers[failure.index]
        if not worker.alive:
            return
        self.counters.failures += 1
        rounds = worker.fail(now)
        load = worker.load
        for key in list(load.prefills):
            load.end_prefill(key, now)
        for key in list(load.decoding):
            load.end_decoding(key)
        for key in list(load.active):
            load.end_round(key)
        self._refresh_lists()
        running = {s.running for s in self._sessions if s.running is not None and s.running.decode is worker}
        for round_ in sorted({*rounds, *running}, key=lambda one: (one.sent_at, one.session.index)):
            if round_.finished_at >= 0.0 or round_.error:
                continue
            self.restart(round_, worker, now)
        for session in self._sessions:
            session.resident.pop(load.worker_id, None)
            if session.decode is worker:
                session.decode = None
        load.num_promised_tokens = load.num_sessions = 0
        if failure.down_s is not None:
            self.at(now + failure.down_s, self._recover, worker)

    def restart(self, round_: SimRound, dead: SimWorker, now: float) -> None:
        """`dead` has lost what it had of the round: it is placed again."""
        session = round_.session
        round_.attempt += 1
        if round_.decision is not None:
            target = self._by_id[round_.decision.worker_id]
            target.load.end_prefill(session.key, now)
            if target is not round_.decode:
                target.drop(round_, now)
        if round_.moved_from is not None:
            round_.moved_from.memory.forget(session)
            round_.moved_from = None
        if round_.decode is dead:
            session.num_promised = 0
            self.counters.rebinds += 1
            decode = self._bind(session, round_.num_prompt + round_.num_produced, now)
            if decode is None:
                self._fail_round(round_, "no_worker", now)
                return
            round_.decode = decode
            self._promise(session, round_.num_prompt + round_.planned.output_tokens)
        else:  # its prefill ran there
            kv = round_.decode._decoding.pop(round_, None)
            if kv is not None:
                round_.decode.memory.release(kv, now)
        self._place(round_, now)

    def _recover(self, worker: SimWorker, now: float) -> None:
        worker.alive = True
        self._refresh_lists()
