"""How good are the plans of `ampd plan`, and how long do they take? In parts.

    optimality   the program's optimum against brute force, on random instances of few GPUs; all three objectives
    scaling      seconds until there is a plan: 64 GPUs of one type (target 1 s), 1,024 of two (target 10 s)
    prediction   attainment and goodput that are predicted against simulated ones: 12 settings, policy `adaptive`
    baselines    simulated goodput of our plans, of the paper's objective, of rules of thumb and of random search with
                 as much CPU time, for the same GPUs, policy and arrivals
    exhaustive   on 4 to 6 GPUs every plan is simulated: goodput of the chosen one over the best

The first two take minutes, and are the default; the others simulate the traces in --traces, for hours on one core. What
a part has so far is written to --out after each setting. Exit status 1: the program's optimum is not the optimum, or
with --check a target was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is not installed

from benchmarks.bench_output import describe_machine, read_commit
from benchmarks.planning.baselines import compare_baselines, summarise_baselines
from benchmarks.planning.exhaustive import compare_exhaustively
from benchmarks.planning.optimality import run_optimality
from benchmarks.planning.prediction import compare_prediction, summarise_prediction
from benchmarks.planning.scaling import run_scaling
from benchmarks.planning.settings import SMALL_SPECS, SPECS, Spec, select
from benchmarks.planning.tables import show_part

EXAMPLE = """examples:
  python benchmarks/bench_planning.py --out planning.json
  python benchmarks/bench_planning.py --parts prediction --settings qwen3-32b.hotpotqa --out prediction.json"""
PARTS = ("optimality", "scaling", "prediction", "baselines", "exhaustive")
SPECS_OF = {"prediction": SPECS, "baselines": SPECS, "exhaustive": SMALL_SPECS}  # the parts that simulate
NUM_SOLVES = 6

Row = dict[str, Any]


def main() -> int:
    args = parse_arguments()
    parts = args.parts.split(",")
    if any(part in SPECS_OF for part in parts) and not args.traces.is_dir():
        sys.exit(f"no traces at {args.traces}: give the folder of the trace files with --traces")
    for part in parts:
        if part in SPECS_OF and not select(SPECS_OF[part], args.settings):
            sys.exit(f"--settings: {part} has {', '.join(one.name for one in SPECS_OF[part])}")
    console = Console(stderr=True, width=150)
    document: dict[str, Any] = {"seed": args.seed, "commit": read_commit(), "machine": describe_machine()}

    def save(part: str, content: dict[str, Any]) -> None:
        document[part] = content
        if args.out:
            args.out.write_text(json.dumps(document, indent=1) + "\n")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for part in parts:
            run_part(part, args, progress, partial(save, part))
    for part in parts:
        show_part(console, part, document[part])
    if not args.out:
        print(json.dumps(document, indent=1))
    is_wrong = not document.get("optimality", {}).get("met", True)
    is_slow = not document.get("scaling", {}).get("met", True)
    return 1 if is_wrong or (args.check and is_slow) else 0


def run_part(part: str, args: argparse.Namespace, progress: Progress, save: Callable[[dict[str, Any]], None]) -> None:
    match part:
        case "optimality":
            bar = progress.add_task(part, total=args.instances)
            save(run_optimality(args.instances, args.seed, args.max_gpus, lambda: progress.advance(bar)))
        case "scaling":
            bar = progress.add_task(part, total=NUM_SOLVES)
            save(run_scaling(lambda: progress.advance(bar)))
        case "prediction":
            compare = partial(compare_prediction, traces=args.traces)
            run_settings(part, compare, args, progress, lambda rows: save(summarise_prediction(rows)))
        case "baselines":
            judge = partial(compare_baselines, traces=args.traces, seed=args.seed)
            run_settings(part, judge, args, progress, lambda rows: save(summarise_baselines(rows)))
        case "exhaustive":
            search = partial(compare_exhaustively, traces=args.traces)
            run_settings(part, search, args, progress, lambda rows: save({"rows": rows}))


def run_settings(
    part: str,
    compare: Callable[[Spec], Row],
    args: argparse.Namespace,
    progress: Progress,
    save: Callable[[list[Row]], None],
) -> None:
    """One setting a process; the rows in the order of the settings, whichever is done first."""
    chosen = select(SPECS_OF[part], args.settings)
    bar = progress.add_task(part, total=len(chosen))
    rows: dict[Spec, Row] = {}
    with ProcessPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(compare, spec): spec for spec in chosen}
        for future in as_completed(futures):
            rows[futures[future]] = future.result()
            save([rows[spec] for spec in chosen if spec in rows])
            progress.advance(bar)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="write the JSON here; default: standard output")
    add("--parts", default="optimality,scaling", type=read_parts, help="with commas, or `all` (default: %(default)s)")
    add("--traces", type=Path, default=Path("../shared/traces"), help="(default: %(default)s)")
    add("--instances", type=int, default=500, help="of optimality (default: %(default)s)")
    add("--max-gpus", type=int, default=12, help="of an instance (default: %(default)s)")
    add("--settings", nargs="+", default=[], metavar="NAME", help="only those whose name contains one of these")
    add("--seed", type=int, default=0, help="of instances and of random search (default: %(default)s)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes that simulate (default: one a core)")
    add("--check", action="store_true", help="exit with 1 when a target of scaling is missed")
    return parser.parse_args()


def read_parts(text: str) -> str:
    parts = PARTS if text == "all" else tuple(text.split(","))
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}: there are {', '.join(PARTS)}")
    return ",".join(parts)


if __name__ == "__main__":
    sys.exit(main())
