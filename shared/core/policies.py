"""The scheduling policies by name: routing, binding, queue order, chunk size, retention and what KV is kept where.

A policy is data; `with_options` gives its variants (parameters for tuning, parts switched off for the ablation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import inf
from typing import Any

from shared.core.binding import BindingName
from shared.core.chunking import ChunkParameters
from shared.core.marginal import route_adaptive
from shared.core.reordering import OrderParameters
from shared.core.retention import RetentionName
from shared.core.routing import (
    Policy,
    RoutingParameters,
    route_ampd,
    route_colocated,
    route_local,
    route_remote,
    route_threshold,
)
from shared.errors import AmpdError, ErrorCode


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingPolicy:
    name: str
    route: Policy
    routing: RoutingParameters = field(default_factory=RoutingParameters)
    binding: BindingName = "free_kv"
    order: OrderParameters = field(default_factory=lambda: OrderParameters(order="fcfs"))
    retention: RetentionName = "lru"
    keeps_resident: bool = False  # prefill workers keep the KV of what they prefilled, as long as there is room
    stages: bool = False  # while a tool runs, new KV moves ahead to the prefill worker that holds the session
    host_tier: bool = False  # evicted KV goes to host memory, and comes back from there
    fluid_roles: bool = False  # any worker may prefill for any session
    moves_sessions: bool = False  # a session whose worker cannot serve its next round in time moves, with its KV
    admission: bool = False  # a new session whose first round cannot attain is refused, with a hint when to retry
    window_s: float = 10.0  # of the statistics in heartbeats, which ampd reads
    corrects: bool = False  # predictions follow what is measured

    @property
    def chunk(self) -> ChunkParameters:
        return self.routing.chunk

    @property
    def uses_windows(self) -> bool:
        return self.route is route_ampd and not self.routing.live_terms


_SLACK = ChunkParameters(chunk="slack", keeps_on_time=True, limits_batch=True)

POLICIES: dict[str, SchedulingPolicy] = {
    policy.name: policy
    for policy in (
        SchedulingPolicy(name="colocated", route=route_colocated, binding="least_loaded"),
        SchedulingPolicy(
            name="continuum",
            route=route_colocated,
            binding="least_loaded",
            order=OrderParameters(order="program_fcfs"),
            retention="ttl",
        ),
        SchedulingPolicy(
            name="remote", route=route_remote, routing=RoutingParameters(reads_history=False), keeps_resident=True
        ),
        SchedulingPolicy(name="local", route=route_local),
        SchedulingPolicy(
            name="threshold", route=route_threshold, routing=RoutingParameters(reads_history=False), keeps_resident=True
        ),
        SchedulingPolicy(name="ampd", route=route_ampd, order=OrderParameters(order="window")),
        SchedulingPolicy(
            name="adaptive",
            route=route_adaptive,
            routing=RoutingParameters(chunk=_SLACK, by_deadline=True),
            binding="least_active",
            order=OrderParameters(order="moore_hodgson"),
            retention="expected_return",
            keeps_resident=True,
            stages=True,
            host_tier=True,
            fluid_roles=True,
            moves_sessions=True,
            admission=True,
            corrects=True,
        ),
    )
}

# The parts of `adaptive`, each with what stands in its place when it is switched off.
PARTS: dict[str, Mapping[str, Any]] = {
    "marginal_routing": {"route": route_threshold},
    "delay_price": {"routing.delay_price": 0.0},
    "moore_hodgson": {"order.order": "fcfs", "routing.by_deadline": False},
    "ageing": {"order.ageing": inf},
    "slack_chunks": {"routing.chunk.chunk": "fixed"},
    "calm_steps": {"routing.chunk.calm_itl_share": 1.0},
    "on_time_steps": {"routing.chunk.keeps_on_time": False},
    "batch_limit": {"routing.chunk.limits_batch": False},
    "residency": {"keeps_resident": False, "stages": False},
    "staging": {"stages": False},
    "host_tier": {"host_tier": False},
    "expected_return": {"retention": "lru"},
    "fluid_roles": {"fluid_roles": False},
    "moves": {"moves_sessions": False},
    "admission": {"admission": False},
    "correction": {"corrects": False},
}


def find_policy(name: str) -> SchedulingPolicy:
    """Raises AmpdError INVALID_REQUEST naming the policies there are."""
    if name not in POLICIES:
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"unknown policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]


def switch_off(policy: SchedulingPolicy, part: str) -> SchedulingPolicy:
    """The policy without one of its PARTS. Raises AmpdError INVALID_REQUEST for an unknown part."""
    if part not in PARTS:
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"unknown part {part!r}: choose one of {', '.join(PARTS)}")
    return with_options(policy, PARTS[part])


def with_options(policy: SchedulingPolicy, options: Mapping[str, Any]) -> SchedulingPolicy:
    """Replace fields by dotted path: {"routing.alpha": 0.3, "routing.chunk.chunk_tokens": 1024, "order.window": 5}.

    Values given as text are read as the field's own type. Raises AmpdError INVALID_REQUEST naming the option at fault.
    """
    for path, value in options.items():
        policy = _replace(policy, path.split("."), value, path)
    return policy


def _replace(node: Any, path: list[str], value: Any, whole: str) -> Any:
    names = [one.name for one in fields(node)]
    if path[0] not in names:
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"unknown policy option {whole!r}: {path[0]} is none of {names}")
    old = getattr(node, path[0])
    new = _replace(old, path[1:], value, whole) if len(path) > 1 else _coerce(old, value, whole)
    try:
        return replace(node, **{path[0]: new})
    except ValueError as error:
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"policy option {whole}: {error}") from error


def _coerce(old: Any, value: Any, whole: str) -> Any:
    if not isinstance(value, str) or isinstance(old, str):
        return value
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
        if isinstance(old, int | float):
            return type(old)(value)
    except (ValueError, KeyError):
        raise AmpdError(
            ErrorCode.INVALID_REQUEST, f"policy option {whole}={value}: a {type(old).__name__} is needed"
        ) from None
    raise AmpdError(ErrorCode.INVALID_REQUEST, f"policy option {whole} cannot be given as text")
