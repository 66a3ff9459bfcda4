"""Does the simulator predict what the live system does? The same sessions and arrivals, simulated and live.

`--engine emulated`: the live services, bus and coordinator with durations from the same profile; `--engine torch`: the
real model on this machine, simulated with the profile that `ampd profile` measured here. Both runs are made by
`loadgen compare`; what is compared is the attainment of each policy at each rate. The torch runs are simulated a second
time at the speed that the live workers' steps had in each (machine_speed.py): what is off then is the simulator's, or
chance; the rest is the profile's and the machine's of that hour.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.bench_output import read_commit
from benchmarks.scheduling.machine_speed import measure_speed, slow_down
from loadgen.records import read_run
from loadgen.run import RUN
from shared.profile_files import load_profile

EXAMPLE = """examples:
  python -m benchmarks.scheduling.fidelity trace.jsonl --engine emulated --profile h100-qwen3-32b --time-scale 10 \\
    --policies remote,adaptive --rates 4,8,12 --cluster prefill:2x2,decode:2x2 --duration 20 --out out/fidelity
  python -m benchmarks.scheduling.fidelity trace.jsonl --engine torch --profile cpu-smollm2 --prefill 1 --decode 1 \\
    --policies remote,adaptive --rates 0.1,0.2 --sessions 12 --max-context 600 --out out/fidelity-cpu"""
MEDIANS = ("ttft_p50_s", "tpot_p50_s")  # [simulated, live]
DIFFERENCES = ("difference_points", "difference_points_at_its_speed")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scheduling.fidelity", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("trace", metavar="FILE")
    parser.add_argument("--engine", choices=("emulated", "torch"), required=True)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--time-scale", default="10", help="emulated: wall seconds per second of the profile")
    parser.add_argument("--model", default="smollm2", help="torch (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="torch: as the profile was measured (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    args, common = parser.parse_known_args()
    simulated, live = build_commands(args, common)
    for command in (simulated, live):
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    rows = compare_runs(read_runs(args.out / "simulated"), read_runs(args.out / "live"))
    if args.engine == "torch":
        for row in rows:
            row |= simulate_at_its_speed(args, common, row["policy"], row["rate"], row["live"])
    result = {
        "engine": args.engine,
        "profile": args.profile,
        "time_scale": float(args.time_scale) if args.engine == "emulated" else None,
        "commit": read_commit(),
        "trace": Path(args.trace).name,
        "options": common,
        "rows": rows,
        **{f"largest_{name}": max(abs(row[name]) for row in rows) for name in DIFFERENCES if name in rows[0]},
    }
    (args.out / "fidelity.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        differences = ", ".join(f"{row[name]:+.1f}" for name in DIFFERENCES if name in row)
        print(
            f"{row['policy']:12s} {row['rate']:8.3g}/s  simulated {100 * row['simulated']:6.1f} %  "
            f"live {100 * row['live']:6.1f} %  {differences} points"
        )
    return 0


def build_commands(args: argparse.Namespace, common: list[str]) -> tuple[list[str], list[str]]:
    """`loadgen compare` (simulated, live); both sides predict with the profile."""
    compare = [sys.executable, "-m", "loadgen", "compare", args.trace, *common, "--profile", args.profile]
    live = [*compare, "--engine", args.engine, "--out", str(args.out / "live")]
    simulated = [*compare, "--simulate", "--out", str(args.out / "simulated")]
    if args.engine == "emulated":
        scale = ["--time-scale", args.time_scale]
        return [*simulated, *scale], [*live, *scale]
    return simulated, [*live, "--model", args.model, "--dtype", args.dtype]


def simulate_at_its_speed(
    args: argparse.Namespace, common: list[str], policy: str, rate: float, live: float
) -> dict[str, Any]:
    """One point again, with the profile slowed down to what the steps took in its live runs."""
    runs = json.loads((args.out / "live" / "compare.json").read_text())["runs"]
    folders = [args.out / "live" / one["folder"] for one in runs if (one["policy"], one["rate"]) == (policy, rate)]
    times = [one for folder in folders for one in (read_run(folder / RUN).step_times or {}).values()]
    if not times:
        raise SystemExit(f"{policy} at {rate:g}/s: run.json has no step_times, so that its speed is not known")
    prefill, decode = measure_speed(times)
    out = args.out / "at_its_speed" / f"{policy}-{rate:g}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "profile.json").write_bytes(msgspec.json.encode(slow_down(load_profile(args.profile), prefill, decode)))
    point = argparse.Namespace(**{**vars(args), "profile": str(out / "profile.json"), "out": out})
    simulated, _ = build_commands(point, [*common, "--rates", repr(rate)])  # of all policies: one is asked for
    subprocess.run(simulated, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    attained = read_runs(out / "simulated")[policy, rate]["numbers"]["attainment"]["mean"]
    return {
        "prefill_over_profile": round(prefill, 3),
        "decode_over_profile": round(decode, 3),
        "simulated_at_its_speed": attained,
        "difference_points_at_its_speed": round(100 * (attained - live), 2),
    }


def read_runs(folder: Path) -> dict[tuple[str, float], dict[str, Any]]:
    """{(policy, rate): the means over the seeds} of a compare.json."""
    content = json.loads((folder / "compare.json").read_text())
    return {(point["policy"], point["rate"]): point for point in content["cells"]}


def compare_runs(simulated: dict[Any, dict[str, Any]], live: dict[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for key in simulated:
        ours, theirs = (point["numbers"]["attainment"]["mean"] for point in (simulated[key], live[key]))
        rows.append(
            {
                "policy": key[0],
                "rate": key[1],
                "simulated": ours,
                "live": theirs,
                "difference_points": round(100 * (ours - theirs), 2),
                **{
                    name: [round(point["numbers"][name]["mean"], 4) for point in (simulated[key], live[key])]
                    for name in MEDIANS
                },
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
