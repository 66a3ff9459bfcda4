"""See run_service.py."""

from __future__ import annotations

from shared.core.policies import SchedulingPolicy
from shared.core.routing import (
    RoutingDecision,
    RoutingParameters,
    RoutingView,
    decide,
    estimate_local,
    estimate_remote,
)


def route_remote_later(view: RoutingView, parameters: RoutingParameters) -> RoutingDecision:
    if view.first_round or not view.prefill_workers:
        return decide(view.decode, estimate_local(view, parameters), "the first round")
    load = view.prefill_workers[0]
    return decide(load, estimate_remote(view, load, parameters), "a later round")


REMOTE_LATER = SchedulingPolicy(name="remote-later", route=route_remote_later)
