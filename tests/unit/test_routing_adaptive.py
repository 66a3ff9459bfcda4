"""`adaptive` on views made by hand: it places a prefill where most rounds are expected on time, and moves seldom."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from shared.core.load import WorkerLoad
from shared.core.marginal import (
    MAX_DELAY_COST,
    MOVE_BELOW,
    NO_ROOM,
    NUM_LEAST_LOADED,
    ON_TIME_IS_ALIKE,
    route_adaptive,
    shortlist,
    shortlist_movable,
)
from shared.core.policies import find_policy
from shared.core.routing import OptionEstimate, RoutingDecision, RoutingView
from shared.core.step_costs import StepCosts
from shared.core.types import SessionKey
from shared.messages import Role, Slo
from shared.profile_files import load_profile

PROFILE = load_profile("h100-qwen3-32b")
COSTS = StepCosts.from_profile(PROFILE, 2)
PARAMETERS = find_policy("adaptive").routing
SLO = Slo(ttft_s=1.0, itl_s=0.05)
NOW = 100.0


def worker(
    worker_id: str,
    *,
    role: Role = "both",
    queue_s: float = 0.0,
    due_s: float = 0.95,
    decoding: int = 0,
    active_tokens: int = 0,
) -> WorkerLoad:
    """With one prefill of `queue_s`, due `due_s` from now, and `decoding` sequences of 2,000 tokens."""
    load = WorkerLoad(worker_id, 1, role, COSTS, num_kv_tokens=400_000)
    if queue_s:
        load.begin_prefill(SessionKey("t", f"ahead/{worker_id}"), 1_000, queue_s, NOW + due_s, NOW)
    for number in range(decoding):
        load.begin_decoding(SessionKey("t", f"decoding/{worker_id}/{number}"), 2_000)
    if active_tokens:
        load.begin_round(SessionKey("t", f"active/{worker_id}"), active_tokens)
    return load


def view(decode: WorkerLoad, *prefill: WorkerLoad, **fields: Any) -> RoutingView:
    """20,000 tokens of history on the decode worker and 500 new ones, unless told otherwise."""
    defaults: dict[str, Any] = {
        "num_cached_tokens": 20_000,
        "num_total_tokens": 20_500,
        "first_round": False,
        "num_needed_tokens": 21_000,
    }
    return RoutingView(now=NOW, slo=SLO, decode=decode, prefill_workers=prefill, **{**defaults, **fields})


def weigh(seen: RoutingView, one: OptionEstimate) -> float:
    """What an option's time, its worker's time and the detour may weigh against rounds on time."""
    loads = {load.worker_id: load for load in (seen.decode, *seen.prefill_workers, *seen.movable)}
    wait_s = loads[one.worker_id].wait_s(seen.now)
    time_cost = ON_TIME_IS_ALIKE * one.total_s / SLO.ttft_s
    delay_cost = min(
        MAX_DELAY_COST, PARAMETERS.delay_price * len(loads[one.worker_id].decoding) * one.work_s / SLO.ttft_s
    )
    congestion_cost = PARAMETERS.congestion_price * one.work_s * wait_s / SLO.ttft_s**2
    return time_cost + delay_cost + congestion_cost + PARAMETERS.detour_cost


def route(seen: RoutingView) -> RoutingDecision:
    return route_adaptive(seen, PARAMETERS)


def gain(option: OptionEstimate) -> float:
    return option.on_time - option.disturbed


def option(decision: RoutingDecision, worker_id: str) -> OptionEstimate:
    return next(one for one in decision.options if one.worker_id == worker_id)


# --------------------------------------------------------------------------- where it computes


@pytest.mark.parametrize("decoding", [0, 4, 16])
def test_local_when_it_fits(decoding: int) -> None:
    decision = route(view(worker("d", decoding=decoding), worker("p")))
    assert (decision.placement, decision.worker_id, decision.moves_session) == ("local", "d", False)
    assert decision.chosen.on_time > 0.99


def test_remote_when_the_local_queue_makes_it_late() -> None:
    decision = route(view(worker("d", queue_s=0.94), worker("p"), num_total_tokens=23_000))
    assert (decision.placement, decision.worker_id) == ("remote", "p")
    assert option(decision, "d").on_time < 0.2 < 0.9 < decision.chosen.on_time


def test_remote_when_the_batch_leaves_no_time_for_chunks() -> None:
    """So many sequences decode that 4,000 tokens in the smallest chunks take seconds."""
    crowded = worker("d", decoding=256)
    decision = route(view(crowded, worker("p", role="prefill"), num_total_tokens=28_000, num_cached_tokens=20_000))
    assert decision.placement == "remote"


def test_what_the_batch_would_lose_tells_options_apart() -> None:
    """32 rounds that decode would all wait for the prefill; where nobody decodes it costs some KV transfer."""
    dedicated = worker("p", role="prefill", queue_s=0.1, due_s=0.5)
    alone, beside = view(worker("d"), dedicated), view(worker("d", decoding=32), dedicated)
    assert [route(seen).placement for seen in (alone, beside)] == ["local", "remote"]
    free = replace(PARAMETERS, delay_price=0.0)
    assert route_adaptive(beside, free).placement == "local"
    assert all(one.on_time > 0.99 for one in route(beside).options)


def test_what_the_batch_would_lose_makes_nobody_late() -> None:
    """However many decode: where the first token is expected late, the prefill does not go."""
    crowded, busy = worker("d", decoding=128), worker("p", role="prefill", queue_s=0.85)
    seen = view(crowded, busy, num_total_tokens=21_000)
    dear = replace(PARAMETERS, delay_price=10.0)
    decision = route_adaptive(seen, dear)
    assert decision.placement == "local"
    assert option(decision, "d").on_time > option(decision, "p").on_time + MAX_DELAY_COST


def test_a_crowded_batch_has_its_price_if_one_is_set() -> None:
    """240 sequences leave time for small chunks, not for many: the prefill would be on time, the batch would grow."""
    crowded, free = worker("d", decoding=240), worker("p", role="prefill", queue_s=0.3, due_s=0.5)
    seen, unpriced = view(crowded, free), replace(PARAMETERS, delay_price=0.0)
    assert COSTS.decode_step_s(241, 2_000) > PARAMETERS.crowd_share * SLO.itl_s
    decision = route_adaptive(seen, unpriced)
    assert decision.placement == "local"
    assert option(decision, "d").on_time > 0.99
    assert option(decision, "d").disturbed == 0.0
    priced = replace(unpriced, crowd_price=0.5)
    assert route_adaptive(seen, priced).placement == "remote"
    assert route_adaptive(view(worker("d", decoding=60), free), priced).placement == "local"


def test_many_short_prefills_ahead_take_full_steps_beside_the_batch() -> None:
    """One of them takes hardly longer there than alone; their queue takes several times its work."""
    busy = worker("d", decoding=150)
    for number in range(30):
        work_s = COSTS.work_s(2_000, 100)
        busy.begin_prefill(SessionKey("t", f"short/{number}"), 100, work_s, NOW + 0.9, NOW)
    (chosen,) = route(view(busy, num_cached_tokens=2_000, num_total_tokens=2_100)).options
    assert chosen.prefill_s < 2.0 * COSTS.prefill_s(2_000, 100)
    assert chosen.stretch > 2.0
    assert chosen.queue_s == pytest.approx(chosen.stretch * 30 * COSTS.work_s(2_000, 100))


def test_a_prefill_that_is_late_already_does_not_count_as_ahead() -> None:
    """The one before cannot be on time any more: this one is served first."""
    decision = route(view(worker("d", queue_s=5.0, due_s=0.5)))
    assert (decision.placement, decision.chosen.queue_s) == ("local", 0.0)


def test_of_places_that_are_on_time_the_one_with_less_backlog() -> None:
    """What waits there is late and does not go first, but it is work that the worker still has to do."""
    decision = route(view(worker("d", queue_s=5.0, due_s=0.5), worker("p")))
    assert decision.placement == "remote"
    assert min(one.on_time for one in decision.options) > 0.99


def test_a_prefill_due_later_is_not_waited_for_nor_made_late() -> None:
    roomy = option(route(view(worker("d", queue_s=2.0, due_s=60.0), worker("p"))), "d")
    assert (roomy.queue_s, roomy.disturbed) == (0.0, 0.0)
    assert roomy.on_time > 0.99
    tight = route(view(worker("d", queue_s=2.0, due_s=2.001), worker("p")))
    assert tight.placement == "remote"
    assert option(tight, "d").disturbed > 0.9


def test_what_has_waited_already_has_less_time() -> None:
    assert route(view(worker("d"), waited_s=0.0)).chosen.on_time > 0.99
    assert route(view(worker("d"), waited_s=0.999)).chosen.on_time < 0.01


def test_without_room_beside_the_rounds_in_flight_it_is_probably_late() -> None:
    decision = route(view(worker("d", active_tokens=390_000)))
    assert decision.chosen.on_time <= NO_ROOM


# ----------------------------------------------------------------------------- resident KV


def test_it_goes_where_the_kv_is() -> None:
    """The decode worker has lost it; 20,000 tokens take longer than the objective, 500 do not."""
    lost: dict[str, Any] = {"num_cached_tokens": 0, "num_total_tokens": 40_500, "num_needed_tokens": 41_000}
    decision = route(view(worker("d"), worker("a"), worker("b"), resident={"b": 40_000}, **lost))
    assert (decision.placement, decision.worker_id) == ("remote", "b")
    assert decision.chosen.num_new_tokens == 500
    assert option(decision, "a").on_time < 0.1 < decision.chosen.on_time


def test_holders_are_looked_at_however_busy_and_otherwise_the_least_loaded() -> None:
    workers = [worker(f"p{i:02d}", queue_s=0.01 * (i + 1)) for i in range(64)]
    seen = view(worker("d"), *workers, resident={"p63": 900, "p62": 800, "p61": 700, "gone": 5_000})
    assert [load.worker_id for load in shortlist(seen)] == ["p00", "p01", "p63", "p62"]
    assert shortlist(view(worker("d"), *workers[:4])) == workers[:4], "all, when there are few"


def test_kv_in_host_memory_is_restored_and_not_computed() -> None:
    decision = route(view(worker("d"), num_cached_tokens=0, num_restorable_tokens=20_000))
    assert decision.chosen.num_new_tokens == 500
    restore_s = 20_000 * COSTS.kv_bytes_per_token / COSTS.host_bytes_per_s
    assert decision.chosen.transfer_s == pytest.approx(restore_s)


# --------------------------------------------------------------------------------- moving


def test_a_session_moves_only_when_it_would_probably_be_late() -> None:
    movable = (worker("m"),)
    stays = route(view(worker("d", queue_s=0.3), movable=movable))
    assert gain(stays.chosen) >= MOVE_BELOW
    assert (stays.worker_id, stays.moves_session) == ("d", False)
    assert all(one.worker_id != "m" for one in stays.options), "not even looked at"
    moves = route(view(worker("d", queue_s=0.95), movable=movable))
    assert (moves.worker_id, moves.placement, moves.moves_session) == ("m", "local", True)
    assert gain(option(moves, "d")) < MOVE_BELOW < gain(moves.chosen)
    assert moves.chosen.num_moved_tokens == 20_000


def test_it_does_not_move_to_where_it_is_no_better_off() -> None:
    decision = route(view(worker("d", queue_s=0.95), movable=(worker("m", queue_s=0.95),)))
    assert not decision.moves_session
    assert option(decision, "m").placement == "local"


def test_only_the_least_loaded_with_room_are_considered_to_move_to() -> None:
    full = worker("full", active_tokens=390_000)
    others = [worker(f"m{i}", queue_s=0.1 * (3 - i)) for i in range(3)]
    seen = view(worker("d", queue_s=0.95), movable=(full, *others))
    assert [load.worker_id for load in shortlist_movable(seen)] == ["m2", "m1"]
    assert NUM_LEAST_LOADED == 2


def test_a_remote_prefill_saves_the_move() -> None:
    decision = route(view(worker("d", queue_s=0.95), worker("p"), movable=(worker("m"),)))
    assert (decision.worker_id, decision.moves_session) == ("p", False)


# ------------------------------------------------------------------------------ in general


def draw_view(seed: int) -> RoutingView:
    draws = random.Random(seed)

    def draw_worker(worker_id: str) -> WorkerLoad:
        return worker(
            worker_id,
            queue_s=draws.choice((0.0, draws.uniform(0.0, 2.0))),
            due_s=draws.uniform(-0.5, 3.0),
            decoding=draws.choice((0, 8, 200)),
            active_tokens=draws.choice((0, 390_000)),
        )

    cached = draws.choice((0, 5_000, 60_000))
    others = [draw_worker(f"p{i}") for i in range(draws.randint(0, 4))]
    return view(
        draw_worker("d"),
        *others,
        num_cached_tokens=cached,
        num_total_tokens=cached + draws.choice((10, 1_000, 20_000)),
        waited_s=draws.choice((0.0, 0.5)),
        resident={load.worker_id: draws.randint(0, cached) for load in others if draws.random() < 0.5},
        movable=[draw_worker(f"m{i}") for i in range(draws.randint(0, 3))],
    )


def test_it_never_takes_an_option_with_fewer_rounds_on_time() -> None:
    """Beyond what the cost of an option may weigh; and the reason names the expected rounds."""
    for seed in range(2_000):
        seen = draw_view(seed)
        decision = route(seen)
        best = max(decision.options, key=gain)
        assert gain(decision.chosen) >= gain(best) - weigh(seen, best), f"seed {seed}"
        assert decision.reason == f"{gain(decision.chosen):+.2f} rounds on time", f"seed {seed}"
        assert all(0.0 <= one.on_time <= 1.0 and 0.0 <= one.disturbed <= 1.0 for one in decision.options), (
            f"seed {seed}"
        )
        moved = decision.worker_id.startswith("m")
        assert decision.moves_session == moved, f"seed {seed}"
        if moved:
            here = [gain(one) - weigh(seen, one) for one in decision.options if not one.worker_id.startswith("m")]
            assert max(here) < MOVE_BELOW, f"seed {seed}"


def test_the_same_view_gives_the_same_decision() -> None:
    assert [route(draw_view(seed)) for seed in range(50)] == [route(draw_view(seed)) for seed in range(50)]
