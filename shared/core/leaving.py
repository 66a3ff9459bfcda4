"""A session has to leave its decode worker, which would lend its KV: it drains, decodes no longer, or has no room."""

from __future__ import annotations

from dataclasses import replace

from shared.core.load import WorkerLoad
from shared.core.routing import RoutingDecision, RoutingParameters, RoutingView, decide, estimate_moved

LEAVES = "leaves a worker that cannot serve it any more"


def route_leaving(
    view: RoutingView,
    decision: RoutingDecision,
    home: WorkerLoad,
    *,
    num_cached_tokens: int,
    num_restorable_tokens: int,
    parameters: RoutingParameters,
) -> RoutingDecision:
    """`decision` is the policy's of `view`, in which the session decodes at its new worker and has no KV but what is
    there. Locally its KV comes along from `home` (`num_cached_tokens` of it, `num_restorable_tokens` with its host
    memory); remotely it is computed again: only if the first token would be late else, and comes sooner so.
    """
    there = replace(view, decode=home, num_cached_tokens=num_cached_tokens, num_restorable_tokens=num_restorable_tokens)
    moved = estimate_moved(there, view.decode, parameters)
    is_late = view.now + moved.total_s > view.deadline
    if is_late and decision.placement == "remote" and decision.chosen.total_s < moved.total_s:
        return decision
    return decide(view.decode, moved, LEAVES, (moved, *decision.options), moves_session=True)
