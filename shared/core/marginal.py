"""`adaptive`: the placement that maximises the expected number of rounds meeting their objectives.

Counted are this round and those it would disturb. On a queue that serves on-time rounds first (Moore-Hodgson), one
more prefill changes the number of on-time rounds by 1 or 0: it gains one if it fits before its deadline without
pushing a later one past its own. Where others decode, chunks are sized to the batch's ITL slack and make nobody late;
what the batch waits for them tells options apart that are nearly alike (delay_price), and what they cost a batch with
hardly any slack, as slower tokens keep more sequences in it, is a price that can be set (crowd_price). Predictions are
uncertain: a margin counts by the probability that it holds.
"""

from __future__ import annotations

from math import exp

from shared.core.load import WorkerLoad
from shared.core.routing import (
    OptionEstimate,
    RoutingDecision,
    RoutingParameters,
    RoutingView,
    decide,
    estimate_local,
    estimate_moved,
    estimate_remote,
)

NUM_LEAST_LOADED = 2  # prefill workers looked at closely, beside those that have kept KV of the session
NUM_HOLDERS = 2
CROWD_SPREAD = 0.05  # of the ITL objective: how sharply a batch turns crowded
NO_ROOM = 0.3  # a round that does not fit beside those in flight is probably late
MOVE_BELOW = 0.8  # rounds on time: a session moves only when it would probably be late where it is
ON_TIME_IS_ALIKE = 0.02  # rounds: options this close are told apart by what they cost
MAX_DELAY_COST = 0.05  # rounds: what a batch waits tells options apart that are nearly alike


def route_adaptive(view: RoutingView, parameters: RoutingParameters) -> RoutingDecision:
    """Compare the decode worker with the least loaded prefill workers and those that hold the session's KV."""
    has_room = view.decode.has_room(view.num_needed_tokens, view.now)
    local = _judge(view, parameters, view.decode, estimate_local(view, parameters), has_room)
    options, workers, scores = [local], [view.decode], [_score(local, view.decode, view, parameters)]
    for load in shortlist(view):
        option = _judge(view, parameters, load, estimate_remote(view, load, parameters), has_room)
        options.append(option)
        workers.append(load)
        scores.append(_score(option, load, view, parameters))
    best = scores.index(max(scores))
    num_here = len(options)
    if view.movable and _gain(options[best]) < MOVE_BELOW:
        for load in shortlist_movable(view):
            option = _judge(view, parameters, load, estimate_moved(view, load, parameters), has_room=True)
            options.append(option)
            workers.append(load)
            scores.append(_score(option, load, view, parameters))
        best = scores.index(max(scores))
    reason = f"{_gain(options[best]):+.2f} rounds on time"
    return decide(workers[best], options[best], reason, tuple(options), moves_session=best >= num_here)


def shortlist_movable(view: RoutingView) -> list[WorkerLoad]:
    """The least loaded of the workers that have room for the round."""
    ttft_s = view.slo.ttft_s
    measured = [
        (load.num_active_tokens / load.num_kv_tokens + load.backlog_s / ttft_s, index)
        for index, load in enumerate(view.movable)
    ]
    chosen: list[WorkerLoad] = []
    for _, index in sorted(measured):
        load = view.movable[index]
        if load.has_room(view.num_needed_tokens, view.now):
            chosen.append(load)
            if len(chosen) == NUM_LEAST_LOADED:
                break
    return chosen


def shortlist(view: RoutingView) -> list[WorkerLoad]:
    """The few prefill workers worth a close look: one pass over all of them."""
    workers = view.prefill_workers
    if len(workers) <= NUM_LEAST_LOADED + NUM_HOLDERS:
        return list(workers)
    first = second = None
    first_s = second_s = float("inf")
    for load in workers:
        backlog_s = load.backlog_s
        if backlog_s < second_s:
            if backlog_s < first_s:
                first, second, second_s = load, first, first_s
                first_s = backlog_s
            else:
                second, second_s = load, backlog_s
    assert first is not None
    assert second is not None
    chosen = [first, second]
    if view.resident:
        resident = view.resident
        holders = [load for load in workers if load.worker_id in resident and load not in chosen]
        holders.sort(key=lambda load: -resident[load.worker_id])
        chosen += holders[:NUM_HOLDERS]
    return chosen


def _judge(
    view: RoutingView, parameters: RoutingParameters, load: WorkerLoad, estimate: OptionEstimate, has_room: bool
) -> OptionEstimate:
    """Add the probabilities: that this round is on time, and that another no longer is. `has_room`: of KV, where it
    decodes."""
    total_s = estimate.total_s
    margin_s = view.deadline - view.now - total_s
    spread_s = parameters.uncertainty * total_s + 0.002
    on_time = _probability(margin_s / spread_s)
    if not has_room:
        on_time *= NO_ROOM  # it has to wait until others have ended
    _, slack_s = load.wait_before_s(view.deadline, view.now, estimate.stretch)
    disturbed = 0.0
    busy_s = estimate.work_s * estimate.stretch
    if slack_s < busy_s * 4:
        disturbed = on_time * _probability((busy_s - slack_s) / (parameters.uncertainty * busy_s))
    if parameters.crowd_price > 0.0 and load.decoding:
        crowded = (load.decode_step_s(1) / view.slo.itl_s - parameters.crowd_share) / CROWD_SPREAD
        disturbed += parameters.crowd_price * _probability(crowded)
    estimate.on_time, estimate.disturbed = on_time, disturbed
    return estimate


def _score(option: OptionEstimate, load: WorkerLoad, view: RoutingView, parameters: RoutingParameters) -> float:
    """Rounds on time, less a little for what it takes: the time until the first token; the time that each round of the
    batch beside it waits; the worker's time at a price that grows with its backlog, so that what is late anyway goes
    where nobody waits; the detour over a worker that is there to decode for others."""
    ttft_s = view.slo.ttft_s
    cost = ON_TIME_IS_ALIKE * option.total_s / ttft_s
    cost += min(MAX_DELAY_COST, parameters.delay_price * len(load.decoding) * option.work_s / ttft_s)
    cost += parameters.congestion_price * (option.work_s / ttft_s) * (load.wait_s(view.now) / ttft_s)
    if option.placement == "remote" and load.takes_decode:
        cost += parameters.detour_cost
    return _gain(option) - cost


def _gain(option: OptionEstimate) -> float:
    return option.on_time - option.disturbed


def _probability(z: float) -> float:
    """Logistic approximation of the normal distribution function."""
    if z > 6.0:
        return 1.0
    if z < -6.0:
        return 0.0
    return 1.0 / (1.0 + exp(-1.702 * z))
