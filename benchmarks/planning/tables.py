"""The benchmark's numbers for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from benchmarks.bench_output import show_table
from benchmarks.planning.baselines import NAMES

Part = dict[str, Any]


def show_part(console: Console, name: str, part: Part) -> None:
    match name:
        case "optimality":
            _show_optimality(console, part)
        case "scaling":
            _show_scaling(console, part)
        case "prediction":
            _show_prediction(console, part)
        case "baselines":
            _show_baselines(console, part)
        case "exhaustive":
            _show_exhaustive(console, part)
        case _:
            raise AssertionError(f"no table for {name}")


def _show_optimality(console: Console, part: Part) -> None:
    title = f"Program against brute force: {part['instances']} instances, {part['feasible']} with a plan"
    rows = [(name, f"{value:.1e}") for name, value in part["largest_difference"].items()]
    show_table(console, title, ("objective", "largest relative difference"), rows)
    for fault in part["faults"]:
        console.print(fault, style="red")


def _show_scaling(console: Console, part: Part) -> None:
    rows = [
        (
            " + ".join(f"{n} {gpu_type}" for gpu_type, n in row["gpus"].items()),
            row["objective"],
            f"{row['seconds']:.2f}",
            f"{row['least_s']:.2f} to {row['most_s']:.2f}",
            f"{row['cpu_s']:.2f}",
            f"{row['target_s']:g}",
            "yes" if row["met"] else "NO",
            f"{row['status']}, gap {row['gap']:.2%}",
        )
        for row in part["rows"]
    ]
    show_table(
        console, "Seconds until there is a plan", ("GPUs", "objective", "s", "", "CPU", "target", "met", "solver"), rows
    )


def _show_prediction(console: Console, part: Part) -> None:
    rows = []
    for row in part["rows"]:
        points = [f"{_percent(p['predicted'])} / {_percent(p['simulated'])}" for p in row["points"]]
        goodputs = f"{_number(row['predicted_goodput'])} / {_number(row['simulated_goodput'])}"
        rows.append((row["setting"], row["plan"], goodputs, _number(row["ratio"]), *points))
    head = ("predicted / simulated", "plan", "goodput", "ratio", "on time at 80 %", "at 100 %")
    show_table(console, "Prediction", head, rows)
    console.print(f"mean absolute difference, points: {part['mean_abs_difference_points']}")


def _show_baselines(console: Console, part: Part) -> None:
    rows = [
        (row["setting"], *(_number(row["plans"][name]["goodput"]) for name in NAMES), str(row["num_drawn"]))
        for row in part["rows"]
    ]
    rows.append(("over ours, geometric mean", "1", *(_number(part["over_ours"][name]) for name in NAMES[1:]), ""))
    show_table(console, "Simulated goodput, sessions/s", ("setting", *NAMES, "drawn"), rows)


def _show_exhaustive(console: Console, part: Part) -> None:
    rows = [
        (
            row["setting"],
            str(row["plans"]),
            f"{row['chosen']['plan']}: {_number(row['chosen']['goodput'])}",
            f"{row['best']['plan']}: {_number(row['best']['goodput'])}",
            _percent(row["share"]),
        )
        for row in part["rows"]
    ]
    show_table(console, "The chosen plan against all", ("setting", "plans", "chosen", "best", "chosen / best"), rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
