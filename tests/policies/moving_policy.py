"""Policies for tests of sessions that move: always, or mixed with remote prefills, whatever that costs."""

from __future__ import annotations

from typing import Any

from shared.core.coordinator_config import CoordinatorConfig
from shared.core.policies import SchedulingPolicy
from shared.core.routing import (
    RoutingDecision,
    RoutingParameters,
    RoutingView,
    decide,
    estimate_local,
    estimate_moved,
    estimate_remote,
)


def route_moving(view: RoutingView, parameters: RoutingParameters) -> RoutingDecision:
    """Every round but the first elsewhere than the one before."""
    if view.first_round or not view.movable:
        return decide(view.decode, estimate_local(view, parameters), "stays")
    load = min(view.movable, key=lambda load: (load.num_sessions, load.worker_id))
    return decide(load, estimate_moved(view, load, parameters), "always moves", moves_session=True)


def route_mixed(view: RoutingView, parameters: RoutingParameters) -> RoutingDecision:
    """Moves and remote prefills, by the number of tokens: the same in every run."""
    if view.prefill_workers and view.num_total_tokens % 3 == 0:
        load = view.prefill_workers[view.num_total_tokens % len(view.prefill_workers)]
        return decide(load, estimate_remote(view, load, parameters), "remote for once")
    return route_moving(view, parameters)


MOVING = SchedulingPolicy(name="moving", route=route_moving, moves_sessions=True)
MIXED = SchedulingPolicy(
    name="mixed",
    route=route_mixed,
    moves_sessions=True,
    fluid_roles=True,
    keeps_resident=True,
    stages=True,
    host_tier=True,
)


def configure(policy: SchedulingPolicy, **fields: Any) -> CoordinatorConfig:
    """A coordinator's settings with a policy that has no name there."""
    config = CoordinatorConfig(**fields)
    object.__setattr__(config, "scheduling", policy)
    return config
