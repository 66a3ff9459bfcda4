"""What the planner proposes while sessions run, and what it may do about it."""

from __future__ import annotations

from typing import Literal

import msgspec

from shared.messages.base import Message, Role

ReplanMode = Literal["act", "dry-run", "frozen"]


class Replan(Message, frozen=True, kw_only=True, tag="replan"):
    """Ask for the newest proposal; with `mode`, set what becomes of proposals first. For operators, on the admin
    subject. act: roles are changed; dry-run: they are only proposed; frozen: nothing is planned."""

    mode: ReplanMode | None = None


class RoleProposed(msgspec.Struct, frozen=True, kw_only=True):
    """cost_s: of the worker's link, for the KV of sessions that leave it. outcome: what the coordinator answered, None
    where it was not asked."""

    worker_id: str
    role: Role
    cost_s: float
    outcome: str | None = None


class ReplicasWanted(msgspec.Struct, frozen=True, kw_only=True):
    """For an outer autoscaler: workers of this kind that the workload wants, with room to spare."""

    role: Literal["prefill", "both"]
    profile: str
    parallel_degree: int
    running: int
    wanted: int


class ReplanState(Message, frozen=True, kw_only=True, tag="replan_state"):
    """load: the rate over what the workers sustain in the roles that they have; 0 where it is not known. reason: why
    there are changes, or none."""

    mode: ReplanMode
    reason: str
    load: float = 0.0
    sessions_per_s: float = 0.0  # of parts of sessions, as seen in the window
    capacity_sessions_per_s: float = 0.0
    proposed_sessions_per_s: float = 0.0  # capacity with the changes
    changes: tuple[RoleProposed, ...] = ()
    replicas: tuple[ReplicasWanted, ...] = ()
    num_changed: int = 0  # roles, since the planner started


ReplanningMessage = Replan | ReplanState
