"""A comparison as a table on the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from loadgen.compare import TARGET, Comparison
from loadgen.table import format_bytes

SHARES = {"rounds\n%": "attainment", "P99 ITL\n%": "p99_itl_attainment", "sessions\n%": "session_attainment"}
SECONDS = {
    "TTFT\np50 s": "ttft_p50_s",
    "\np90 s": "ttft_p90_s",
    "\np99 s": "ttft_p99_s",
    "TPOT\np50 s": "tpot_p50_s",
    "\np99 s ": "tpot_p99_s",
}


def print_comparison(comparison: Comparison, console: Console) -> None:
    slo = comparison["slo"]
    seeds = comparison["workload"]["seed"]
    spread = f" · means ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else ""
    table = Table(
        title=f"{comparison['kind']} · {comparison['workload']['file']} · TTFT {slo['ttft_slo_s']:g} s, "
        f"ITL {slo['itl_slo_s']:g} s{spread}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("rate")
    table.add_column("policy", no_wrap=True)
    for column in (*SHARES, *SECONDS, "local\n%", "KV moved"):
        table.add_column(column, justify="right", no_wrap=True)
    for rate in sorted({cell["rate"] for cell in comparison["cells"]}):
        _add_rate(table, rate, [cell for cell in comparison["cells"] if cell["rate"] == rate])
    console.print(table)
    parts = [f"{policy} {'-' if rate is None else f'{rate:g}'}" for policy, rate in comparison["goodput"].items()]
    console.print(
        f"highest rate tried with {TARGET:.0%} of rounds attaining: {' · '.join(parts)}",
        highlight=False,
        soft_wrap=True,
    )


def _add_rate(table: Table, rate: float, cells: list[dict[str, Any]]) -> None:
    """A line a policy; the best attainment is bold."""
    best = max(cell["numbers"]["attainment"]["mean"] or 0.0 for cell in cells)
    for index, cell in enumerate(cells):
        numbers = cell["numbers"]
        table.add_row(
            f"{rate:g}" if index == 0 else "",
            cell["policy"],
            _share(numbers["attainment"], with_spread=True),
            *(_share(numbers[name]) for name in list(SHARES.values())[1:]),
            *(_seconds(numbers[name]["mean"]) for name in SECONDS.values()),
            _share(numbers["local_share"]),
            format_bytes(round(numbers["kv_bytes_moved"]["mean"] or 0)),
            style="bold" if numbers["attainment"]["mean"] == best else None,
            end_section=index == len(cells) - 1,
        )


def _share(spread: dict[str, float | None], *, with_spread: bool = False) -> str:
    if spread["mean"] is None:
        return "-"
    text = f"{100 * spread['mean']:.1f}"
    return f"{text} ± {100 * spread['sd']:.1f}" if with_spread and spread["sd"] is not None else text


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
