"""What 32 GPUs sustain in each cell by the linear program of docs/planning.md, were they always busy: the yardstick
beside the simulated goodputs. Every round is computed, in steps within 0.9 of the ITL objective."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.scheduling.cells import MODELS, NUM_DEVICES, NUM_SLO_SESSIONS, WORKLOADS, make_cell
from planner.planning.plans import solve_plan
from planner.planning.program import PlanProblem
from planner.planning.worker_kinds import measure_kind, measure_load
from planner.planning.workload_model import model_sessions
from planner.simulator.scenario import plan_at

EXAMPLE = "example: python -m benchmarks.scheduling.capacity --out results/scheduling/capacity.json"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scheduling.capacity", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("results/scheduling/capacity.json"))
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"), help="(default: %(default)s)")
    parser.add_argument("--gpu", default="h100", help="(default: %(default)s)")
    args = parser.parse_args()
    cells = {}
    for model in MODELS:
        for workload in WORKLOADS:
            name, rate, plan = measure_capacity(args.gpu, model, workload, args.traces)
            cells[name] = {"capacity_sessions_per_s": rate, "plan": plan}
            print(f"{name:36s} {rate:10.4g} sessions/s  {plan}")
    args.out.write_text(
        json.dumps({"kind": "program, efficiency 1", "gpus": NUM_DEVICES, "cells": cells}, indent=1) + "\n"
    )
    return 0


def measure_capacity(gpu: str, model: str, workload_name: str, traces: Path) -> tuple[str, float, str]:
    """(cell, sessions per second, the plan that sustains them)."""
    cell = make_cell(f"{gpu}-{model}", workload_name, traces)
    sessions = plan_at(cell.workload, NUM_SLO_SESSIONS / (cell.workload.duration or 1.0), 0).sessions
    workload = model_sessions(sessions, 1.0)
    load = measure_load(workload, cell.slo)
    kinds = tuple(
        measure_kind(gpu, cell.profile, one.parallel_degree, workload, load, cell.slo) for one in cell.profile.degrees
    )
    problem = PlanProblem(kinds=kinds, load=load, gpus={gpu: NUM_DEVICES}, rate=1.0, efficiency=1.0)
    plan = solve_plan(problem, "goodput")
    return cell.name, -plan.objective if plan is not None else 0.0, plan.describe() if plan is not None else "none"


if __name__ == "__main__":
    raise SystemExit(main())
