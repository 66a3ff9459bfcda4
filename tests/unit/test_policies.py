"""Every routing policy on views made by hand: where the prefill goes and why; and variants of a policy by option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import pytest

from shared.core.load import WorkerLoad
from shared.core.policies import PARTS, POLICIES, SchedulingPolicy, find_policy, switch_off, with_options
from shared.core.routing import RoutingDecision, RoutingView
from shared.core.step_costs import StepCosts
from shared.core.types import SessionKey
from shared.errors import AmpdError, ErrorCode
from shared.messages import Role, Slo, WindowStats
from shared.profile_files import load_profile

COSTS = StepCosts.from_profile(load_profile("h100-qwen3-32b"), 2)
SLO = Slo(ttft_s=1.0, itl_s=0.05)
NOW = 100.0


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A worker of a case: `queue_s` of prefill work, windowed TTFT and ITL."""

    queue_s: float = 0.0
    ttft_s: float = 0.0
    itl_s: float = 0.0


def make_load(worker_id: str, role: Role, worker: Worker) -> WorkerLoad:
    load = WorkerLoad(worker_id, 1, role, COSTS, num_kv_tokens=400_000)
    load.ttft, load.itl = WindowStats(count=1, mean=worker.ttft_s), WindowStats(count=1, mean=worker.itl_s)
    if worker.queue_s:
        load.begin_prefill(SessionKey("t", f"ahead/{worker_id}"), 1_000, worker.queue_s, NOW + 1.0, NOW)
    return load


@dataclass(frozen=True, kw_only=True)
class Case:
    """A later round of 1,000 tokens of history and 200 new ones, unless told otherwise. `placed`: worker and reason."""

    policy: str
    placed: tuple[str, str]
    decode: Worker = Worker()
    prefill: tuple[Worker, ...] = (Worker(), Worker())
    first_round: bool = False
    cached: int = 1_000
    total: int = 1_200
    resident: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


IDLE, BUSY = Worker(), Worker(queue_s=3.0)
SLOW = Worker(ttft_s=0.9, itl_s=0.045)  # above 80 % of both objectives
CASES = [
    Case(policy="colocated", placed=("d", "colocated")),
    Case(policy="colocated", placed=("d", "colocated"), decode=BUSY, first_round=True, cached=0),
    Case(policy="continuum", placed=("d", "colocated"), decode=BUSY),
    Case(policy="remote", placed=("p0", "least cost of overlap and load")),
    Case(policy="remote", placed=("p1", "least cost of overlap and load"), prefill=(BUSY, IDLE)),
    Case(policy="remote", placed=("p1", "least cost of overlap and load"), resident={"p1": 800}),
    Case(
        policy="remote", placed=("p0", "least cost of overlap and load"), prefill=(IDLE, BUSY), resident={"p1": 1_100}
    ),
    Case(policy="remote", placed=("d", "no prefill worker"), prefill=()),
    Case(policy="local", placed=("p0", "first round"), first_round=True, cached=0),
    Case(policy="local", placed=("p1", "first round"), first_round=True, cached=0, prefill=(BUSY, IDLE)),
    Case(policy="local", placed=("d", "later round"), decode=BUSY),
    Case(policy="local", placed=("d", "no prefill worker"), first_round=True, cached=0, prefill=()),
    Case(policy="threshold", placed=("d", "few new tokens")),
    Case(policy="threshold", placed=("d", "few new tokens"), decode=BUSY),
    Case(policy="threshold", placed=("p0", "many new tokens"), first_round=True, cached=0),
    Case(policy="threshold", placed=("p0", "many new tokens"), cached=10_000, total=13_000),
    Case(
        policy="threshold", placed=("d", "few new tokens"), cached=10_000, total=13_000, options={"local_tokens": 3_001}
    ),
    Case(policy="threshold", placed=("p0", "many new tokens"), options={"local_ratio": 0.1}),
    Case(policy="ampd", placed=("p0", "1: windowed TTFT has slack"), decode=SLOW),
    Case(policy="ampd", placed=("p1", "1: windowed TTFT has slack"), prefill=(SLOW, BUSY)),
    Case(policy="ampd", placed=("p1", "1: windowed TTFT has slack"), prefill=(BUSY, IDLE)),
    Case(policy="ampd", placed=("d", "2: ITL has slack"), prefill=(SLOW, SLOW)),
    Case(policy="ampd", placed=("p0", "1: windowed TTFT has slack"), prefill=(SLOW, SLOW), options={"alpha": 0.95}),
    Case(policy="ampd", placed=("d", "3: predicted to complete first"), prefill=(SLOW, SLOW), decode=SLOW),
    Case(
        policy="ampd",
        placed=("p1", "3: predicted to complete first"),
        prefill=(Worker(ttft_s=0.9, queue_s=1.0), SLOW),
        decode=Worker(itl_s=0.045, queue_s=1.0),
    ),
    Case(policy="ampd", placed=("d", "no prefill worker"), prefill=(), decode=SLOW),
    Case(
        policy="ampd", placed=("p0", "1: predicted TTFT has slack"), prefill=(SLOW, SLOW), options={"live_terms": True}
    ),
    Case(policy="ampd", placed=("d", "2: ITL has slack"), prefill=(BUSY, BUSY), options={"live_terms": True}),
    Case(
        policy="ampd",
        placed=("p0", "3: predicted to complete first"),
        prefill=(Worker(queue_s=0.9), BUSY),
        decode=Worker(queue_s=2.0),
        options={"live_terms": True, "beta": 0.01},
    ),
]


def route(case: Case) -> RoutingDecision:
    policy = with_options(find_policy(case.policy), {f"routing.{name}": value for name, value in case.options.items()})
    view = RoutingView(
        now=NOW,
        num_cached_tokens=case.cached,
        num_total_tokens=case.total,
        first_round=case.first_round,
        slo=SLO,
        decode=make_load("d", "both", case.decode),
        prefill_workers=[make_load(f"p{i}", "prefill", one) for i, one in enumerate(case.prefill)],
        resident=case.resident,
    )
    return policy.route(view, policy.routing)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.policy}-{case.placed[0]}-{case.placed[1]}")
def test_where_a_prefill_goes_and_why(case: Case) -> None:
    decision = route(case)
    assert (decision.worker_id, decision.reason) == case.placed
    assert decision.placement == ("local" if decision.worker_id == "d" else "remote")
    assert decision.chosen in decision.options
    assert not decision.moves_session


def test_what_is_kept_is_neither_computed_nor_moved_again() -> None:
    (kept,) = route(Case(policy="remote", placed=("", ""), resident={"p1": 800})).options
    assert (kept.num_new_tokens, kept.num_moved_tokens) == (400, 200), "200 new ones go to the decode worker"
    (read,) = route(Case(policy="ampd", placed=("", ""))).options
    assert (read.num_new_tokens, read.num_moved_tokens) == (200, 1_200), "the history is read from the decode worker"
    (again,) = route(Case(policy="remote", placed=("", ""))).options
    assert (again.num_new_tokens, again.num_moved_tokens) == (1_200, 200), "no KV back from decode: computed again"


# ---------------------------------------------------------------------------------- options


def test_options_replace_fields_at_any_depth_and_leave_the_policy_alone() -> None:
    before = find_policy("ampd")
    changed = with_options(
        before, {"routing.alpha": 0.3, "routing.chunk.chunk_tokens": "1024", "order.window": "5", "stages": "true"}
    )
    assert (changed.routing.alpha, changed.chunk.chunk_tokens, changed.order.window, changed.stages) == (
        0.3,
        1_024,
        5,
        True,
    )
    assert changed.routing.beta == before.routing.beta
    assert before is find_policy("ampd")
    assert (before.routing.alpha, before.order.window, before.stages) == (0.8, 3, False)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"routing.gamma": 0.5}, "routing.gamma"),
        ({"nothing": 1}, "nothing"),
        ({"routing.chunk.size": 1}, "routing.chunk.size"),
        ({"routing.alpha": "high"}, "routing.alpha=high: a float is needed"),
        ({"order.window": "three"}, "order.window=three: a int is needed"),
        ({"order.window": 0}, "order.window: window must be in"),
        ({"order.aged_every": "0"}, "aged_every"),
        ({"stages": "maybe"}, "stages=maybe: a bool is needed"),
        ({"route": "remote"}, "route cannot be given as text"),
    ],
)
def test_a_bad_option_is_refused_by_name(options: Mapping[str, Any], named: str) -> None:
    with pytest.raises(AmpdError, match=named) as refused:
        with_options(find_policy("ampd"), options)
    assert refused.value.code == ErrorCode.INVALID_REQUEST


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(AmpdError, match="choose one of colocated, continuum, remote, local, threshold, ampd, adaptive"):
        find_policy("greedy")
    with pytest.raises(AmpdError, match="choose one of marginal_routing, delay_price"):
        switch_off(find_policy("adaptive"), "everything")


@pytest.mark.parametrize("part", PARTS)
def test_switching_a_part_off_changes_what_it_names_and_nothing_else(part: str) -> None:
    adaptive = find_policy("adaptive")
    without = switch_off(adaptive, part)
    changed = {
        one.name for one in fields(SchedulingPolicy) if getattr(adaptive, one.name) != getattr(without, one.name)
    }
    assert changed == {path.split(".")[0] for path in PARTS[part]}
    assert switch_off(without, part) == without


def test_every_policy_is_found_by_its_name() -> None:
    assert [find_policy(name).name for name in POLICIES] == list(POLICIES)
    assert [name for name, policy in POLICIES.items() if policy.uses_windows] == ["ampd"]
