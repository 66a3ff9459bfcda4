"""The report as tables on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from loadgen.report import Report


def print_report(report: Report, console: Console) -> None:
    console.print(_summary(report))
    console.print(_latencies(report))
    if report["errors"]:
        console.print("[red]errors:[/red]", ", ".join(f"{code} {count}" for code, count in report["errors"].items()))


def _summary(report: Report) -> Table:
    rounds, sessions, slo, prefill = (report[key] for key in ("rounds", "sessions", "slo", "prefill"))
    throughput, kv = report["throughput"], report["kv"]
    table = Table(title=f"{report['kind']} · policy {report['policy']} · {report['model']}", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("rounds", f"{rounds['completed']} of {rounds['offered']} completed, {rounds['failed']} failed")
    table.add_row("sessions", f"{sessions['completed']} of {sessions['offered']} completed")
    table.add_row(
        f"SLO (TTFT {slo['ttft_slo_s']:g} s, ITL {slo['itl_slo_s']:g} s)",
        f"{_percent(slo['attainment'])} of rounds, {_percent(slo['session_attainment'])} of sessions "
        f"({_percent(slo['p99_itl_attainment'])} of rounds by P99 ITL)",
    )
    table.add_row("prefills", f"{prefill['local']} local, {prefill['remote']} remote")
    table.add_row("KV moved", format_bytes(kv["bytes_moved"]))
    table.add_row(
        "throughput",
        f"{_number(throughput['rounds_per_s'])} rounds/s, {_number(throughput['output_tokens_per_s'])} tokens/s "
        f"over {throughput['duration_s']:.1f} s",
    )
    if "simulation" in report:
        simulation = report["simulation"]
        table.add_row("simulated", f"{simulation['profile']['name']}, {simulation['cluster']}")
        table.add_row("", f"{simulation['simulated_s']:.0f} s in {simulation['wall_s']:.1f} s")
    return table


def _latencies(report: Report) -> Table:
    table = Table(title="seconds")
    table.add_column("")
    for column in ("count", "mean", "p50", "p90", "p99", "max"):
        table.add_column(column, justify="right")
    rows = {
        "TTFT": report["ttft_s"],
        "  first rounds": report["ttft_by"]["first_round"],
        "  later rounds": report["ttft_by"]["later_rounds"],
        "  local prefill": report["ttft_by"]["local"],
        "  remote prefill": report["ttft_by"]["remote"],
        "ITL": report["itl_s"],
        "TPOT": report["tpot_s"],
        "round": report["round_s"],
        **{f"  {stage}": summary for stage, summary in report["stages_s"].items()},
        "sent late by": report["lag_s"],
    }
    for name, summary in rows.items():
        if summary["count"]:
            values = [f"{summary[column]:.3f}" for column in ("mean", "p50", "p90", "p99", "max")]
            table.add_row(name, str(summary["count"]), *values)
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def format_bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{count} B"
        size /= 1024
    return f"{size:.1f} TiB"
