"""Our plan against others for the same GPUs: goodput in simulation, with the same policy, judged by the same seed."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from benchmarks.planning.judge import COARSE, Race, describe_workers, judge, plan_and_choose
from benchmarks.planning.packing import as_plan
from benchmarks.planning.rules import draw_workers, plan_bottleneck, split_by_ratio, split_evenly
from benchmarks.planning.settings import Prepared, Spec, prepare
from planner.planning.plans import SolvedPlan, WorkerCount

NAMES = ("ours", "program's best", "min-bottleneck", "even split", "ratio rule", "random search")


def compare_baselines(spec: Spec, traces: Path, seed: int) -> dict[str, Any]:
    """CPU time is what random search gets as much of as our plan took, solving and simulating."""
    prepared = prepare(spec, traces)
    started = time.thread_time()
    plans, simulated = plan_and_choose(prepared.problem, prepared.setting)
    budget_s = time.thread_time() - started
    ours = simulated[0].plan
    start = simulated[0].goodput_sessions_per_s or plans[0].rate
    found, num_drawn = search_randomly(prepared, plans[0].rate, budget_s, seed)
    candidates: dict[str, SolvedPlan | None] = {
        "ours": ours,
        "program's best": plans[0],
        "min-bottleneck": plan_bottleneck(prepared.problem, plans[0].rate),
        "even split": as_plan(split_evenly(prepared.problem)),
        "ratio rule": as_plan(split_by_ratio(prepared.problem)),
        "random search": found,
    }
    judged: dict[tuple[WorkerCount, ...], float] = {}  # alike plans once
    rows = {}
    for name, plan in candidates.items():
        if plan is None:
            rows[name] = {"plan": None, "gpus": 0, "goodput": 0.0}
            continue
        key = tuple(sorted(plan.workers))
        judged[key] = judged[key] if key in judged else judge(prepared.setting, plan, start)
        rows[name] = {**describe_workers(plan), "goodput": judged[key]}
    return {
        "setting": spec.name,
        "slo": {"ttft_s": prepared.slo.ttft_s, "itl_s": prepared.slo.itl_s},
        "plans": rows,
        "search_cpu_s": round(budget_s, 1),
        "num_drawn": num_drawn,
    }


def search_randomly(prepared: Prepared, start: float, budget_s: float, seed: int) -> tuple[SolvedPlan | None, int]:
    """(the best of as many random plans as there is time to simulate, how many those were). The program's rate to start
    at is given to it; without, the first plan takes all of the time."""
    draws = random.Random(seed)
    race = Race(prepared.setting, start, tolerance=COARSE)
    until = time.thread_time() + budget_s
    while time.thread_time() < until:
        race.enter(draw_workers(prepared.problem, draws))
    return race.best, race.num_entered


def summarise_baselines(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Goodputs over ours: the geometric mean, of the settings where both serve something."""
    ratios: dict[str, float | None] = {}
    for name in NAMES[1:]:
        product, number = 1.0, 0
        for row in rows:
            ours, theirs = row["plans"]["ours"]["goodput"], row["plans"][name]["goodput"]
            if ours and theirs:
                product, number = product * theirs / ours, number + 1
        ratios[name] = product ** (1 / number) if number else None
    best = [max(plan["goodput"] for plan in row["plans"].values()) for row in rows]
    return {
        "rows": rows,
        "over_ours": ratios,
        "least_ours_over_best": min(
            (row["plans"]["ours"]["goodput"] / most for row, most in zip(rows, best, strict=True) if most), default=None
        ),
    }
