"""Re-planning on the bus: hears the cluster, proposes at every interval, and has the coordinator change roles.

Serving does not depend on it: killed at any moment it leaves every worker as it is, and a new one goes on from what it
hears. It asks for one change after the other, each with a bounded wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from planner.planning.program import PlanProblem
from planner.planning.solve import SolverError
from planner.replanning.hints import ScalingHint, hint_replicas
from planner.replanning.live import LiveCluster
from planner.replanning.observed import WINDOW_S
from planner.replanning.replanner import Proposal, ProposedChange, Replanner, ReplanParameters
from shared import subjects
from shared.bus import Bus
from shared.errors import AmpdError
from shared.log import get_logger
from shared.messages import (
    ChangeRole,
    Heartbeat,
    ReplanMode,
    ReplanState,
    ReplicasWanted,
    Role,
    RoleProposed,
    RoundObserved,
    decode,
    encode,
    raise_if_error,
)

ANSWER_TIMEOUT_S = 15.0  # of the coordinator, for one change
PINNED_S = 3_600.0  # a worker whose role somebody else has changed is left alone for so long

log = get_logger(__name__)


class Controller:
    """`clock`: monotonic seconds. Solving runs in a thread: messages are heard meanwhile."""

    def __init__(
        self,
        bus: Bus,
        *,
        mode: ReplanMode,
        clock: Callable[[], float],
        profile_name: str | None = None,
        parameters: ReplanParameters | None = None,
        window_s: float = WINDOW_S,
    ) -> None:
        self.mode: ReplanMode = mode
        self.state = ReplanState(mode=mode, reason="nothing has been proposed yet")
        self.num_changed = 0
        self._bus = bus
        self._clock = clock
        self._cluster = LiveCluster(profile_name, window_s)
        self._replanner = Replanner(parameters or ReplanParameters())
        self._roles: dict[str, Role] = {}  # as last heard or asked for
        self._pinned_until: dict[str, float] = {}

    def on_heartbeat(self, beat: Heartbeat) -> None:
        now = self._clock()
        known = self._roles.get(beat.worker_id)
        if known is not None and known != beat.role:
            log.info("role_changed_by_others", worker_id=beat.worker_id, role=beat.role, pinned_s=PINNED_S)
            self._pinned_until[beat.worker_id] = now + PINNED_S
        self._roles[beat.worker_id] = beat.role
        self._cluster.on_heartbeat(beat, now)

    def on_round(self, observed: RoundObserved) -> None:
        self._cluster.on_round(observed, self._clock())

    def set_mode(self, mode: ReplanMode) -> None:
        log.info("replan_mode", mode=mode, previous=self.mode)
        self.mode = mode
        self.state = ReplanState(mode=mode, reason="the mode was just set", num_changed=self.num_changed)

    async def step(self) -> ReplanState:
        """Propose once, act if the mode says so, publish what came of it."""
        now = self._clock()
        self._forget(now)
        if self.mode == "frozen":
            self.state = ReplanState(mode=self.mode, reason="frozen", num_changed=self.num_changed)
            return self.state
        described = self._cluster.describe(now)
        if isinstance(described, str):
            self.state = ReplanState(mode=self.mode, reason=described, num_changed=self.num_changed)
            return self.state
        problem, running = described
        workers = [replace(worker, pinned=worker.worker_id in self._pinned_until) for worker in running]
        attainment = self._cluster.attainment(now)
        try:
            proposal = await asyncio.to_thread(self._replanner.propose, problem, workers, now, attainment)
            hints = await asyncio.to_thread(hint_replicas, problem, workers)
        except (AmpdError, SolverError) as error:  # costs this interval, not the service
            log.error("not replanned", error=str(error))
            self.state = ReplanState(mode=self.mode, reason=f"no plan: {error}", num_changed=self.num_changed)
            return self.state
        changes = [await self._carry_out(change) for change in proposal.changes]
        num_done = sum(change.outcome == "done" for change in changes)
        if num_done or (changes and self.mode == "dry-run"):
            self._replanner.note_changed(num_done, self._clock())
        self.num_changed += num_done
        self.state = self._describe(problem, proposal, changes, hints)
        await self._publish()
        return self.state

    def _describe(
        self, problem: PlanProblem, proposal: Proposal, changes: list[RoleProposed], hints: list[ScalingHint]
    ) -> ReplanState:
        assessment = proposal.assessment
        capacity = problem.rate / proposal.load if 0.0 < proposal.load < float("inf") else 0.0
        return ReplanState(
            mode=self.mode,
            reason=proposal.reason,
            load=proposal.load if proposal.load < float("inf") else 0.0,
            sessions_per_s=problem.rate,
            capacity_sessions_per_s=capacity,
            proposed_sessions_per_s=assessment.proposed if assessment is not None else capacity,
            changes=tuple(changes),
            replicas=tuple(
                ReplicasWanted(
                    role=hint.role,
                    profile=hint.gpu_type,
                    parallel_degree=hint.parallel_degree,
                    running=hint.running,
                    wanted=hint.wanted,
                )
                for hint in hints
            ),
            num_changed=self.num_changed,
        )

    async def _carry_out(self, change: ProposedChange) -> RoleProposed:
        """Ask the coordinator, in mode act. What it refuses is logged, and proposed again if it is still wanted."""
        outcome: str | None = None
        if self.mode == "act":
            request = ChangeRole(worker_id=change.worker_id, role=change.role)
            previous = self._roles.get(change.worker_id)
            self._roles[change.worker_id] = change.role  # its heartbeat may come before the answer
            try:
                reply = await self._bus.request(subjects.ROLE, encode(request), timeout_s=ANSWER_TIMEOUT_S)
                raise_if_error(decode(reply))
                outcome = "done"
            except AmpdError as error:
                outcome = error.message
                if previous is not None:
                    self._roles[change.worker_id] = previous
        log.info(
            "role_proposed", mode=self.mode, worker_id=change.worker_id, role=change.role, cost_s=change.cost_s,
            outcome=outcome,
        )  # fmt: skip
        return RoleProposed(worker_id=change.worker_id, role=change.role, cost_s=change.cost_s, outcome=outcome)

    async def _publish(self) -> None:
        log.info(
            "replanned", mode=self.mode, reason=self.state.reason, load=round(self.state.load, 3),
            capacity_sessions_per_s=self.state.capacity_sessions_per_s,
            proposed_sessions_per_s=self.state.proposed_sessions_per_s, num_changes=len(self.state.changes),
        )  # fmt: skip
        try:
            await self._bus.publish(subjects.PLANNER_PROPOSAL, encode(self.state))
        except AmpdError as error:
            log.warning("proposal not published", error=error.message)

    def _forget(self, now: float) -> None:
        self._pinned_until = {name: until for name, until in self._pinned_until.items() if now < until}
        living = {beat.worker_id for beat in self._cluster.list_beats(now)}
        self._roles = {name: role for name, role in self._roles.items() if name in living}
