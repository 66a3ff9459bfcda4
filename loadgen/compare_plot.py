"""A comparison as pictures: attainment against rate, TTFT and ITL at one rate, and what some sessions did when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from loadgen.compare import TARGET, Comparison, read_outcome
from loadgen.lanes import choose_lanes, draw_lanes, find_end, legend_handles
from loadgen.measured import select_measured
from loadgen.percentiles import collect_runs, weighted_percentiles
from loadgen.records import RoundRecord, RunInfo
from shared.messages import Slo

ATTAINMENT, DISTRIBUTIONS, LANES = "attainment.png", "distributions.png", "lanes.png"
DPI = 130
# colours that differ for the colour-blind too (Okabe and Ito), the same for a policy in every picture
STYLES = {
    "adaptive": ("#d55e00", "o"),
    "ampd": ("#0072b2", "s"),
    "remote": ("#009e73", "^"),
    "local": ("#56b4e9", "v"),
    "threshold": ("#cc79a7", "D"),
    "colocated": ("#5f5f5f", "P"),
    "continuum": ("#b8a200", "X"),
}
MAX_CDF_POINTS = 1000
SMALLEST_S = 1e-4  # what is shorter is drawn there: logarithmic axes have no 0

Outcomes = dict[str, tuple[RunInfo, list[RoundRecord]]]  # by policy


def save_plots(comparison: Comparison, out: Path, plot_rate: float | None = None) -> list[Path]:
    """Write the PNGs; returns their paths. `plot_rate`: of distributions and lanes."""
    rate = choose_rate(comparison) if plot_rate is None else plot_rate
    seed = comparison["workload"]["seed"][0]
    outcomes: Outcomes = {
        run["policy"]: read_outcome(out, run)
        for run in comparison["runs"]
        if run["rate"] == rate and run["seed"] == seed
    }
    paths = [out / ATTAINMENT]
    plot_attainment(comparison, out / ATTAINMENT)
    if outcomes:
        paths += [out / DISTRIBUTIONS, out / LANES]
        plot_distributions(comparison, outcomes, rate, out / DISTRIBUTIONS)
        plot_lanes(comparison, outcomes, rate, out / LANES)
    return paths


def choose_rate(comparison: Comparison) -> float:
    """The highest rate at which some policy attains TARGET: there the others differ from it. Else the lowest."""
    best = max((rate for rate in comparison["goodput"].values() if rate is not None), default=None)
    return float(min(run["rate"] for run in comparison["runs"]) if best is None else best)


def plot_attainment(comparison: Comparison, path: Path) -> None:
    """Lines are means over the seeds, bands their extremes."""
    figure = _make_figure(11.0, 4.4)
    panels = {
        "attainment": "TTFT and TPOT within the SLO",
        "p99_itl_attainment": "TTFT and the round's P99 ITL within the SLO",
    }
    axes_row = figure.subplots(1, len(panels), sharey=True)
    for axes, (name, title) in zip(axes_row, panels.items(), strict=True):
        for contender in comparison["contenders"]:
            cells = [cell for cell in comparison["cells"] if cell["policy"] == contender["policy"]]
            spreads = [(cell["rate"], cell["numbers"][name]) for cell in cells]
            known = [(rate, spread) for rate, spread in spreads if spread["mean"] is not None]
            _draw_line(axes, contender["policy"], known)
        axes.axhline(100 * TARGET, color="black", linestyle=(0, (4, 3)), linewidth=1)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("arrivals, sessions/s")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes_row[0].set_ylim(-2, 103)
    axes_row[0].set_ylabel("rounds offered that attain, %")
    axes_row[0].annotate(
        f"{100 * TARGET:.0f} %", (1, 100 * TARGET), xycoords=("axes fraction", "data"), xytext=(-2, 3),
        textcoords="offset points", ha="right", fontsize=8,
    )  # fmt: skip
    _finish(figure, comparison, "", axes_row[0])
    figure.savefig(path, dpi=DPI)


def _draw_line(axes: Axes, policy: str, points: Sequence[tuple[float, dict[str, Any]]]) -> None:
    color, marker = find_style(policy)
    rates = [rate for rate, _ in points]
    axes.plot(
        rates, [100 * spread["mean"] for _, spread in points], color=color, marker=marker, markersize=5, label=policy
    )
    low, high = ([100 * spread[end] for _, spread in points] for end in ("min", "max"))
    axes.fill_between(rates, low, high, color=color, alpha=0.15, linewidth=0)


def plot_distributions(comparison: Comparison, outcomes: Outcomes, rate: float, path: Path) -> None:
    """Cumulative, over the measured rounds of the first seed."""
    figure = _make_figure(11.0, 4.4)
    ttft_axes, itl_axes = figure.subplots(1, 2, sharey=True)
    for policy, (run, records) in outcomes.items():
        rounds = [one for one in select_measured(run, records).rounds if one.state == "completed"]
        color, _ = find_style(policy)
        _draw_cdf(ttft_axes, [(1, one.ttft_s) for one in rounds if one.ttft_s is not None], policy, color)
        _draw_cdf(itl_axes, [itl_run for one in rounds for itl_run in one.itl_runs], policy, color)
    slo = comparison["slo"]
    for axes, title, slo_s in ((ttft_axes, "TTFT", slo["ttft_slo_s"]), (itl_axes, "ITL", slo["itl_slo_s"])):
        axes.set_xscale("log")
        axes.axvline(slo_s, color="black", linestyle=(0, (4, 3)), linewidth=1)
        axes.annotate(
            f"SLO {slo_s:g} s", (slo_s, 0.02), xytext=(4, 0), textcoords="offset points", fontsize=8, rotation=90
        )
        axes.set_xlabel(f"{title}, s")
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    ttft_axes.set_ylim(0, 1.01)
    ttft_axes.set_ylabel("share of completed rounds (left), of tokens (right)")
    _finish(figure, comparison, f" · {rate:g} sessions/s", ttft_axes)
    figure.savefig(path, dpi=DPI)


def _draw_cdf(axes: Axes, runs: Sequence[tuple[int, float]], policy: str, color: str) -> None:
    values, counts = collect_runs(runs)
    if len(values):
        shares = np.linspace(0.0, 1.0, MAX_CDF_POINTS + 1)
        quantiles = np.maximum(weighted_percentiles(values, counts, shares), SMALLEST_S)
        axes.plot(quantiles, shares, label=policy, color=color, linewidth=1.6)


def plot_lanes(comparison: Comparison, outcomes: Outcomes, rate: float, path: Path) -> None:
    """A panel a policy, the same sessions in each."""
    num_lanes = 8 if len(outcomes) <= 4 else 5
    lanes = choose_lanes(next(iter(outcomes.values()))[1], num_lanes)
    figure = _make_figure(11.0, 1.0 + len(outcomes) * (0.55 + 0.19 * num_lanes))
    panels = figure.subplots(len(outcomes), 1, sharex=True, squeeze=False)[:, 0]
    clusters = {one["policy"]: one["cluster"] for one in comparison["contenders"]}
    slo = Slo(ttft_s=comparison["slo"]["ttft_slo_s"], itl_s=comparison["slo"]["itl_slo_s"])
    attained = {run["policy"]: run["numbers"]["attainment"] for run in comparison["runs"][::-1] if run["rate"] == rate}
    for axes, (policy, (_, records)) in zip(panels, outcomes.items(), strict=True):
        draw_lanes(axes, records, lanes, slo)
        share = attained[policy] or 0.0
        axes.set_title(
            f"{policy} ({clusters[policy]}): {100 * share:.1f} % of all rounds attain", fontsize=9, loc="left"
        )
    ends = sorted(find_end(records, lanes) for _, records in outcomes.values())
    panels[-1].set_xlim(0, max(min(ends[-1], 3 * ends[len(ends) // 2]), SMALLEST_S))
    panels[-1].set_xlabel("seconds after the first of these sessions arrived", fontsize=9)
    _finish(figure, comparison, f" · {rate:g} sessions/s, the same sessions under every policy", None)
    figure.legend(handles=legend_handles(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(path, dpi=DPI)


def find_style(policy: str) -> tuple[str, str]:
    """(colour, marker)."""
    return STYLES.get(policy, ("black", "."))


def _make_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(figure: Figure, comparison: Comparison, what: str, axes: Axes | None) -> None:
    slo = comparison["slo"]
    title = f"{comparison['kind']} · {comparison['workload']['file']}"
    figure.suptitle(f"{title} · SLO: TTFT {slo['ttft_slo_s']:g} s, ITL {slo['itl_slo_s']:g} s{what}", fontsize=10)
    if axes is not None:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
