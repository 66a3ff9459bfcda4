"""Where a prefill runs: policies as pure functions of one view.

`ampd` is the three-step rule of AMPD (arXiv 2602.14516); where the paper leaves something open, the docstring says
what we chose. `adaptive` is in marginal.py. The coordinator and the simulator build the same `RoutingView` and call
the same functions; policies.py names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from shared.core.chunk_prediction import predict_mixed_s
from shared.core.chunking import ChunkParameters
from shared.core.decoding_rounds import DecodingRounds
from shared.core.load import WorkerLoad, transfer_s
from shared.messages import Slo

Placement = Literal["local", "remote"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingParameters:
    """alpha, beta: shares of the TTFT and ITL objectives up to which a worker counts as having slack (ampd).

    live_terms: ampd reads predictions that count what is already routed, instead of the lagging windows.
    local_tokens, local_ratio: `threshold` prefills locally below both (Dynamo 1.6.1: 2,048 tokens and 0.7).
    reads_history: a prefill worker pulls the history's KV that it lacks; else it computes the tokens again.
    """

    alpha: float = 0.8
    beta: float = 0.8
    live_terms: bool = False
    local_tokens: int = 2_048
    local_ratio: float = 0.7
    reads_history: bool = True
    chunk: ChunkParameters = field(default_factory=ChunkParameters)
    by_deadline: bool = False  # queues are served on-time rounds first (moore_hodgson), else first come first served
    uncertainty: float = 0.15  # adaptive: standard deviation of a prediction, relative
    congestion_price: float = 1.0  # adaptive: rounds, for work and backlog of one TTFT objective each
    delay_price: float = 0.02  # adaptive: rounds, for each round of the batch that loses one TTFT objective
    crowd_price: float = 0.0  # adaptive: rounds, for a prefill beside a batch that leaves hardly any slack
    crowd_share: float = 0.75  # adaptive: of the ITL objective, the decode step from which a batch is crowded
    detour_cost: float = 0.02  # adaptive: rounds that a remote prefill must be better by, where others decode


@dataclass(slots=True, kw_only=True)
class RoutingView:
    """Everything a policy may look at for one prefill.

    `num_cached_tokens` of the conversation have KV on the decode worker, `num_restorable_tokens` (>= cached) with its
    host memory; `num_total_tokens` is the conversation with this round's input; `resident` says what prefill workers
    have kept of it.
    """

    now: float
    num_cached_tokens: int
    num_total_tokens: int
    first_round: bool
    slo: Slo
    decode: WorkerLoad
    prefill_workers: Sequence[WorkerLoad]  # alive, able to exchange KV with `decode`, not `decode` itself
    movable: Sequence[WorkerLoad] = ()  # other workers that the session may move to, with its KV
    num_needed_tokens: int = 0  # KV that the round needs until its end
    num_restorable_tokens: int = 0
    resident: Mapping[str, int] = field(default_factory=dict)
    waited_s: float = 0.0  # since the client's round arrived
    num_new_tokens: int = field(init=False)  # to be computed when the prefill runs locally
    deadline: float = field(init=False)  # of the first token

    def __post_init__(self) -> None:
        self.num_new_tokens = self.num_total_tokens - max(self.num_cached_tokens, self.num_restorable_tokens)
        self.deadline = self.now - self.waited_s + self.slo.ttft_s


class OptionEstimate(msgspec.Struct, kw_only=True):
    """What a policy expects of one option, in seconds: the explanation of a decision. Nobody changes it after that."""

    placement: Placement
    worker_id: str
    num_new_tokens: int  # computed there
    num_moved_tokens: int  # KV over the network: history there, increment back
    windowed_s: float  # its windowed TTFT (remote) or ITL (local), as ampd reads it
    queue_s: float
    transfer_s: float  # not hidden behind the queue
    prefill_s: float
    work_s: float  # what it costs the worker
    stretch: float = 1.0  # how much longer its queue takes beside its decodes
    on_time: float = 1.0  # probability that the round's TTFT is met
    disturbed: float = 0.0  # expected number of other rounds that it makes miss theirs

    @property
    def total_s(self) -> float:
        return self.queue_s + self.transfer_s + self.prefill_s


class RoutingDecision(msgspec.Struct, frozen=True, kw_only=True):
    placement: Placement
    worker_id: str  # where the prefill runs
    incarnation: int
    reason: str
    chosen: OptionEstimate
    moves_session: bool = False  # local, on another worker than the session is bound to: its KV moves there first
    options: tuple[OptionEstimate, ...]  # every option that was compared, the chosen one among them


Policy = Callable[[RoutingView, RoutingParameters], RoutingDecision]


# ------------------------------------------------------------------------------------- estimates


def estimate_local(view: RoutingView, parameters: RoutingParameters) -> OptionEstimate:
    """Queue and prefill on the decode worker, in chunks beside its decodes."""
    return _estimate_at(view, parameters, view.decode, _restore_s(view), 0)


def estimate_moved(view: RoutingView, load: WorkerLoad, parameters: RoutingParameters) -> OptionEstimate:
    """The session's KV moves to `load`, the prefill runs there, and there the session stays."""
    history = view.num_total_tokens - view.num_new_tokens
    move_s = transfer_s(view.decode, load, history) + _restore_s(view)
    return _estimate_at(view, parameters, load, move_s, history)


def _restore_s(view: RoutingView) -> float:
    """From the decode worker's host memory, what is there."""
    costs = view.decode.costs
    num_tokens = max(0, view.num_restorable_tokens - view.num_cached_tokens)
    return num_tokens * costs.kv_bytes_per_token / costs.host_bytes_per_s


def _estimate_at(
    view: RoutingView, parameters: RoutingParameters, load: WorkerLoad, fetch_s: float, num_moved: int
) -> OptionEstimate:
    history = view.num_total_tokens - view.num_new_tokens
    prefill_s = predict_mixed_prefill(load, parameters, history, view.num_new_tokens, view.slo.itl_s)
    stretch = load.stretch(parameters.chunk, view.slo.itl_s)
    wait_s = _wait_s(load, view, parameters, prefill_s, stretch)
    return OptionEstimate(
        placement="local",
        worker_id=load.worker_id,
        num_new_tokens=view.num_new_tokens,
        num_moved_tokens=num_moved,
        windowed_s=load.itl.mean,
        queue_s=wait_s,
        transfer_s=max(0.0, fetch_s - wait_s),
        prefill_s=prefill_s,
        work_s=load.work_s(history, view.num_new_tokens),
        stretch=stretch,
    )


def estimate_remote(view: RoutingView, load: WorkerLoad, parameters: RoutingParameters) -> OptionEstimate:
    """Queue, missing KV there and new KV back, and prefill on another worker.

    The history is pulled while the task waits; the increment goes back layer by layer while it is computed.
    """
    decode, total = view.decode, view.num_total_tokens
    kept = history = min(view.resident.get(load.worker_id, 0), total - 1)
    if parameters.reads_history and view.num_cached_tokens > history:
        history = min(view.num_cached_tokens, total - 1)
    num_new = total - history
    pull_s = transfer_s(decode, load, history - kept)
    num_back = total - view.num_cached_tokens
    back_s = transfer_s(load, decode, num_back)
    prefill_s = predict_mixed_prefill(load, parameters, history, num_new, view.slo.itl_s)
    stretch = load.stretch(parameters.chunk, view.slo.itl_s)
    wait_s = _wait_s(load, view, parameters, prefill_s, stretch)
    return OptionEstimate(
        placement="remote",
        worker_id=load.worker_id,
        num_new_tokens=num_new,
        num_moved_tokens=history - kept + num_back,
        windowed_s=load.ttft.mean,
        queue_s=wait_s,
        transfer_s=max(0.0, pull_s - wait_s) + max(load.costs.latency_s, back_s - prefill_s),
        prefill_s=prefill_s,
        work_s=load.work_s(history, num_new),
        stretch=stretch,
    )


def predict_mixed_prefill(
    load: WorkerLoad, parameters: RoutingParameters, num_history: int, num_new: int, itl_slo_s: float
) -> float:
    """Seconds until `num_new` tokens are computed beside the worker's decodes."""
    if not load.decoding or num_new <= 0:
        return load.prefill_s(num_history, num_new)
    beside = DecodingRounds(len(load.decoding), load.mean_context, itl_slo_s)
    mixed_s = predict_mixed_s(parameters.chunk, load.costs, beside, num_history=num_history, num_new=num_new)
    return load.prefill_correction * mixed_s


def _wait_s(
    load: WorkerLoad, view: RoutingView, parameters: RoutingParameters, prefill_s: float, stretch: float
) -> float:
    """Served by deadline, only who is due earlier goes first; but a round that is late anyway waits for all."""
    if parameters.by_deadline:
        before_s = load.wait_before_s(view.deadline, view.now, stretch)[0]
        if view.now + before_s + prefill_s <= view.deadline:
            return before_s
    return load.wait_s(view.now) * stretch


# -------------------------------------------------------------------------------------- policies


def route_colocated(view: RoutingView, parameters: RoutingParameters) -> RoutingDecision:
    """Every prefill where the session decodes."""
    return decide(view.decode, estimate_local(view, parameters), "colocated")


def route_remote(view: RoutingView, parameters: RoutingParameters) -> RoutingDecision:
    """Every prefill on a prefill worker, the one with the least to wait and compute given what it has kept (KV overlap
    and load, as Dynamo's router weighs them); locally only if there is none."""
    if not view.prefill_workers:
        return _decide_no_worker(view, parameters)
    return _decide_remote(view, parameters, _best_remote(view, parameters), "least cost of overlap and load")


def route_local(view: RoutingView, parameters: RoutingParameters) -> RoutingDecision:
    """The first round remote, later rounds on the decode worker."""
    if not view.prefill_workers:
        return _decide_no_worker(view, parameters)
    if not view.first_round:
        return decide(view.decode, estimate_local(view, parameters), "later round")
    return _decide_remote(view, parameters, _best_remote(view, parameters), "first round")


def route_threshold(view: RoutingView, parameters: RoutingParameters) -> RoutingDecision:
    """Static rules: local when the tokens to compute are few and a small share of the conversation (Dynamo's
    conditional disaggregation, llm-d's decider)."""
    if not view.prefill_workers:
        return _decide_no_worker(view, parameters)
    num_new = view.num_new_tokens
    if num_new < parameters.local_tokens and num_new < parameters.local_ratio * view.num_total_tokens:
        return decide(view.decode, estimate_local(view, parameters), "few new tokens")
    return _decide_remote(view, parameters, _best_remote(view, parameters), "many new tokens")


def route_ampd(view: RoutingView, parameters: RoutingParameters) -> RoutingDecision:
    """The paper's rule. 1. Prefill workers whose windowed TTFT is below alpha * TTFT objective have slack: remote, to
    one of them (which one is left open: we take the least work routed there, then the lowest TTFT). 2. Else, if the
    decode worker's windowed ITL is below beta * ITL objective: local. 3. Else the lower predicted completion of queue
    wait + KV transfer + prefill (remote, the best of all workers) and queue wait + prefill (local); equal: local.

    A window without samples counts as 0: nobody has waited there. With `live_terms` the TTFT is what is predicted for
    this round there, and the ITL the predicted step with one more sequence.
    """
    if not view.prefill_workers:
        return _decide_no_worker(view, parameters)
    slo = view.slo
    limit_s = parameters.alpha * slo.ttft_s
    if parameters.live_terms:
        best = _best_remote(view, parameters)
        estimate = estimate_remote(view, best, parameters)
        if estimate.total_s + view.waited_s < limit_s:
            return decide(best, estimate, "1: predicted TTFT has slack")
        itl_s = view.decode.decode_step_s(1)
    else:
        with_slack = [load for load in view.prefill_workers if load.ttft.mean < limit_s]
        if with_slack:
            best = min(with_slack, key=lambda load: (load.backlog_s, load.ttft.mean, load.worker_id))
            return _decide_remote(view, parameters, best, "1: windowed TTFT has slack")
        itl_s = view.decode.itl.mean
    local = estimate_local(view, parameters)
    if itl_s < parameters.beta * slo.itl_s:
        return decide(view.decode, local, "2: ITL has slack")
    remotes = [estimate_remote(view, load, parameters) for load in view.prefill_workers]
    index = min(range(len(remotes)), key=lambda one: remotes[one].total_s)
    options = (local, *remotes)
    if local.total_s <= remotes[index].total_s:
        return decide(view.decode, local, "3: predicted to complete first", options)
    return decide(view.prefill_workers[index], remotes[index], "3: predicted to complete first", options)


# ------------------------------------------------------------------------------------- decisions


def decide(
    worker: WorkerLoad,
    chosen: OptionEstimate,
    reason: str,
    options: tuple[OptionEstimate, ...] = (),
    *,
    moves_session: bool = False,
) -> RoutingDecision:
    return RoutingDecision(
        moves_session=moves_session,
        placement=chosen.placement,
        worker_id=worker.worker_id,
        incarnation=worker.incarnation,
        reason=reason,
        chosen=chosen,
        options=options or (chosen,),
    )


def _decide_no_worker(view: RoutingView, parameters: RoutingParameters) -> RoutingDecision:
    return decide(view.decode, estimate_local(view, parameters), "no prefill worker")


def _decide_remote(view: RoutingView, parameters: RoutingParameters, load: WorkerLoad, reason: str) -> RoutingDecision:
    return decide(load, estimate_remote(view, load, parameters), reason)


def _best_remote(view: RoutingView, parameters: RoutingParameters) -> WorkerLoad:
    """The prefill worker with the least work to wait for and to do, what it has kept of the session counted."""
    total, readable = view.num_total_tokens, view.num_cached_tokens if parameters.reads_history else 0
    costs_by_history: dict[int, float] = {}
    best: WorkerLoad | None = None
    least_s = float("inf")
    for load in view.prefill_workers:
        history = min(max(view.resident.get(load.worker_id, 0), readable), total - 1)
        work_s = costs_by_history.get(history)
        if work_s is None:
            work_s = costs_by_history[history] = load.work_s(history, total - history)
        cost_s = load.backlog_s + work_s
        if cost_s < least_s or (cost_s == least_s and best is not None and load.worker_id < best.worker_id):
            best, least_s = load, cost_s
    assert best is not None
    return best
