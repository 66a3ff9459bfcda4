"""KV transport against its limits, measured in the same run: what each way could do without leases, digests or blocks.

    tcp       a plain blocking socket; mooncake-transfer-engine over TCP, if it is installed
    unix      a plain blocking socket, with default options and with our send buffer
    shm       memcpy of one thread
    nixl      NIXL's own loop over what UCX chooses within a host; nixl-tcp: over TCP on loopback

Sender and receiver are processes of their own, which copy as `ampd up` has its workers copy (COPY_TUNABLE). Every case
is repeated, the contenders taking turns; medians are reported. CPU is that of both processes together. With --check the
exit status is 1 when a target is missed.

Example:
    python benchmarks/bench_transport.py --repeats 5 --out transport.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is not installed

from benchmarks.bench_output import describe_machine, read_commit
from benchmarks.transport.cases import CASES, FAMILIES, LAYOUT
from benchmarks.transport.receiver import measure_family
from shared.transport.region import COPY_TUNABLE

# ours over the fastest of these
LIMITS = {
    "tcp": ("plain",),
    "unix": ("plain", "plain-1M"),
    "shm": ("memcpy",),
    "nixl": ("nixl loop", "nixl loop, spinning"),
    "nixl-tcp": ("nixl loop", "nixl loop, spinning"),
}
TARGETS = {"tcp": 0.95, "shm": 0.8, "nixl": 0.9, "nixl-tcp": 0.9}
TARGET_CASES = ("1 MiB", "16 MiB", "256 MiB")
SCATTERED_TARGET = 0.8
IDLE_TARGET = 0.01  # of a core, both processes: who polls takes more


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measured repeats of each case (default 5)")
    parser.add_argument("--families", default=",".join(FAMILIES), help="some of: %(default)s")
    parser.add_argument("--out", type=Path, help="write the report as JSON to this file")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    args = parser.parse_args()
    families = args.families.split(",")
    os.environ.setdefault("GLIBC_TUNABLES", COPY_TUNABLE)
    report: dict[str, Any] = {
        "benchmark": "kv_transport",
        "commit": read_commit(),
        "machine": describe_machine(),
        "repeats": args.repeats,
        "layout": {name: getattr(LAYOUT, name) for name in LAYOUT.__slots__},
        "load_average": os.getloadavg(),
        "cases": [],
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("cases", total=len(families) * (len(CASES) + 1))
        for family in families:
            for row in measure(family, args.repeats):
                report["cases"].append(row)
                progress.advance(bar)
    report["ratios"] = compare(report["cases"])
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    show(report)
    return int(args.check and not all(ratio["met"] for ratio in report["ratios"] if "met" in ratio))


def measure(family: str, repeats: int) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    results, theirs = context.Pipe()
    receiver = context.Process(target=measure_family, args=(family, repeats, theirs))
    receiver.start()
    theirs.close()
    rows = []
    try:
        while (row := results.recv()) is not None:
            rows.append(row)
    except EOFError:
        sys.exit(f"{family}: the receiving process ended with {receiver.exitcode}")
    receiver.join(10)
    return rows


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours over its limit, case by case, and scattered over contiguous."""
    ratios = []
    by_case = {(row["family"], row["case"]): row for row in rows}
    for (family, case), row in by_case.items():
        if case == "idle":
            share = row["cpu_share"]
            met = {"target": IDLE_TARGET, "met": share <= IDLE_TARGET}
            ratios.append({"family": family, "case": case, "over": "a core", "ratio": share, **met})
            continue
        limit = max(LIMITS[family], key=lambda name: row[name]["gib_per_s"])
        ratio = row["ampd"]["gib_per_s"] / row[limit]["gib_per_s"]
        target = TARGETS.get(family) if case in TARGET_CASES else None
        met = {"target": target, "met": ratio >= target} if target is not None else {}
        ratios.append({"family": family, "case": case, "over": limit, "ratio": ratio, **met})
        if case == "512 scattered blocks":
            ratio = row["ampd"]["gib_per_s"] / by_case[family, "256 MiB"]["ampd"]["gib_per_s"]
            ratios.append(
                {
                    "family": family,
                    "case": case,
                    "over": "contiguous",
                    "ratio": ratio,
                    "target": SCATTERED_TARGET,
                    "met": ratio >= SCATTERED_TARGET,
                }
            )
    return ratios


def show(report: dict[str, Any]) -> None:
    console = Console(width=150)
    table = Table(title=f"KV transport, medians of {report['repeats']}: GiB/s (CPU s/GiB of both processes)")
    for column in ("way", "case", "ampd", "limits, others", "ampd over"):
        table.add_column(column)
    for row in report["cases"]:
        if row["case"] == "idle":
            table.add_row(row["family"], "idle", f"{row['cpu_share']:.2%} of a core", "", row["lane"])
            continue
        others = [name for name, value in row.items() if isinstance(value, dict) and name != "ampd"]
        ratios = [r for r in report["ratios"] if (r["family"], r["case"]) == (row["family"], row["case"])]
        latency = f", {row['ampd']['wall_s'] * 1e3:.2f} ms" if row["num_bytes"] < 1 << 20 else ""
        table.add_row(
            row["family"],
            row["case"],
            f"{row['ampd']['gib_per_s']:.2f} ({row['ampd']['cpu_s_per_gib']:.2f}){latency}",
            "; ".join(f"{name} {row[name]['gib_per_s']:.2f} ({row[name]['cpu_s_per_gib']:.2f})" for name in others),
            ", ".join(f"{r['over']} {r['ratio']:.0%}{'' if r.get('met', True) else ' missed'}" for r in ratios),
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
