"""The routing policies: what each decides, and that a decision shows its numbers."""

from __future__ import annotations

import pytest

from shared.core.cost_model import LinearCostModel
from shared.core.routing import (
    POLICIES,
    RoutingParameters,
    RoutingView,
    WorkerLoad,
    route_ampd,
    route_local,
    route_remote,
)
from shared.messages import Heartbeat, Slo, WindowStats

PARAMETERS = RoutingParameters(alpha=0.5, beta=0.5)
SLO = Slo(ttft_s=4.0, itl_s=0.2)  # slack up to TTFT 2 s and ITL 0.1 s


def window(mean: float) -> WindowStats:
    return WindowStats(count=10, mean=mean, p50=mean, p95=mean)


def load(
    worker_id: str, *, ttft: float = 0.0, itl: float = 0.0, queue: int = 0, routed: int = 0, outstanding: int = 0
) -> WorkerLoad:
    return WorkerLoad(worker_id, 1, window(ttft), window(itl), queue, routed, outstanding)


def view(
    *prefill: WorkerLoad, decode: WorkerLoad | None = None, first_round: bool = False, cached: int = 0, new: int = 100
) -> RoutingView:
    return RoutingView(
        num_cached_tokens=cached,
        num_new_tokens=new,
        first_round=first_round,
        slo=SLO,
        decode=decode or load("d"),
        prefill_workers=prefill,
        cost_model=LinearCostModel(),
    )


@pytest.mark.parametrize("policy", POLICIES.values())
def test_without_prefill_workers_every_policy_is_local(policy: object) -> None:
    decision = policy(view(first_round=True), PARAMETERS)
    assert (decision.placement, decision.worker_id) == ("local", "d")


def test_remote_takes_the_least_loaded_counting_what_was_routed_since_its_heartbeat() -> None:
    decision = route_remote(view(load("a", queue=10, routed=90), load("b", queue=50), load("c", queue=60)), PARAMETERS)
    assert (decision.placement, decision.worker_id) == ("remote", "b")


def test_equal_loads_are_spread_by_outstanding_prefills() -> None:
    decision = route_remote(view(load("a", outstanding=2), load("b", outstanding=1)), PARAMETERS)
    assert decision.worker_id == "b"


def test_local_runs_first_rounds_remotely_and_later_rounds_on_the_decode_worker() -> None:
    assert route_local(view(load("a"), first_round=True), PARAMETERS).worker_id == "a"
    assert route_local(view(load("a"), first_round=False), PARAMETERS).placement == "local"


def test_ampd_step_1_takes_only_workers_whose_ttft_has_slack() -> None:
    decision = route_ampd(view(load("a", ttft=2.5, queue=0), load("b", ttft=1.9, queue=500)), PARAMETERS)
    assert (decision.placement, decision.worker_id, decision.reason[0]) == ("remote", "b", "1")


def test_ampd_step_2_goes_local_when_no_ttft_has_slack_but_the_itl_has() -> None:
    decision = route_ampd(view(load("a", ttft=2.0), decode=load("d", itl=0.09)), PARAMETERS)
    assert (decision.placement, decision.reason[0]) == ("local", "2")


def test_the_limits_are_strict() -> None:
    at_the_limit = view(load("a", ttft=2.0), decode=load("d", itl=0.1))
    assert route_ampd(at_the_limit, PARAMETERS).reason[0] == "3"


@pytest.mark.parametrize(
    ("remote_queue", "local_queue", "placement"),
    [(0, 5000, "remote"), (5000, 0, "local"), (0, 0, "local")],
)
def test_ampd_step_3_compares_predicted_completion(remote_queue: int, local_queue: int, placement: str) -> None:
    """With equal queues local wins: it moves no KV."""
    decision = route_ampd(
        view(load("a", ttft=9, queue=remote_queue), decode=load("d", itl=9, queue=local_queue), cached=1000),
        PARAMETERS,
    )
    assert (decision.placement, decision.reason[0]) == (placement, "3")
    best = min(decision.options, key=lambda option: option.total_s)
    assert best.worker_id == decision.worker_id


def test_a_decision_carries_the_numbers_of_its_options() -> None:
    decision = route_ampd(view(load("a", ttft=9, queue=400), load("b", ttft=9), decode=load("d", itl=9)), PARAMETERS)
    by_worker = {option.worker_id: option for option in decision.options}
    assert set(by_worker) == {"a", "b", "d"}
    assert by_worker["a"].queue_s > by_worker["b"].queue_s == 0
    assert by_worker["d"].transfer_s == 0


def heartbeat(worker_id: str = "w", rate: float = 0.0, kv_bytes_per_s: float = 0.0) -> Heartbeat:
    return Heartbeat(
        worker_id=worker_id,
        incarnation=1,
        role="both",
        seq=0,
        model="m",
        max_context_tokens=100,
        vocab_size=10,
        layout_hash="l",
        kv_endpoints=(),
        num_blocks=1,
        num_free_blocks=1,
        block_size=1,
        kv_bytes_per_token=1000,
        num_sessions=0,
        num_running=0,
        num_waiting=0,
        num_leases=0,
        queue=(),
        queue_num_tokens=0,
        ttft=WindowStats(),
        itl=WindowStats(),
        prefill_tokens_per_s=rate,
        decode_step_s=0.0,
        kv_bytes_per_s=kv_bytes_per_s,
        draining=False,
    )


def test_the_cost_model_follows_measured_rates() -> None:
    model = LinearCostModel()
    prior = model.predict_prefill_s("w", 0, 1000)
    model.observe_worker(heartbeat(rate=100.0, kv_bytes_per_s=1e6))
    assert model.predict_prefill_s("w", 0, 1000) > 5 * prior
    assert model.predict_queue_s("w", 1000) == pytest.approx(10.0)
    assert model.predict_transfer_s("w", "other", 1000) == pytest.approx(1.0, rel=0.01)
    assert model.predict_transfer_s("w", "other", 0) == 0.0
    model.forget_worker("w")
    assert model.predict_prefill_s("w", 0, 1000) == prior


def test_the_cost_model_corrects_itself_by_what_prefills_took() -> None:
    model = LinearCostModel()
    model.observe_worker(heartbeat(rate=1000.0))
    predicted = model.predict_prefill_s("w", 500, 100)
    for _ in range(50):
        model.observe_prefill("w", 500, 100, 3 * predicted)
    assert model.predict_prefill_s("w", 500, 100) == pytest.approx(3 * predicted, rel=0.01)
    model.observe_prefill("unknown", 500, 100, 1.0)  # changes nothing, keeps nothing


def test_a_longer_history_costs_more_and_more_new_tokens_cost_more() -> None:
    model = LinearCostModel()
    assert model.predict_prefill_s("w", 10_000, 100) > model.predict_prefill_s("w", 0, 100)
    assert model.predict_prefill_s("w", 0, 200) > model.predict_prefill_s("w", 0, 100)
    assert model.predict_prefill_s("w", 100, 0) == 0.0
