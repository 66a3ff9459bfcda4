"""Does re-planning follow traffic that shifts, and keep still when it does not? In parts.

    simulated  32 GPUs as 16 workers. Chat turns into agents, contexts double, a burst comes and goes: attainment by the
               minute of roles as they were, re-planned, and of a planner that knew (`clairvoyant`)
    steady     an hour of a stationary load at 80 % of the roles' capacity: no role may change
    periodic   an hour of a load that alternates every five minutes: no worker may change more than once
    live       eight emulated workers, real services: outputs get longer; the planner is killed once; the same tokens

`live` takes minutes of a quiet machine, and is the default. The others simulate the traces in --traces, for minutes to
tens of minutes each. What a part has so far is written to --out. With --check the exit status is 1 when a target is
missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is not installed

from benchmarks.bench_output import describe_machine, read_commit
from benchmarks.replanning.calm import HOUR_S, run_periodic, run_steady
from benchmarks.replanning.live import LiveSettings, run_live
from benchmarks.replanning.shifts import SHIFTS, run_shift
from benchmarks.replanning.tables import show_part

EXAMPLE = """examples:
  python benchmarks/bench_replanning.py --out replanning.json
  python benchmarks/bench_replanning.py --parts simulated --shifts burst --policies adaptive --out burst.json"""
PARTS = ("simulated", "steady", "periodic", "live")
POLICIES = ("adaptive", "ampd")

Row = dict[str, Any]


def main() -> int:
    args = parse_arguments()
    parts = args.parts.split(",")
    if any(part != "live" for part in parts) and not args.traces.is_dir():
        sys.exit(f"no traces at {args.traces}: give the folder of the trace files with --traces")
    console = Console(stderr=True, width=150)
    document: Row = {"seed": args.seed, "commit": read_commit(), "machine": describe_machine()}

    def save(part: str, content: Row) -> None:
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
    return 1 if args.check and not all(document[part]["met"] for part in parts) else 0


def run_part(part: str, args: argparse.Namespace, progress: Progress, save: Callable[[Row], None]) -> None:
    match part:
        case "simulated":
            chosen = [shift for shift in SHIFTS if not args.shifts or any(text in shift.name for text in args.shifts)]
            bar = progress.add_task(part, total=len(chosen) * len(args.policies))
            rows: list[Row] = []
            for policy in args.policies:
                for shift in chosen:
                    rows.append(run_shift(shift, policy, args.traces, args.seed))
                    save({"rows": rows, "met": all(row["met"] for row in rows if row["policy"] == "adaptive")})
                    progress.advance(bar)
        case "steady" | "periodic":
            bar = progress.add_task(part, total=1)
            run = run_steady if part == "steady" else run_periodic
            save(run(args.policies[0], args.traces, args.seed, args.duration))
            progress.advance(bar)
        case "live":
            bar = progress.add_task(part, total=3)
            save(run_live(LiveSettings(after_s=args.live_seconds), lambda: progress.advance(bar)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="write the JSON here; default: standard output")
    add("--parts", default="live", type=read_parts, help="with commas, or `all` (default: %(default)s)")
    add("--traces", type=Path, default=Path("../shared/traces"), help="(default: %(default)s)")
    add("--shifts", nargs="+", default=[], metavar="NAME", help="only those whose name contains one of these")
    add("--policies", nargs="+", default=list(POLICIES), metavar="POLICY", help="steady and periodic take the first")
    add("--duration", type=float, default=HOUR_S, metavar="S", help="of steady and periodic (default: %(default)s)")
    live_help = "of the live traffic after the shift (default: %(default)s)"
    add("--live-seconds", type=float, default=LiveSettings().after_s, metavar="S", help=live_help)
    add("--seed", type=int, default=0, help="of arrivals (default: %(default)s)")
    add("--check", action="store_true", help="exit with 1 when a target is missed")
    return parser.parse_args()


def read_parts(text: str) -> str:
    parts = PARTS if text == "all" else tuple(text.split(","))
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}: there are {', '.join(PARTS)}")
    return ",".join(parts)


if __name__ == "__main__":
    sys.exit(main())
