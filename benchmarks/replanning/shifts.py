"""Traffic that shifts, simulated three times: roles as they were, re-planned, and from the shift on those of a planner
that knew the second traffic."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.replanning.recovery import find_recovery, mean_after, share_by_time
from benchmarks.replanning.traffic import (
    KIND,
    NUM_WORKERS,
    SLO,
    Phase,
    Traffic,
    count_decoding,
    load_cell_profile,
    make_cluster,
    make_sessions,
    make_traffic_problem,
)
from loadgen.plan import PlannedSession
from planner.replanning.replanner import Proposal
from planner.replanning.roles import assess_roles, measure_capacity
from planner.replanning.simulated import SimulatedReplanner
from planner.simulator.outcome import attains
from planner.simulator.simulation import Result, Simulation
from shared.core.policies import find_policy

BUCKET_S = 60.0
REFUSED = "overloaded"  # by admission
NUM_BEFORE = 6  # of the workers that decode when a run begins


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """From `before` to `after` at `at_s`, and back at `back_s` if that is not the end. `why` says why these rates."""

    name: str
    before: Traffic
    after: Traffic
    at_s: float
    until_s: float
    back_s: float | None = None
    why: str

    @property
    def phases(self) -> list[Phase]:
        ends = self.back_s or self.until_s
        phases = [Phase(self.before, 0.0, self.at_s), Phase(self.after, self.at_s, ends)]
        return phases if self.back_s is None else [*phases, Phase(self.before, ends, self.until_s)]


CHAT = "mooncake"
SHIFTS = (
    Shift(
        name="chat to agent",
        before=Traffic(CHAT, 4.5),
        after=Traffic("claude_code", 0.095),
        at_s=300.0,
        until_s=2_700.0,
        why="0.6 of the first roles' capacity of chat, and more agents than they hold; the best roles hold these",
    ),
    Shift(
        name="context doubled",
        before=Traffic(CHAT, 4.5),
        after=Traffic(CHAT, 4.5, input_factor=2.0),
        at_s=300.0,
        until_s=900.0,
        why="the same sessions/s: 0.6 of the first roles' capacity before, more than all of it after",
    ),
    Shift(
        name="burst",
        before=Traffic(CHAT, 3.5),
        after=Traffic(CHAT, 14.0),
        at_s=300.0,
        back_s=480.0,
        until_s=1_200.0,
        why="four times the rate for three minutes: nearly twice the first roles' capacity, all of the best ones'",
    ),
)


def run_shift(shift: Shift, policy: str, traces: Path, seed: int) -> dict[str, Any]:
    started = time.monotonic()
    sessions = make_sessions(shift.phases, traces, seed)
    problem = make_traffic_problem(shift.after, traces)
    assessment = assess_roles(problem, count_decoding(NUM_BEFORE))
    wanted = assessment.decoding[KIND]
    runs = {
        "static": simulate(sessions, policy, traces),
        "clairvoyant": simulate(sessions, policy, traces, become=wanted, at_s=shift.at_s, back_s=shift.back_s),
    }
    replanned, proposals = simulate_replanned(sessions, policy, traces)
    runs["replanned"] = replanned
    buckets = {name: attainment_by_time(result, shift.until_s) for name, result in runs.items()}
    lost = {name: count_lost(result) for name, result in runs.items()}
    recovered_s = find_recovery(buckets["replanned"], buckets["clairvoyant"], shift.at_s, BUCKET_S)
    first = measure_capacity(make_traffic_problem(shift.before, traces), count_decoding(NUM_BEFORE))
    return {
        "shift": shift.name,
        "policy": policy,
        "slo": {"ttft_s": SLO.ttft_s, "itl_s": SLO.itl_s},
        "before": asdict(shift.before),
        "after": asdict(shift.after),
        "at_s": shift.at_s,
        "back_s": shift.back_s,
        "until_s": shift.until_s,
        "why": shift.why,
        "program": {
            "load_before": shift.before.rate / first,
            "load_after_static": shift.after.rate / assessment.now,
            "load_after_clairvoyant": shift.after.rate / assessment.proposed,
        },
        "decoding": {"first": NUM_BEFORE, "clairvoyant": wanted, "workers": NUM_WORKERS},
        "num_rounds": len(runs["replanned"].rounds),
        "lost": lost,
        "refused": {name: count_refused(result) for name, result in runs.items()},
        "role_changes": runs["replanned"].counters.role_changes,
        "changes": [describe_proposal(at, one) for at, one in proposals],
        "attainment_after": {name: mean_after(one, shift.at_s, BUCKET_S) for name, one in buckets.items()},
        "recovered_after_s": recovered_s,
        "met": recovered_s is not None and lost["replanned"] == 0,
        "bucket_s": BUCKET_S,
        "attainment": buckets,
        "seconds": round(time.monotonic() - started, 1),
    }


def simulate(
    sessions: Sequence[PlannedSession],
    policy: str,
    traces: Path,
    *,
    become: int = NUM_BEFORE,
    at_s: float = 0.0,
    back_s: float | None = None,
) -> Result:
    """`become`: so many workers decode from `at_s` on, until `back_s`."""
    simulation = _build(sessions, policy, traces)
    prefill = [worker.load.worker_id for worker in simulation.workers if worker.load.role == "prefill"]
    both = [worker.load.worker_id for worker in simulation.workers if worker.load.role != "prefill"]
    changing = prefill[: max(0, become - NUM_BEFORE)]
    for worker_id in changing:
        simulation.change_role(worker_id, "both", at_s)
    for worker_id in both[: max(0, NUM_BEFORE - become)]:
        simulation.change_role(worker_id, "prefill", at_s)
    if back_s is not None:
        for worker_id in changing:
            simulation.change_role(worker_id, "prefill", back_s)
    return simulation.run()


def simulate_replanned(
    sessions: Sequence[PlannedSession], policy: str, traces: Path
) -> tuple[Result, list[tuple[float, Proposal]]]:
    simulation = _build(sessions, policy, traces)
    replanner = SimulatedReplanner(simulation, load_cell_profile(traces))
    return simulation.run(), replanner.proposals


def _build(sessions: Sequence[PlannedSession], policy: str, traces: Path) -> Simulation:
    cluster = make_cluster(load_cell_profile(traces), NUM_BEFORE)
    return Simulation(cluster, find_policy(policy), sessions, SLO)


def attainment_by_time(result: Result, until_s: float) -> list[float | None]:
    rounds = ((one.sent_at, not one.error and attains(one, SLO)) for one in result.rounds)
    return share_by_time(rounds, BUCKET_S, round(until_s / BUCKET_S))


def count_lost(result: Result) -> int:
    """Rounds that failed, or that were never sent because one before them had. What admission refuses is not lost: a
    first round that cannot be on time, of a session that is not begun."""
    begun = sum(not round_.error for round_ in result.rounds)
    refused = [round_ for round_ in result.rounds if round_.error == REFUSED]
    return result.num_offered - begun - sum(len(one.session.planned.rounds) - one.index for one in refused)


def count_refused(result: Result) -> int:
    return sum(round_.error == REFUSED for round_ in result.rounds)


def describe_proposal(at: float, proposal: Proposal) -> dict[str, Any]:
    return {
        "at_s": at,
        "reason": proposal.reason,
        "load": proposal.load,
        "workers": {change.worker_id: change.role for change in proposal.changes},
        "cost_s": sum(change.cost_s for change in proposal.changes),
    }
