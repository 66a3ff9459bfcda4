"""When re-planning must keep still: an hour of a stationary load, and an hour of one that comes and goes."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.replanning.shifts import (
    CHAT,
    NUM_BEFORE,
    attainment_by_time,
    count_lost,
    describe_proposal,
    simulate_replanned,
)
from benchmarks.replanning.traffic import Phase, Traffic, count_decoding, make_sessions, make_traffic_problem
from planner.replanning.roles import measure_capacity

HOUR_S = 3_600.0
STEADY_SHARE = 0.8  # of the capacity of the roles
HALF_PERIOD_S = 300.0
PERIODIC = (Traffic(CHAT, 4.5), Traffic(CHAT, 4.5, input_factor=2.0))


def run_steady(policy: str, traces: Path, seed: int, duration_s: float = HOUR_S) -> dict[str, Any]:
    """`met`: no role changed."""
    capacity = measure_capacity(make_traffic_problem(Traffic(CHAT, 1.0), traces), count_decoding(NUM_BEFORE))
    traffic = Traffic(CHAT, STEADY_SHARE * capacity)
    row = _run([Phase(traffic, 0.0, duration_s)], policy, traces, seed)
    return {"traffic": asdict(traffic), "share": STEADY_SHARE, **row, "met": row["role_changes"] == 0}


def run_periodic(policy: str, traces: Path, seed: int, duration_s: float = HOUR_S) -> dict[str, Any]:
    """`met`: no worker changed more than once."""
    num_phases = round(duration_s / HALF_PERIOD_S)
    phases = [Phase(PERIODIC[i % 2], i * HALF_PERIOD_S, (i + 1) * HALF_PERIOD_S) for i in range(num_phases)]
    row = _run(phases, policy, traces, seed)
    return {
        "traffic": [asdict(one) for one in PERIODIC],
        "half_period_s": HALF_PERIOD_S,
        **row,
        "met": row["most_changes_of_a_worker"] <= 1,
    }


def _run(phases: list[Phase], policy: str, traces: Path, seed: int) -> dict[str, Any]:
    started = time.monotonic()
    result, proposals = simulate_replanned(make_sessions(phases, traces, seed), policy, traces)
    changed = Counter(change.worker_id for _, one in proposals for change in one.changes)
    return {
        "policy": policy,
        "duration_s": phases[-1].until_s,
        "num_rounds": len(result.rounds),
        "lost": count_lost(result),
        "role_changes": result.counters.role_changes,
        "most_changes_of_a_worker": max(changed.values(), default=0),
        "changes": [describe_proposal(at, one) for at, one in proposals],
        "attainment": attainment_by_time(result, phases[-1].until_s),
        "seconds": round(time.monotonic() - started, 1),
    }
