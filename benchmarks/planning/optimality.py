"""Is the program's optimum the optimum? Against brute force, on random instances of few GPUs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.planning.brute_force import FixedWorkers, Optimum, search_at_rate, search_goodput
from benchmarks.planning.instances import Instance, draw_instance
from benchmarks.planning.packing import does_fit
from planner.planning.plans import NO_RATE, WORTH, SolvedPlan, solve_plan

LIMIT = 1e-3  # relative difference, above which it fails


def compare_instance(number: int, seed: int, max_gpus: int) -> dict[str, Any]:
    """Relative differences of the three objectives, and what is wrong with a plan, if anything."""
    instance = draw_instance(number, seed, max_gpus)
    started = time.thread_time()
    goodput, rates = search_goodput(instance.problem)
    is_feasible = goodput > NO_RATE
    share = random.Random(f"{seed}/{number}/rate").uniform(0.1, 0.95)
    problem = replace(instance.problem, rate=share * goodput if is_feasible else 10.0)
    optimum = search_at_rate(problem, rates)
    brute_force_s = time.thread_time() - started
    started = time.thread_time()
    most = solve_plan(problem, "goodput")
    fewest = solve_plan(problem, "min-gpus")
    earliest = solve_plan(problem, "min-p95")
    differences = {
        "goodput": _differ(None if most is None else -most.objective, goodput if is_feasible else None),
        "min-gpus": _differ(None if fewest is None else fewest.objective, optimum.fewest_gpus),
        "min-p95": _differ(None if earliest is None else earliest.objective, optimum.least_latency_s),
    }
    return {
        "instance": number,
        "description": instance.description,
        "plans": optimum.num_plans,
        "is_feasible": is_feasible,
        "differences": differences,
        "faults": check_plans(instance, optimum, [("goodput", most), ("min-gpus", fewest), ("min-p95", earliest)]),
        "program_s": time.thread_time() - started,
        "brute_force_s": brute_force_s,
    }


def _differ(ours: float | None, theirs: float | None) -> float:
    """Infinite where only one of them has a plan."""
    if ours is None or theirs is None:
        return 0.0 if ours is theirs else float("inf")
    return abs(ours - theirs) / max(abs(theirs), 1e-12)


def check_plans(instance: Instance, optimum: Optimum, plans: list[tuple[str, SolvedPlan | None]]) -> list[str]:
    """The workers that are handed out: they fit, and really serve what they are said to."""
    faults = []
    fixed = FixedWorkers(instance.problem)
    for name, plan in plans:
        if plan is None:
            continue
        if not does_fit(instance.problem, plan.workers):
            faults.append(f"{name}: {plan.describe()} does not fit the nodes")
        served = fixed.max_rate(plan.workers)
        if served < plan.rate * (1.0 - LIMIT):
            faults.append(f"{name}: {plan.describe()} serves {served:g}, said {plan.rate:g}")
        if name == "goodput" and served < optimum.goodput * (1.0 - WORTH - LIMIT):
            faults.append(f"{name}: {plan.describe()} serves {served:g} of {optimum.goodput:g}")
        if name == "min-gpus" and optimum.fewest_gpus is not None and plan.num_gpus > optimum.fewest_gpus:
            faults.append(f"{name}: {plan.num_gpus} GPUs of {optimum.fewest_gpus}")
    return faults


def summarise_optimality(rows: list[dict[str, Any]]) -> dict[str, Any]:
    objectives = ("goodput", "min-gpus", "min-p95")
    largest = {name: max((row["differences"][name] for row in rows), default=0.0) for name in objectives}
    faults = [f"instance {row['instance']}: {fault}" for row in rows for fault in row["faults"]]
    return {
        "instances": len(rows),
        "feasible": sum(row["is_feasible"] for row in rows),
        "plans_tried": sum(row["plans"] for row in rows),
        "largest_difference": largest,
        "limit": LIMIT,
        "faults": faults,
        "program_s": round(sum(row["program_s"] for row in rows), 2),
        "brute_force_s": round(sum(row["brute_force_s"] for row in rows), 2),
        "met": not faults and max(largest.values()) <= LIMIT,
    }


def run_optimality(num_instances: int, seed: int, max_gpus: int, on_progress: Callable[[], None]) -> dict[str, Any]:
    rows = []
    for number in range(num_instances):
        rows.append(compare_instance(number, seed, max_gpus))
        on_progress()
    worst = sorted(rows, key=lambda row: -max(row["differences"].values()))[:5]
    return {**summarise_optimality(rows), "seed": seed, "worst": worst}
