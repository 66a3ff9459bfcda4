"""Seconds until there is a plan: 64 GPUs of one type, 1,024 of two."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, get_args

from loadgen.plan import make_plan
from loadgen.synth import synthesise
from planner.planning.plans import solve_plan
from planner.planning.problem import make_problem
from planner.planning.program import Objective, PlanProblem
from planner.planning.workload_model import model_sessions
from shared.messages import Slo
from shared.profile_files import load_profile

MODEL = "qwen3-32b"
SIZES = (({"h100": 64}, 1.0), ({"h100": 512, "h200": 512}, 10.0))  # (GPUs, target in seconds)
SLO = Slo(ttft_s=0.5, itl_s=0.05)
NUM_SESSIONS = 2_000
RATE_SHARE = 0.7  # of the goodput rate, where the objective is at a rate
REPEATS = 3


def run_scaling(on_progress: Callable[[], None]) -> dict[str, Any]:
    """Medians of REPEATS, with building the program; what the workload is measured with is not counted."""
    rows = []
    for gpus, target_s in SIZES:
        problem = make_scaled(gpus)
        for objective in get_args(Objective):
            rows.append(measure_solve(problem, objective, target_s))
            on_progress()
    return {
        "trace": "synthetic, fitted to HotpotQA",
        "model": MODEL,
        "rows": rows,
        "met": all(row["met"] for row in rows),
    }


def make_scaled(gpus: dict[str, int]) -> PlanProblem:
    """At RATE_SHARE of what the GPUs sustain."""
    sessions = make_plan(synthesise("hotpotqa", NUM_SESSIONS, 0), rate=1.0, arrivals="poisson", seed=0).sessions
    profiles = {gpu_type: load_profile(f"{gpu_type}-{MODEL}") for gpu_type in gpus}
    most = solve_plan(make_problem(profiles, gpus, model_sessions(sessions, 1.0), SLO), "goodput")
    assert most is not None, "the GPUs serve some rate"
    return make_problem(profiles, gpus, model_sessions(sessions, RATE_SHARE * most.rate), SLO)


def measure_solve(problem: PlanProblem, objective: Objective, target_s: float) -> dict[str, Any]:
    seconds, cpu_seconds = [], []
    for _ in range(REPEATS):
        started, cpu_started = time.monotonic(), time.process_time()
        plan = solve_plan(problem, objective)
        seconds.append(time.monotonic() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    assert plan is not None, "the problem's rate can be served"
    return {
        "gpus": dict(problem.gpus),
        "objective": objective,
        "seconds": round(statistics.median(seconds), 3),
        "least_s": round(min(seconds), 3),
        "most_s": round(max(seconds), 3),
        "cpu_s": round(statistics.median(cpu_seconds), 3),
        "target_s": target_s,
        "met": statistics.median(seconds) <= target_s,
        "status": plan.solution.status,
        "gap": plan.solution.gap,
        "plan": plan.describe(),
    }
