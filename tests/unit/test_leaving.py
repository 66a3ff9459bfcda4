"""A session that has to leave its worker: its KV comes along, unless the first token would be late and come sooner
without it."""

from __future__ import annotations

import pytest

from shared.core.leaving import route_leaving
from shared.core.load import WorkerLoad
from shared.core.routing import RoutingParameters, RoutingView, route_colocated, route_remote
from shared.core.step_costs import StepCosts
from shared.core.types import SessionKey
from shared.messages import Role, Slo
from shared.profile_files import load_profile

COSTS = StepCosts.from_profile(load_profile("h100-qwen3-32b"), 2)
PARAMETERS = RoutingParameters()
HISTORY, TOTAL = 4_000, 4_100


def make_load(worker_id: str, role: Role) -> WorkerLoad:
    return WorkerLoad(worker_id, 1, role, COSTS, COSTS.num_kv_tokens)


@pytest.mark.parametrize(
    ("busy_s", "ttft_s", "placement"),
    [(0.0, 5.0, "local"), (10.0, 60.0, "local"), (10.0, 5.0, "remote"), (0.0, 0.001, "local")],
)
def test_the_kv_goes_before_computing_it_again_unless_that_makes_it_late(
    busy_s: float, ttft_s: float, placement: str
) -> None:
    home, target, other = make_load("home", "prefill"), make_load("target", "decode"), make_load("other", "prefill")
    if busy_s:
        target.begin_prefill(SessionKey("t", "before"), 1_000, busy_s, 0.0, 0.0)
    view = RoutingView(
        now=0.0,
        num_cached_tokens=0,
        num_total_tokens=TOTAL,
        first_round=False,
        slo=Slo(ttft_s=ttft_s),
        decode=target,
        prefill_workers=[other],
    )
    there = {"num_cached_tokens": HISTORY, "num_restorable_tokens": HISTORY}
    remote = route_remote(view, PARAMETERS)
    decision = route_leaving(view, remote, home, parameters=PARAMETERS, **there)
    assert decision.placement == placement
    if placement == "remote":
        assert decision is remote
        return
    assert (decision.worker_id, decision.moves_session, decision.chosen in decision.options) == ("target", True, True)
    assert (decision.chosen.num_new_tokens, decision.chosen.num_moved_tokens) == (TOTAL - HISTORY, HISTORY)
    local = route_leaving(view, route_colocated(view, PARAMETERS), home, parameters=PARAMETERS, **there)
    assert local.chosen == decision.chosen, "whatever the policy's own choice, computing it all here is the worse"
