"""For operators and the planner: status, explanations, statistics."""

from __future__ import annotations

from typing import Literal

import msgspec

from shared.errors import ErrorCode
from shared.messages.base import Message, Role, Slo, Usage, WindowStats
from shared.messages.worker_events import Heartbeat


class GetStatus(Message, frozen=True, kw_only=True, tag="get_status"):
    pass


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    alive: bool
    last_seen_s: float
    heartbeat: Heartbeat
    wanted_role: Role | None = None  # while it changes its role: to this one


class SessionStatus(msgspec.Struct, frozen=True, kw_only=True):
    tenant: str
    session: str
    state: str
    decode_worker: str | None
    num_rounds: int
    num_tokens: int
    idle_s: float


class ClusterStatus(Message, frozen=True, kw_only=True, tag="cluster_status"):
    policy: str
    model: str
    workers: tuple[WorkerStatus, ...]
    sessions: tuple[SessionStatus, ...]  # the newest 200
    num_sessions: int
    num_rounds_in_flight: int
    counters: dict[str, int]


class ChangeRole(Message, frozen=True, kw_only=True, tag="change_role"):
    """Have a running worker take another role. For operators and the planner, on the admin subject."""

    worker_id: str
    role: Role


class RoleChanged(Message, frozen=True, kw_only=True, tag="role_changed"):
    """The worker has taken the role. `previous` is the one before: the same if it had the role already."""

    worker_id: str
    role: Role
    previous: Role


class ExplainSession(Message, frozen=True, kw_only=True, tag="explain_session"):
    """Why each of a session's newest rounds was prefilled where it was. For operators, on the admin subject."""

    tenant: str
    session: str


class OptionExplained(msgspec.Struct, frozen=True, kw_only=True):
    """One option of a routing decision as it was predicted, in seconds (see shared/core/routing.py)."""

    placement: Literal["local", "remote"]
    worker_id: str
    num_new_tokens: int
    num_moved_tokens: int
    windowed_s: float
    queue_s: float
    transfer_s: float
    prefill_s: float
    on_time: float
    disturbed: float


class RoundExplained(msgspec.Struct, frozen=True, kw_only=True):
    """A routing decision, predicted against measured (None: not known, or not ended)."""

    round: int
    attempt: int
    placement: Literal["local", "remote"]
    worker_id: str
    reason: str
    options: tuple[OptionExplained, ...]
    chosen_index: int
    slo: Slo
    ttft_s: float | None = None
    tpot_s: float | None = None
    usage: Usage | None = None

    @property
    def moves_session(self) -> bool:
        """The session moves, with its KV, to the worker that the prefill runs on: no other local prefill moves KV."""
        if self.usage is not None and self.usage.moved_from:
            return True
        if self.placement == "remote" or self.chosen_index < 0:
            return False
        return self.options[self.chosen_index].num_moved_tokens > 0


class SessionExplained(Message, frozen=True, kw_only=True, tag="session_explained"):
    session: str
    policy: str
    rounds: tuple[RoundExplained, ...]  # the newest 64


class RoundObserved(Message, frozen=True, kw_only=True, tag="round_observed"):
    """Coordinator -> planner, one per ended round. delay_s: idle time before it, None for the first round."""

    tenant: str
    session: str
    round: int
    delay_s: float | None
    ttft_s: float | None
    tpot_s: float | None
    slo: Slo
    usage: Usage | None
    error: ErrorCode | None


class GetStats(Message, frozen=True, kw_only=True, tag="get_stats"):
    pass


class PlannerStats(Message, frozen=True, kw_only=True, tag="planner_stats"):
    """What the planner has collected since it started."""

    uptime_s: float
    num_rounds: int
    num_failed: int
    num_attained: int
    num_local: int
    num_remote: int
    kv_bytes_moved: int
    rounds_per_s: float
    input_tokens: WindowStats
    output_tokens: WindowStats
    delay_s: WindowStats
    ttft_s: WindowStats
    tpot_s: WindowStats
    workers: tuple[Heartbeat, ...]


AdminMessage = (
    GetStatus | ClusterStatus | ChangeRole | RoleChanged
    | ExplainSession | SessionExplained | RoundObserved | GetStats | PlannerStats
)  # fmt: skip
