"""A simulated run: sessions send their rounds, workers compute them, and the parts of a coordinator lie between.

    event_heap   the clock
    bindings     which session decodes where
    round_book   what has become of the rounds
    placement    where each is prefilled, with the functions of shared/core
    transfers    KV that goes from prefill to decode workers, and back while tools run
    failures     workers that die
    role_changes workers that take another role
    worker       batches, chunks and memory

Everything is deterministic: the same input gives the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loadgen.plan import PlannedSession
from planner.simulator.bindings import Bindings
from planner.simulator.cluster import Cluster, build_workers
from planner.simulator.event_heap import EventHeap
from planner.simulator.failures import Failure, Failures
from planner.simulator.kv_memory import SimKv
from planner.simulator.links import Links
from planner.simulator.placement import Placement
from planner.simulator.role_changes import RoleChange, RoleChanges
from planner.simulator.round_book import Counters, RoundBook
from planner.simulator.rounds import SimRound, SimSession
from planner.simulator.transfers import HandOvers, Staging
from planner.simulator.worker import SimWorker
from shared.core.patience import ADMISSION_FACTOR
from shared.core.policies import SchedulingPolicy
from shared.messages import Role, Slo, WindowStats

HEARTBEAT_S = 0.5


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
        role_changes: Sequence[RoleChange] = (),
        admission_factor: float = ADMISSION_FACTOR,
        gap_factor: float = 1.0,
        until_s: float | None = None,
        max_missed: int | None = None,
        events: EventHeap | None = None,
    ) -> None:
        """`gap_factor`: tool times are mispredicted by it. `until_s`: rounds unfinished then count as failed.
        `max_missed`: stop as soon as more rounds have missed an objective (a search needs no more to know). `events`:
        for tests, one that watches what is planned."""
        self.policy = policy
        self.slo = slo
        self.events = events if events is not None else EventHeap()
        self.links = Links(bandwidth_scale=cluster.bandwidth_scale)
        self.workers = build_workers(self, self.events, self.links, cluster, policy, slo)
        self.counters = Counters()
        self._sessions = [SimSession(planned) for planned in sessions]
        self._planned_failures = failures
        self._gap_factor = gap_factor
        self._until_s = until_s
        self._heartbeat_s = HEARTBEAT_S * cluster.control_scale
        self._bindings = Bindings(self.workers, policy)
        self._book = RoundBook(self._bindings, slo, len(self._sessions), max_missed)
        self._placement = Placement(
            self.events,
            self._bindings,
            self._book,
            self.counters,
            policy,
            slo,
            admission_factor,
            cluster.control_scale,
        )
        self._failures = Failures(
            self.events, self.workers, self._sessions, self._bindings, self._placement, self.counters
        )
        self._role_changes = RoleChanges(self.events, self.workers, self._bindings, self.counters)
        for change in role_changes:
            self._role_changes.plan(change)
        self._hand_overs = HandOvers(self.events, self.links, self._placement)
        self._staging = Staging(self.events, self.links, self._bindings, self.counters, gap_factor)

    def run(self, on_progress: Callable[[int], None] | None = None) -> Result:
        """`on_progress` is told now and then how many rounds have ended."""
        events, book = self.events, self._book
        for session in self._sessions:
            events.at(session.arrival, self._open, session)
        for failure in self._planned_failures:
            events.at(failure.at, self._failures.fail, failure)
        if self.policy.uses_windows:
            events.at(0.0, self._heartbeat, None)
        self.counters.events = events.run(
            book.goes_on,
            self._until_s if self._until_s is not None else float("inf"),
            None if on_progress is None else lambda: on_progress(len(book.rounds)),
        )
        return Result(
            rounds=book.rounds,
            num_offered=sum(len(session.planned.rounds) for session in self._sessions),
            end_s=events.now,
            was_stopped=book.missed_too_many,
            kv_bytes_moved=self.links.num_bytes,
            num_evicted_tokens=sum(worker.memory.num_evicted_tokens for worker in self.workers),
            num_preemptions=sum(worker.preemption.num_preemptions for worker in self.workers),
            unfinished=[session.running for session in self._sessions if session.running is not None],
            counters=self.counters,
        )

    def change_role(self, worker: int | str, role: Role, at_s: float) -> None:
        """Have a worker, by its index or id, take a role at `at_s`. Raises AmpdError INVALID_REQUEST."""
        self._role_changes.plan(RoleChange(worker, role, at_s))

    def every(self, interval_s: float, look: Callable[[float], None]) -> None:
        """Call `look` with the time, again and again until the simulation ends."""

        def look_again(_: None, now: float) -> None:
            look(now)
            self.events.at(now + interval_s, look_again, None)

        self.events.at(interval_s, look_again, None)

    @property
    def ended_rounds(self) -> Sequence[SimRound]:
        """Those that have ended or failed so far, in that order."""
        return self._book.rounds

    def _heartbeat(self, _: None, now: float) -> None:
        for worker in self.workers:
            mean, count = worker.ttft.mean(now)
            worker.load.ttft = WindowStats(count=count, mean=mean)
            mean, count = worker.batch.itl.mean(now)
            worker.load.itl = WindowStats(count=count, mean=mean)
        self.events.at(now + self._heartbeat_s, self._heartbeat, None)

    # -------------------------------------------------------------------------------- sessions

    def _open(self, session: SimSession, now: float) -> None:
        if self._bindings.bind(session, session.planned.rounds[0].input_tokens, now) is None:
            self._give_up(session, 0, "no_worker", now)
            return
        self._send(session, 0, now)

    def _send(self, session: SimSession, index: int, now: float) -> None:
        """The client sends a round."""
        planned = session.planned.rounds[index]
        assert session.decode is not None
        if index:
            session.gaps.add((now - session.ended_at) * self._gap_factor)
        round_ = SimRound(session, index, planned, now, now + self.slo.ttft_s, session.decode)
        session.running = round_
        round_.num_history = session.num_tokens
        self._bindings.promise(session, session.num_tokens + planned.input_tokens + planned.output_tokens)
        if round_.num_prompt + planned.output_tokens > session.decode.memory.capacity:
            self._book.fail(round_, "context_too_long")
            return
        self._placement.place(round_, now)

    def _send_next(self, argument: tuple[SimSession, int], now: float) -> None:
        session, index = argument
        if session.decode is None or not session.decode.alive:  # one that no longer decodes it leaves when it is placed
            needed = session.num_tokens + session.planned.rounds[index].input_tokens
            self.counters.rebinds += 1
            session.num_promised = 0
            if self._bindings.bind(session, needed, now) is None:
                self._give_up(session, index, "no_worker", now)
                return
        self._send(session, index, now)

    def _give_up(self, session: SimSession, index: int, error: str, now: float) -> None:
        """A round that no worker can take."""
        planned = session.planned.rounds[index]
        self._book.fail(SimRound(session, index, planned, now, now, self.workers[0]), error)

    # -------------------------------------------------------------- what workers report

    def prefill_ended(self, round_: SimRound, worker: SimWorker, now: float) -> None:
        self._placement.note_prefilled(round_, worker, now)

    def prefill_refused(self, round_: SimRound, worker: SimWorker, now: float) -> None:
        self._placement.place_locally(round_, worker, now)

    def hand_over(self, round_: SimRound, source: SimWorker, kv: SimKv, now: float) -> None:
        self._hand_overs.begin(round_, source, kv, now)

    def round_ended(self, round_: SimRound, now: float) -> None:
        """Its session's next round comes when the tool has run; or there is none."""
        session = round_.session
        self._book.end(round_, now)
        if round_.index + 1 < len(session.planned.rounds):
            self._bindings.promise(session, session.num_tokens)
            delay_s = session.planned.rounds[round_.index + 1].delay_s
            self.events.at(now + delay_s, self._send_next, (session, round_.index + 1))
            if self.policy.stages:
                self._staging.stage(session, now)
        else:
            self._book.close(session)
