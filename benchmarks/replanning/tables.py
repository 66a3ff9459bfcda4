"""The benchmark's numbers for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from benchmarks.bench_output import show_table

Part = dict[str, Any]


def show_part(console: Console, name: str, part: Part) -> None:
    match name:
        case "simulated":
            _show_simulated(console, part)
        case "steady" | "periodic":
            _show_calm(console, name, part)
        case "live":
            _show_live(console, part)
        case _:
            raise AssertionError(f"no table for {name}")


def _show_simulated(console: Console, part: Part) -> None:
    rows = [
        (
            row["shift"],
            row["policy"],
            *(_percent(row["attainment_after"][how]) for how in ("static", "replanned", "clairvoyant")),
            _seconds(row["recovered_after_s"]),
            str(row["role_changes"]),
            str(row["lost"]["replanned"]),
            "yes" if row["met"] else "NO",
        )
        for row in part["rows"]
    ]
    head = ("shift", "policy", "static", "re-planned", "clairvoyant", "recovered after", "changes", "lost", "met")
    show_table(console, "Rounds on time after the shift", head, rows)


def _show_calm(console: Console, name: str, part: Part) -> None:
    row = (
        name,
        f"{part['duration_s']:g} s",
        str(part["num_rounds"]),
        str(part["role_changes"]),
        str(part["most_changes_of_a_worker"]),
        str(part["lost"]),
        "yes" if part["met"] else "NO",
    )
    show_table(
        console, "Keeping still", ("load", "for", "rounds", "changes", "most of one worker", "lost", "met"), [row]
    )


def _show_live(console: Console, part: Part) -> None:
    rows = [
        (
            how,
            str(run["rounds"]),
            str(part["lost"][how]),
            str(run["decoding"]),
            str(len(run["changes"])),
            " ".join("-" if share is None else f"{100 * share:.0f}" for share in part["attainment"][how]),
        )
        for how, run in part["runs"].items()
    ]
    title = f"Live, rounds on time in percent, every {part['bucket_s']:g} s; shift at {part['shift_at_s']:g} s"
    show_table(console, title, ("roles", "rounds", "lost", "decoding", "changes", "on time"), rows)
    console.print(
        f"recovered after {_seconds(part['recovered_after_s'])}; tokens unchanged: {part['tokens_unchanged']}; "
        f"planner killed and back: {part['runs']['act']['planner_restarted']}",
        highlight=False,
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:g} s"
