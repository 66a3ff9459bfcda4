"""The routing policies on views made by hand: what each decides, why, and that a decision shows its numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shared.core.binding import choose_binding
from shared.core.load import WorkerLoad, transfer_s
from shared.core.measured_costs import MeasuredRates, build_measured_costs
from shared.core.policies import PARTS, POLICIES, find_policy, switch_off, with_options
from shared.core.routing import (
    RoutingDecision,
    RoutingParameters,
    RoutingView,
    route_ampd,
    route_colocated,
    route_local,
    route_remote,
    route_threshold,
)
from shared.core.types import SessionKey
from shared.errors import AmpdError, ErrorCode
from shared.messages import Role, Slo, WindowStats

PARAMETERS = RoutingParameters(alpha=0.5, beta=0.5)
SLO = Slo(ttft_s=4.0, itl_s=0.2)  # slack up to TTFT 2 s and ITL 0.1 s
RATES = MeasuredRates(
    prefill_tokens_per_s=1_000.0, decode_step_s=0.02, kv_bytes_per_s=100e6, kv_bytes_per_token=10_000, decode_batch=1
)  # a token: 1 ms to compute, 0.1 ms to move
NOW = 100.0


def window(mean: float) -> WindowStats:
    return WindowStats(count=10, mean=mean, p50=mean, p95=mean)


def load(
    worker_id: str,
    *,
    role: Role = "prefill",
    ttft: float = 0.0,
    itl: float = 0.0,
    queue_s: tuple[float, ...] = (),
    deadline: float = NOW + 1_000.0,
    decoding: int = 0,
    **fields: Any,
) -> WorkerLoad:
    """A worker on a node of its own with prefills of `queue_s` seconds each, all due at `deadline`."""
    made = WorkerLoad(
        worker_id,
        1,
        role,
        build_measured_costs(RATES, parallel_degree=1, num_kv_tokens=100_000),
        num_kv_tokens=100_000,
        node=sum(map(ord, worker_id)),
        ttft=window(ttft),
        itl=window(itl),
        **fields,
    )
    for number, work_s in enumerate(queue_s):
        made.begin_prefill(SessionKey("t", f"{number}"), int(work_s * 1_000), work_s, deadline, NOW)
    for number in range(decoding):
        made.begin_round(SessionKey("d", f"{number}"), 0)
        made.begin_decoding(SessionKey("d", f"{number}"), 1_000)
    return made


def view(*prefill: WorkerLoad, decode: WorkerLoad | None = None, **fields: Any) -> RoutingView:
    """1,000 tokens of history on the decode worker and 100 new ones, unless told otherwise."""
    defaults = {"num_cached_tokens": 1_000, "num_total_tokens": 1_100, "first_round": False}
    return RoutingView(
        now=NOW,
        slo=SLO,
        decode=decode or load("d", role="decode"),
        prefill_workers=prefill,
        **{**defaults, **fields},
    )


def route(name: str, seen: RoutingView) -> RoutingDecision:
    policy = find_policy(name)
    return policy.route(seen, policy.routing)


# ------------------------------------------------------------------------------ every policy


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_without_prefill_workers_every_policy_is_local(policy: str) -> None:
    decision = route(policy, view(first_round=True))
    assert (decision.placement, decision.worker_id) == ("local", "d")


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_decision_names_its_process_and_shows_what_it_chose_among(policy: str) -> None:
    decision = route(policy, view(load("a"), load("b"), first_round=True))
    assert decision.incarnation == 1
    assert decision.chosen in decision.options
    assert decision.chosen.worker_id == decision.worker_id
    assert decision.chosen.placement == decision.placement
    assert decision.chosen.total_s > 0
    assert len({option.worker_id for option in decision.options}) == len(decision.options)


def test_colocated_prefills_where_the_session_decodes() -> None:
    decision = route_colocated(view(load("a"), decode=load("d", queue_s=(30.0,))), PARAMETERS)
    assert (decision.worker_id, decision.reason) == ("d", "colocated")


def test_remote_takes_the_least_of_waiting_and_computing() -> None:
    seen = view(load("a", queue_s=(0.5, 0.5)), load("b", queue_s=(0.4,)), load("c", queue_s=(0.6,)))
    assert route_remote(seen, PARAMETERS).worker_id == "b"
    kept = replace(seen, resident={"c": 1_050})
    assert route_remote(kept, RoutingParameters(reads_history=False)).worker_id == "c", "1,050 tokens less to compute"
    assert route_remote(kept, RoutingParameters()).worker_id == "b", "what is kept is read in no time"


def test_local_runs_first_rounds_remotely_and_later_rounds_on_the_decode_worker() -> None:
    assert route_local(view(load("a"), first_round=True), PARAMETERS).worker_id == "a"
    later = route_local(view(load("a"), first_round=False), PARAMETERS)
    assert (later.placement, later.reason) == ("local", "later round")


@pytest.mark.parametrize(
    ("num_cached", "num_total", "placement"),
    [
        (1_000, 1_100, "local"),
        (10_000, 12_047, "local"),
        (10_000, 12_048, "remote"),  # 2,048 new tokens
        (300, 1_000, "remote"),  # 70 % of the conversation is new
        (301, 1_000, "local"),
    ],
)
def test_threshold_is_local_below_both_of_its_limits(num_cached: int, num_total: int, placement: str) -> None:
    seen = view(load("a"), num_cached_tokens=num_cached, num_total_tokens=num_total)
    assert route_threshold(seen, RoutingParameters(reads_history=False)).placement == placement


# ---------------------------------------------------------------------------------- ampd


def test_ampd_step_1_takes_only_workers_whose_ttft_has_slack() -> None:
    decision = route_ampd(view(load("a", ttft=2.5), load("b", ttft=1.9, queue_s=(0.5,))), PARAMETERS)
    assert (decision.placement, decision.worker_id, decision.reason[0]) == ("remote", "b", "1")


def test_ampd_step_2_goes_local_when_no_ttft_has_slack_but_the_itl_has() -> None:
    decision = route_ampd(view(load("a", ttft=2.0), decode=load("d", itl=0.09)), PARAMETERS)
    assert (decision.placement, decision.reason[0]) == ("local", "2")


def test_the_limits_are_strict() -> None:
    assert route_ampd(view(load("a", ttft=2.0), decode=load("d", itl=0.1)), PARAMETERS).reason[0] == "3"


@pytest.mark.parametrize(
    ("remote_s", "local_s", "placement"), [(0.0, 5.0, "remote"), (5.0, 0.0, "local"), (0.0, 0.0, "local")]
)
def test_ampd_step_3_compares_predicted_completion(remote_s: float, local_s: float, placement: str) -> None:
    """With equal queues local wins: it moves no KV."""
    seen = view(load("a", ttft=9, queue_s=(remote_s,)), decode=load("d", itl=9, queue_s=(local_s,)))
    decision = route_ampd(seen, PARAMETERS)
    assert (decision.placement, decision.reason[0]) == (placement, "3")
    assert decision.chosen == min(decision.options, key=lambda option: option.total_s)


def test_ampd_with_live_terms_reads_what_is_predicted_instead_of_the_windows() -> None:
    live = replace(PARAMETERS, live_terms=True)
    lagging = view(load("a", ttft=9.0), decode=load("d", itl=9.0))
    assert route_ampd(lagging, live).reason[0] == "1"
    assert route_ampd(view(load("a", queue_s=(3.0,))), live).reason[0] == "2"
    assert route_ampd(view(load("a", queue_s=(3.0,)), decode=load("d", decoding=100)), live).reason[0] == "3"
    assert route_ampd(replace(lagging, waited_s=1.9), live).reason[0] == "2", "it has waited most of its objective"


# -------------------------------------------------------------------------------- adaptive


def test_adaptive_goes_where_the_round_is_on_time() -> None:
    busy = load("d", queue_s=(3.8,), deadline=NOW + 3.9)
    decision = route("adaptive", view(load("a"), decode=busy, num_total_tokens=2_000))
    assert (decision.worker_id, decision.placement) == ("a", "remote")
    assert decision.chosen.on_time > 0.9
    local = next(option for option in decision.options if option.placement == "local")
    assert (local.worker_id, round(local.queue_s, 3)) == ("d", 3.8)
    assert local.on_time < 0.2


def test_adaptive_stays_local_when_both_are_on_time() -> None:
    """A remote prefill takes the link and another worker's time."""
    decision = route("adaptive", view(load("a")))
    assert decision.placement == "local"
    assert all(option.on_time > 0.99 for option in decision.options)


def test_adaptive_does_not_push_another_round_past_its_deadline() -> None:
    """On the decode worker another prefill is due later and has 0.2 s to spare: 0.5 s of work would make it late."""
    tight = load("d", queue_s=(5.8,), deadline=NOW + 6.0)
    seen = view(load("a"), decode=tight, num_total_tokens=1_500)
    decision = route("adaptive", seen)
    local = next(option for option in decision.options if option.placement == "local")
    assert local.on_time > 0.9
    assert local.disturbed > 0.9
    assert decision.worker_id == "a"


def test_adaptive_looks_at_the_least_loaded_and_at_the_holders() -> None:
    workers = [load(f"p{number}", queue_s=(0.1 * (number + 1),)) for number in range(10)]
    decision = route("adaptive", view(*workers, resident={"p9": 900, "p8": 1_000, "p7": 10}))
    assert {option.worker_id for option in decision.options} == {"d", "p0", "p1", "p8", "p9"}


def test_adaptive_prefers_the_worker_that_holds_the_session() -> None:
    """The decode worker has nothing any more: whoever has kept the history computes 100 tokens, the other 5,000."""
    seen = view(load("a"), load("b"), num_cached_tokens=0, num_total_tokens=5_100, resident={"b": 5_000})
    decision = route("adaptive", seen)
    assert decision.worker_id == "b"
    assert (decision.chosen.num_new_tokens, decision.chosen.num_moved_tokens) == (100, 5_100)


# ------------------------------------------------------------------------------- the numbers


def test_an_estimate_is_made_of_queue_transfer_and_prefill() -> None:
    decision = route_ampd(
        view(load("a", ttft=9, queue_s=(0.4,)), load("b", ttft=9), decode=load("d", itl=9)), PARAMETERS
    )
    options = {option.worker_id: option for option in decision.options}
    assert set(options) == {"a", "b", "d"}
    assert options["a"].queue_s == pytest.approx(0.4)
    assert options["b"].queue_s == options["d"].transfer_s == 0.0
    assert (options["b"].num_new_tokens, options["b"].num_moved_tokens, options["d"].num_moved_tokens) == (
        100,
        1_100,
        0,
    )
    history_s = 0.002 + 1_000 * 1e-4
    assert options["b"].transfer_s == pytest.approx(history_s + 0.002), "the increment moves while it is computed"
    assert options["a"].transfer_s < options["b"].transfer_s, "what is pulled while the task waits costs nothing"
    attention = 1 + (1_000 + 50) / 20_000
    assert options["b"].prefill_s == pytest.approx(0.002 + 0.1 * attention, rel=0.02)


def test_local_prefills_beside_a_batch_take_longer_in_smaller_chunks() -> None:
    big = view(num_total_tokens=3_000)
    alone = route_colocated(big, PARAMETERS).chosen.prefill_s
    shared_load = load("d", decoding=20)
    beside = route_colocated(replace(big, decode=shared_load), PARAMETERS).chosen.prefill_s
    small = with_options(find_policy("colocated"), {"routing.chunk.chunk_tokens": 64}).routing
    in_small = route_colocated(replace(big, decode=shared_load), small).chosen.prefill_s
    assert alone < beside < in_small


def test_moving_tokens_takes_the_slower_end_and_nothing_takes_nothing() -> None:
    a, b = load("a"), load("b")
    b.costs.link_bytes_per_s = 50e6
    assert transfer_s(a, b, 1_000) == transfer_s(b, a, 1_000) == pytest.approx(0.002 + 0.2)
    b.node = a.node
    assert transfer_s(a, b, 1_000) == pytest.approx(0.002 + 0.1)
    assert transfer_s(a, b, 0) == 0.0


def test_a_worker_works_off_its_queue_while_time_passes() -> None:
    busy = load("a", queue_s=(1.0, 2.0))
    assert busy.wait_s(NOW) == pytest.approx(3.0)
    assert busy.wait_s(NOW + 0.25) == pytest.approx(2.75)
    assert busy.wait_s(NOW + 9.0) == pytest.approx(2.0), "the first must be about to end; the second has not begun"
    busy.end_prefill(SessionKey("t", "0"), NOW + 9.0)
    assert busy.wait_s(NOW + 9.0) == pytest.approx(2.0)
    busy.end_prefill(SessionKey("t", "1"), NOW + 10.0)
    assert busy.wait_s(NOW + 10.0) == 0.0


def test_a_round_waits_only_for_those_due_before_it_and_late_ones_go_last() -> None:
    busy = load("a")
    for number, deadline in enumerate((NOW + 0.5, NOW + 3.0, NOW + 9.0)):
        busy.begin_prefill(SessionKey("t", f"{number}"), 1, 1.0, deadline, NOW)
    before_s, slack_s = busy.wait_before_s(NOW + 4.0, NOW)
    assert before_s == pytest.approx(1.0), "the first cannot be on time"
    assert slack_s == pytest.approx(7.0)


# ---------------------------------------------------------------------------------- binding


def test_free_kv_binds_where_most_memory_is_not_promised() -> None:
    a, b = load("a", num_promised_tokens=50_000), load("b", num_promised_tokens=40_000)
    assert choose_binding([a, b], "free_kv", NOW) is b
    assert choose_binding([], "free_kv", NOW) is None


@pytest.mark.parametrize("binding", ["least_loaded", "least_active"])
def test_the_other_bindings_count_work_too(binding: Any) -> None:
    free, waiting, decoding = load("c"), load("a", queue_s=(1.0,)), load("b", decoding=30)
    assert choose_binding([waiting, decoding, free], binding, NOW) is free
    equal = [load("y"), load("x")]
    assert choose_binding(equal, binding, NOW) is equal[1]


def test_sessions_that_are_prefilled_elsewhere_count_where_they_will_decode() -> None:
    """Or all that come while the first of them is prefilled meet on one worker."""
    workers = [load("a"), load("b")]
    for number in range(8):
        bound = choose_binding(workers, "least_active", NOW)
        assert bound is not None
        bound.begin_round(SessionKey("t", f"{number}"), 100)
        if number == 0:
            workers[1].begin_round(SessionKey("t", "large"), 2_000)
    assert [len(worker.active) for worker in workers] == [5, 4]


# --------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("part", sorted(PARTS))
def test_every_part_of_adaptive_can_be_switched_off(part: str) -> None:
    adaptive = find_policy("adaptive")
    without = switch_off(adaptive, part)
    assert without != adaptive
    assert switch_off(without, part) == without
    assert without.route(view(load("a")), without.routing).worker_id in ("a", "d")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"routing.gamma": 1}, "routing.gamma"),
        ({"alpha": 0.3}, "alpha"),
        ({"routing.alpha": "much"}, "routing.alpha=much"),
        ({"stages": "perhaps"}, "stages=perhaps"),
        ({"order.window": "99"}, "order.window"),
        ({"routing": "x"}, "routing"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(AmpdError, match=named) as refused:
        with_options(find_policy("ampd"), options)
    assert refused.value.code == ErrorCode.INVALID_REQUEST


def test_unknown_policies_and_parts_are_answered_with_those_there_are() -> None:
    with pytest.raises(AmpdError, match="adaptive"):
        find_policy("best")
    with pytest.raises(AmpdError, match="slack_chunks"):
        switch_off(find_policy("adaptive"), "everything")


@pytest.mark.parametrize("binding", ["least_loaded", "least_active"])
@pytest.mark.parametrize(("correction", "chosen"), [(1.0, 1), (1.15, 1), (1.5, 0)])
def test_a_worker_measured_a_little_slower_is_as_good(binding: Any, correction: float, chosen: int) -> None:
    """An idle session comes back to where it is bound: a new one next to it, on an idle worker, would wait for it."""
    taken, free = load("a", num_promised_tokens=2_000), load("b")
    free.decode_correction = correction
    workers = [taken, free]
    assert choose_binding(workers, binding, NOW) is workers[chosen]
    free.decode_correction, taken.decode_correction = 1.0, correction
    assert choose_binding(workers, binding, NOW) is free
