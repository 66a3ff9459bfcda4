"""Where a prefill runs: policies as pure functions of one view, chosen by name.

`ampd` is the three-step rule of AMPD (arXiv 2602.14516); where the paper leaves something open, the docstring says
what we chose. The coordinator and the simulator build the same `RoutingView` and call the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from shared.core.cost_model import CostModel
from shared.messages import Slo, WindowStats


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """One worker as routing sees it. Numbers of tokens are tokens still to be prefilled there."""

    worker_id: str
    incarnation: int
    ttft: WindowStats  # of its newest heartbeat
    itl: WindowStats
    queue_num_tokens: int  # of its newest heartbeat
    routed_num_tokens: int  # routed there by this coordinator since that heartbeat
    num_outstanding: int = 0  # prefills routed there by this coordinator and not ended

    @property
    def live_num_tokens(self) -> int:
        return self.queue_num_tokens + self.routed_num_tokens


@dataclass(frozen=True, slots=True)
class RoutingView:
    """Everything a policy may look at for one prefill.

    `num_cached_tokens` of the conversation have KV on the decode worker; `num_new_tokens` must be computed.
    """

    num_cached_tokens: int
    num_new_tokens: int
    first_round: bool
    slo: Slo
    decode: WorkerLoad
    prefill_workers: Sequence[WorkerLoad]  # alive, able to exchange KV with `decode`, not `decode` itself
    cost_model: CostModel


@dataclass(frozen=True, slots=True)
class RoutingParameters:
    """alpha and beta: the shares of the TTFT and ITL objectives up to which a worker counts as having slack."""

    alpha: float = 0.8
    beta: float = 0.8


@dataclass(frozen=True, slots=True)
class OptionEstimate:
    """What a policy expected of one option, in seconds. `windowed_s` is its TTFT (remote) or ITL (local)."""

    placement: Literal["local", "remote"]
    worker_id: str
    windowed_s: float
    queue_s: float
    transfer_s: float
    prefill_s: float

    @property
    def total_s(self) -> float:
        return self.queue_s + self.transfer_s + self.prefill_s


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    placement: Literal["local", "remote"]
    worker_id: str  # where the prefill runs
    incarnation: int
    reason: str
    options: tuple[OptionEstimate, ...]  # the numbers of the options that were compared


Policy = Callable[[RoutingView, RoutingParameters], RoutingDecision]


def route_remote(view: RoutingView, parameters: RoutingParameters) -> RoutingDecision:
    """Every prefill on the least loaded prefill worker; locally only if there is none."""
    if not view.prefill_workers:
        return _decide_local(view, "no prefill worker")
    return _decide_remote(view, min(view.prefill_workers, key=_by_load), "least loaded")


def route_local(view: RoutingView, parameters: RoutingParameters) -> RoutingDecision:
    """The first round remote, later rounds on the decode worker."""
    if not view.prefill_workers:
        return _decide_local(view, "no prefill worker")
    if not view.first_round:
        return _decide_local(view, "later round")
    return _decide_remote(view, min(view.prefill_workers, key=_by_load), "first round")


def route_ampd(view: RoutingView, parameters: RoutingParameters) -> RoutingDecision:
    """The paper's rule. 1. Prefill workers whose windowed TTFT is below alpha * TTFT objective have slack: remote, to
    one of them (which one is left open: we take the shortest queue, then the lowest TTFT). 2. Else, if the decode
    worker's windowed ITL is below beta * ITL objective: local. 3. Else the lower predicted completion of queue wait +
    KV transfer + prefill (remote, the best of all workers) and queue wait + prefill (local); equal: local.

    A window without samples counts as 0: nobody has waited there.
    """
    if not view.prefill_workers:
        return _decide_local(view, "no prefill worker")
    limit_s = parameters.alpha * view.slo.ttft_s
    with_slack = [load for load in view.prefill_workers if load.ttft.mean < limit_s]
    if with_slack:
        return _decide_remote(view, min(with_slack, key=_by_load), "1: windowed TTFT has slack")
    if view.decode.itl.mean < parameters.beta * view.slo.itl_s:
        return _decide_local(view, "2: windowed ITL has slack")
    local = estimate_local(view)
    remotes = [estimate_remote(view, load) for load in view.prefill_workers]
    options = (local, *remotes)
    best = min(range(len(remotes)), key=lambda index: remotes[index].total_s)
    if local.total_s <= remotes[best].total_s:
        return _decide_local(view, "3: predicted to complete first", options)
    return _decide_remote(view, view.prefill_workers[best], "3: predicted to complete first", options)


POLICIES: dict[str, Policy] = {"remote": route_remote, "local": route_local, "ampd": route_ampd}


def estimate_local(view: RoutingView) -> OptionEstimate:
    """Queue wait and prefill on the decode worker, from the cost model."""
    load, model = view.decode, view.cost_model
    return OptionEstimate(
        placement="local",
        worker_id=load.worker_id,
        windowed_s=load.itl.mean,
        queue_s=model.predict_queue_s(load.worker_id, load.live_num_tokens),
        transfer_s=0.0,
        prefill_s=model.predict_prefill_s(load.worker_id, view.num_cached_tokens, view.num_new_tokens),
    )


def estimate_remote(view: RoutingView, load: WorkerLoad) -> OptionEstimate:
    """Queue wait, KV there and back, and prefill on a prefill worker, from the cost model."""
    model, decode_id = view.cost_model, view.decode.worker_id
    return OptionEstimate(
        placement="remote",
        worker_id=load.worker_id,
        windowed_s=load.ttft.mean,
        queue_s=model.predict_queue_s(load.worker_id, load.live_num_tokens),
        transfer_s=model.predict_transfer_s(decode_id, load.worker_id, view.num_cached_tokens)
        + model.predict_transfer_s(load.worker_id, decode_id, view.num_new_tokens),
        prefill_s=model.predict_prefill_s(load.worker_id, view.num_cached_tokens, view.num_new_tokens),
    )


def _by_load(load: WorkerLoad) -> tuple[int, int, float, str]:
    return load.live_num_tokens, load.num_outstanding, load.ttft.mean, load.worker_id


def _decide_local(view: RoutingView, reason: str, options: tuple[OptionEstimate, ...] = ()) -> RoutingDecision:
    return RoutingDecision(
        "local", view.decode.worker_id, view.decode.incarnation, reason, options or (estimate_local(view),)
    )


def _decide_remote(
    view: RoutingView, load: WorkerLoad, reason: str, options: tuple[OptionEstimate, ...] = ()
) -> RoutingDecision:
    return RoutingDecision(
        "remote",
        load.worker_id,
        load.incarnation,
        reason,
        options or (estimate_local(view), estimate_remote(view, load)),
    )
