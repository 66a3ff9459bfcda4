"""Regenerate results/scheduling: every policy at its own best, simulated on the traces, in tables, plots and JSON.

Each cell (profile x workload) is one JSON file under --out/cells; a file that is there is not made again, so that an
interrupted run goes on where it was. The whole takes some hours on two cores; --profiles and --workloads choose less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.bench_output import read_commit
from benchmarks.scheduling.ablation import run_ablation, run_sensitivity
from benchmarks.scheduling.cells import MODELS, POLICY_NAMES, WORKLOADS, Candidate, Cell, make_candidate, make_cell
from benchmarks.scheduling.grid import run_grid
from benchmarks.scheduling.metrics import run_metrics, run_slo_sweep
from benchmarks.scheduling.report import write_report
from benchmarks.scheduling.search import find_best
from planner.simulator.cluster import WorkerGroup

EXAMPLE = "example: python -m benchmarks.scheduling --out results/scheduling --profiles h100-qwen3-32b"
DEEP = ("h100-qwen3-32b",)  # profiles with every part; the others have what their part list says
PARTS_OF_GPU = {"h100": ("search", "grid"), "h200": ("search",), "h20": ("search",)}
DEEP_PARTS = ("search", "grid", "metrics", "slo_sweep", "ablation", "sensitivity")


def main() -> int:
    args = build_parser().parse_args()
    cells = args.out / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    if not args.traces.is_dir():
        sys.exit(f"no traces at {args.traces}: give the folder of the trace files with --traces")
    if not args.report_only:
        run_all(args, cells)
    write_report(cells, args.out)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scheduling", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    everything = [f"{gpu}-{model}" for gpu in PARTS_OF_GPU for model in MODELS]
    parser.add_argument("--out", type=Path, default=Path("results/scheduling"))
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"), help="(default: %(default)s)")
    parser.add_argument("--profiles", nargs="+", default=everything, metavar="P")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS, metavar="W")
    parser.add_argument("--parts", nargs="+", choices=DEEP_PARTS, help="only these parts (default: as each cell has)")
    parser.add_argument("--policies", nargs="+", default=list(POLICY_NAMES), choices=POLICY_NAMES, metavar="N",
                        help="search only these (the other parts compare all that have been searched)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--report-only", action="store_true", help="make tables and plots of what is there")
    return parser


def run_all(args: argparse.Namespace, cells: Path) -> None:
    console = Console(stderr=True)
    tasks = [(profile, workload) for profile in args.profiles for workload in args.workloads]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ProcessPoolExecutor(args.jobs) as pool:
        bar = progress.add_task("cells", total=len(tasks))
        futures = {
            pool.submit(
                run_cell, profile, workload, args.traces, cells, args.parts, args.policies
            ): f"{profile}.{workload}"
            for profile, workload in tasks
        }
        for future in as_completed(futures):
            seconds = future.result()
            progress.advance(bar)
            console.print(f"{futures[future]}: {seconds:.0f} s")


def run_cell(
    profile: str, workload: str, traces: Path, cells: Path, only: list[str] | None, policies: list[str]
) -> float:
    """Make the parts of a cell that its file lacks; each is written as soon as it is there."""
    started = time.monotonic()
    cell = make_cell(profile, workload, traces)
    path = cells / f"{cell.name}.json"
    described = describe_cell(cell)
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else described
    if any(content[part] != described[part] for part in ("slo", "run")):
        sys.exit(f"{path} is of other objectives or runs than today's: remove it, and it is made again")
    wanted = DEEP_PARTS if profile in DEEP else PARTS_OF_GPU[profile.split("-")[0]]
    for part in wanted:
        if part in content and part != "search":
            continue
        if only is not None and part not in only and part != "search":
            continue
        match part:
            case "search":
                search_policies(cell, content, path, policies)
            case "grid":
                content[part] = run_grid(cell, read_bests(cell, content))
            case "metrics":
                content[part] = run_metrics(cell, read_bests(cell, content))
            case "slo_sweep":
                content[part] = run_slo_sweep(cell, read_bests(cell, content), traces)
            case "ablation":
                adaptive, goodput = read_bests(cell, content)["adaptive"]
                content[part] = run_ablation(cell, adaptive, goodput)
            case "sensitivity":
                content[part] = run_sensitivity(cell, read_bests(cell, content))
        if part != "search":
            content.setdefault("commits", {})[part] = read_commit()
        save(path, content)
    return time.monotonic() - started


def search_policies(cell: Cell, content: dict[str, Any], path: Path, policies: list[str]) -> None:
    for policy in policies:
        if policy not in content["search"]:
            content["search"][policy] = find_best(cell, policy).as_dict()
            content.setdefault("commits", {})[policy] = read_commit()
            save(path, content)
    search = content["search"]
    if {"ampd-best", "ampd-split"} <= search.keys() and _goodput(search["ampd-split"]) > _goodput(search["ampd-best"]):
        search["ampd-best"] = search["ampd-split"]  # whose clusters are among its own: the race has missed it
        save(path, content)


def _goodput(found: dict[str, Any]) -> float:
    return float(found["goodput_sessions_per_s"])


def read_bests(cell: Cell, content: dict[str, Any]) -> dict[str, tuple[Candidate, float]]:
    bests: dict[str, tuple[Candidate, float]] = {}
    for policy, found in content["search"].items():
        groups = tuple(WorkerGroup(role=role, count=n, parallel_degree=degree) for role, n, degree in found["groups"])
        candidate = make_candidate(cell, policy, groups, found["options"])
        bests[policy] = (candidate, found["goodput_sessions_per_s"])
    return bests


def describe_cell(cell: Cell) -> dict[str, Any]:
    workload = cell.workload
    return {
        "profile": cell.profile.name,
        "workload": cell.workload_name,
        "slo": {"ttft_s": cell.slo.ttft_s, "itl_s": cell.slo.itl_s},
        "run": {
            "duration_s": workload.duration,
            "warm_up_s": cell.warm_up_s,
            "max_context": workload.max_context,
            "max_delay_s": workload.max_delay,
            "unknown_delay_s": workload.unknown_delay,
        },
        "kind": "simulated",
        "commit": read_commit(),
        "machine": {"python": platform.python_version(), "cores": os.cpu_count()},
        "search": {},
    }


def save(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
