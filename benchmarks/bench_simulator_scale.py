"""How long the simulator takes: an hour of 32 GPUs, 1,000 workers, and its growth with the number of sessions.

    python benchmarks/bench_simulator_scale.py --out scale.json --plot scale.png

    hour       one simulated hour of 32 H100 (16 workers of two) at 10 sessions a second
    workers    1,000 workers and 100,000 sessions, at the same load a worker
    growth     the hour's cluster at the hour's rate, with more and more sessions; the plot's reference is n log n
               through the first point

The trace is synthetic, fitted to ToolBench (loadgen/synth.py), Poisson arrivals. Times are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from loadgen.plan import PlannedSession, make_plan
from loadgen.synth import synthesise
from planner.simulator.cluster import Cluster, WorkerGroup
from planner.simulator.outcome import summarise
from planner.simulator.simulation import Simulation
from shared.core.policies import POLICIES, find_policy
from shared.messages import Slo
from shared.profile_files import load_profile

RATE = 10.0  # sessions a second on NUM_WORKERS workers
NUM_WORKERS = 16
HOUR_S = 3_600.0
HOUR_TARGET_S = 60.0
SLO = Slo(ttft_s=1.0, itl_s=0.05)
GROWTH = (1_000, 3_000, 9_000, 27_000, 81_000)


def plan_sessions(num_sessions: int, rate: float) -> tuple[PlannedSession, ...]:
    return make_plan(synthesise("toolbench", num_sessions, 0), rate=rate, arrivals="poisson", seed=0).sessions


def make_cluster(num_workers: int, policy: str) -> Cluster:
    """Workers of two devices; half of them for prefill where the policy knows no other way."""
    groups: tuple[WorkerGroup, ...] = (WorkerGroup(role="both", count=num_workers, parallel_degree=2),)
    if policy in ("remote", "local", "threshold", "ampd"):
        half = num_workers // 2
        groups = (
            WorkerGroup(role="prefill", count=half, parallel_degree=2),
            WorkerGroup(role="decode", count=num_workers - half, parallel_degree=2),
        )
    return Cluster(profile=load_profile("h100-qwen3-32b"), groups=groups)


def run_once(policy: str, num_workers: int, num_sessions: int, rate: float) -> dict[str, Any]:
    """Plan and simulate; only the simulation is timed."""
    sessions = plan_sessions(num_sessions, rate)
    simulation = Simulation(make_cluster(num_workers, policy), find_policy(policy), sessions, SLO)
    started = time.thread_time()
    result = simulation.run()
    took_s = time.thread_time() - started
    outcome = summarise(result, SLO)
    return {
        "workers": num_workers,
        "sessions": num_sessions,
        "rounds": len(result.rounds),
        "simulated_s": round(result.end_s, 1),
        "seconds": round(took_s, 3),
        "events": result.counters.events,
        "us_per_round": round(took_s / max(1, len(result.rounds)) * 1e6, 1),
        "attainment": round(outcome.attainment, 4),
        "unfinished": len(result.unfinished),
        "max_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def measure_growth(policy: str, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = [run_once(policy, NUM_WORKERS, num_sessions, RATE) for num_sessions in sizes]
    first = rows[0]
    for row in rows:
        row["n_log_n_seconds"] = round(first["seconds"] * _n_log_n(row["sessions"]) / _n_log_n(first["sessions"]), 3)
    return rows


def _n_log_n(n: int) -> float:
    return n * math.log(n)


def plot_growth(rows: list[dict[str, Any]], policy: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.0, 4.2))
    sizes = [row["sessions"] for row in rows]
    axes.loglog(sizes, [row["seconds"] for row in rows], marker="o", label=f"measured, {policy}")
    axes.loglog(sizes, [row["n_log_n_seconds"] for row in rows], linestyle="--", color="gray", label="n log n")
    axes.set_xlabel("sessions")
    axes.set_ylabel("CPU seconds to simulate")
    axes.set_title(f"Simulator: {NUM_WORKERS} workers, {RATE:g} sessions/s")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def show(document: dict[str, Any]) -> None:
    table = Table(title=f"Simulator, policy {document['policy']}")
    columns = ("workers", "sessions", "rounds", "simulated_s", "seconds", "us_per_round", "events", "max_rss_mb")
    for column in ("run", *columns):
        table.add_column(column, justify="left" if column == "run" else "right")
    rows: list[tuple[str, dict[str, Any]]] = [
        (name, document[name]) for name in ("hour", "workers") if name in document
    ]
    rows += [("growth", row) for row in document.get("growth", [])]
    for name, row in rows:
        table.add_row(name, *(f"{row[column]:,}" for column in columns))
    console = Console(stderr=True, width=120)
    console.print(table)
    console.print(document["machine"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here; default: standard output")
    parser.add_argument("--plot", type=Path, help="write the plot of the growth here (PNG)")
    parser.add_argument("--policy", default="adaptive", choices=sorted(POLICIES), help="default: adaptive")
    parser.add_argument("--parts", default="hour,workers,growth", help="which of them (default: all three)")
    parser.add_argument("--sessions", type=int, default=100_000, help="of the 1,000 workers (default 100000)")
    parser.add_argument("--sizes", default=",".join(map(str, GROWTH)), help=f"of the growth (default {GROWTH})")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    document: dict[str, Any] = {"policy": args.policy, "rate": RATE}
    parts = args.parts.split(",")
    if "hour" in parts:
        document["hour"] = run_once(args.policy, NUM_WORKERS, int(HOUR_S * RATE), RATE)
        document["hour"]["target_s"] = HOUR_TARGET_S
        document["hour"]["met"] = document["hour"]["seconds"] < HOUR_TARGET_S
    if "workers" in parts:
        document["workers"] = run_once(args.policy, 1_000, args.sessions, RATE / NUM_WORKERS * 1_000)
    if "growth" in parts:
        document["growth"] = measure_growth(args.policy, tuple(int(size) for size in args.sizes.split(",")))
        if args.plot:
            plot_growth(document["growth"], args.policy, args.plot)
    document["machine"] = {
        "cpu": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    show(document)
    text = json.dumps(document, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
