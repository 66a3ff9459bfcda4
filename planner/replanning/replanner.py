"""When roles change: pressure that lasts, a gain that pays, a budget of changes. Pure: `now` is an argument."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from planner.planning.program import PlanProblem
from planner.replanning.roles import Assessment, assess_roles, measure_capacity
from planner.replanning.running import RunningWorker, count_roles
from shared.messages import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplanParameters:
    """pressed: load, in units of the capacity, from which roles are looked at. What is seen outranks what is computed:
    below `certain` load nothing changes while the share of rounds on time is `on_time` or more, and while it is less
    than `late` the workers count as full. hold_s: how long it must last; doubt_s: how long while neither the load is 1
    nor so many late, long enough for chance to pass. min_gain: relative capacity that a change must bring. settle_s:
    after a change, before the next. max_changes in budget_s."""

    pressed: float = 0.85
    certain: float = 1.15
    on_time: float = 0.92
    late: float = 0.9
    hold_s: float = 20.0
    doubt_s: float = 120.0
    min_gain: float = 0.1
    settle_s: float = 60.0
    max_changes: int = 8
    budget_s: float = 600.0


@dataclass(frozen=True, slots=True)
class ProposedChange:
    """cost_s: of the worker's link, for the KV of the sessions that leave it."""

    worker_id: str
    role: Role
    cost_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """`reason` says why there are changes, or why there are none. assessment: None where the roles suffice."""

    reason: str
    load: float  # rate over capacity, as the roles are
    assessment: Assessment | None = None
    changes: tuple[ProposedChange, ...] = field(default=())


class Replanner:
    """Ask `propose` at every interval; tell `note_changed` what of it was done."""

    def __init__(self, parameters: ReplanParameters = ReplanParameters()) -> None:
        self.parameters = parameters
        self._pressed_since: float | None = None
        self._changed_at: deque[float] = deque(maxlen=parameters.max_changes)

    def propose(
        self, problem: PlanProblem, workers: Sequence[RunningWorker], now: float, attainment: float | None = None
    ) -> Proposal:
        """`attainment`: share of the rounds on time, None where it is not known. The program knows means, and only
        rounds that ended, of which a policy may prefer short ones: in a short window its load is off by a fifth.
        """
        parameters = self.parameters
        counts = count_roles(workers)
        capacity = measure_capacity(problem, counts)
        load = problem.rate / capacity if capacity > 0.0 else float("inf")
        if attainment is not None and attainment < parameters.late and load < 1.0:
            problem, load = replace(problem, rate=capacity), 1.0
        is_served = attainment is not None and attainment >= parameters.on_time and load < parameters.certain
        if load < parameters.pressed or is_served:
            self._pressed_since = None
            return Proposal(reason="the roles suffice", load=load)
        assessment = assess_roles(problem, counts)
        if assessment.proposed < (1.0 + parameters.min_gain) * assessment.now:
            self._pressed_since = None
            return Proposal(reason="no roles would be much better", load=load, assessment=assessment)
        if self._pressed_since is None:
            self._pressed_since = now
        refusal = self._refuse(now, parameters.hold_s if attainment is None or load >= 1.0 else parameters.doubt_s)
        if refusal is not None:
            return Proposal(reason=refusal, load=load, assessment=assessment)
        budget = self._count_budget(now)
        changes = choose_changes(problem, workers, assessment)[:budget]
        reason = f"capacity {assessment.now:.4g} -> {assessment.proposed:.4g} sessions/s at {problem.rate:.4g}"
        if attainment is not None:
            reason += f", {attainment:.0%} of the rounds on time"
        return Proposal(reason=reason, load=load, assessment=assessment, changes=tuple(changes))

    def note_changed(self, num_changes: int, now: float) -> None:
        self._changed_at.extend([now] * num_changes)
        self._pressed_since = None

    def _refuse(self, now: float, hold_s: float) -> str | None:
        parameters = self.parameters
        assert self._pressed_since is not None
        if now - self._pressed_since < hold_s:
            return "waiting whether it lasts"
        if self._changed_at and now - self._changed_at[-1] < parameters.settle_s:
            return "waiting for the last change to settle"
        if self._count_budget(now) <= 0:
            return "the budget of changes is used up"
        return None

    def _count_budget(self, now: float) -> int:
        recent = sum(now - at < self.parameters.budget_s for at in self._changed_at)
        return self.parameters.max_changes - recent


def choose_changes(
    problem: PlanProblem, workers: Sequence[RunningWorker], assessment: Assessment
) -> list[ProposedChange]:
    """Which workers: those that stop decoding have the least KV to hand on. Cheapest first."""
    changes: list[ProposedChange] = []
    links = {(k.gpu_type, k.parallel_degree): k for k in problem.kinds}
    for kind, wanted in assessment.decoding.items():
        alike = [worker for worker in workers if worker.kind == kind]
        num_more = wanted - sum(worker.decodes for worker in alike)
        free = [worker for worker in alike if not worker.pinned]
        decoding = sorted((w for w in free if w.decodes), key=lambda w: (w.num_kv_tokens, w.worker_id))
        others = sorted((w for w in free if not w.decodes), key=lambda w: w.worker_id)
        changes += [ProposedChange(worker.worker_id, "both", 0.0) for worker in others[: max(0, num_more)]]
        costs = links[kind].costs
        for worker in decoding[: max(0, -num_more)]:
            cost_s = worker.num_kv_tokens * costs.kv_bytes_per_token / costs.link_bytes_per_s
            changes.append(ProposedChange(worker.worker_id, "prefill", cost_s))
    return sorted(changes, key=lambda change: (change.cost_s, change.worker_id))
