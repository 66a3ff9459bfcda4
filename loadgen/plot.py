"""The report as a picture: TTFT and ITL distributions, and when each round of the first sessions ran."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from loadgen.percentiles import Runs, collect_runs, weighted_percentiles
from loadgen.records import RoundRecord, RunInfo
from loadgen.report import Report, attains

MAX_LANES = 40  # sessions in the timeline
MAX_CDF_POINTS = 1000
LOCAL, REMOTE, FAILED, MISSED = "#4c78a8", "#54a24b", "#9d9d9d", "#e45756"


def save_plot(run: RunInfo, records: Sequence[RoundRecord], report: Report, path: Path) -> None:
    """Write a PNG. No display is needed."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes: dict[str, Axes] = figure.subplot_mosaic([["ttft", "itl"], ["lanes", "lanes"]], height_ratios=[1, 1.4])
    completed = [record for record in records if record.state == "completed"]
    groups = {"local": LOCAL, "remote": REMOTE}
    ttfts = {name: [r.ttft_s for r in completed if r.usage and r.usage.prefill == name] for name in groups}
    itls = {
        name: [itl_run for r in completed if r.usage and r.usage.prefill == name for itl_run in r.itl_runs]
        for name in groups
    }
    for name, color in groups.items():
        draw_cdf(axes["ttft"], [(1, ttft_s) for ttft_s in ttfts[name] if ttft_s is not None], name, color)
        draw_cdf(axes["itl"], itls[name], name, color)
    _finish_cdf(axes["ttft"], "TTFT, s", run.slo.ttft_s)
    _finish_cdf(axes["itl"], "ITL, s", run.slo.itl_s)
    _draw_lanes(axes["lanes"], run, records)
    attainment = report["slo"]["attainment"]
    share = "no rounds" if attainment is None else f"{100 * attainment:.1f} % of rounds within the SLO"
    figure.suptitle(f"{run.kind} · policy {run.policy} · {run.model} · {share}")
    figure.savefig(path, dpi=110)


def draw_cdf(axes: Axes, runs: Runs, label: str, color: str) -> None:
    """Of values that come in runs of equal ones: (how many, the value)."""
    values, counts = collect_runs(runs)
    if len(values):
        num_values = int(counts.sum())
        shares = np.linspace(0.0, 1.0, min(num_values, MAX_CDF_POINTS) + 1)
        quantiles = weighted_percentiles(values, counts, shares)
        axes.plot(quantiles, shares, label=f"{label} ({num_values})", color=color)


def _finish_cdf(axes: Axes, title: str, slo_s: float) -> None:
    axes.axvline(slo_s, color=MISSED, linestyle="--", linewidth=1, label="SLO")
    axes.set_xlabel(title)
    axes.set_ylabel("share of rounds" if title.startswith("TTFT") else "share of tokens")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _draw_lanes(axes: Axes, run: RunInfo, records: Sequence[RoundRecord]) -> None:
    """A lane a session, a bar a round: pale until the first token, solid while decoding, red edge: SLO missed."""
    lanes = sorted({record.session_index for record in records})[:MAX_LANES]
    rows = {session: row for row, session in enumerate(lanes)}
    for record in records:
        if record.session_index not in rows or record.sent_s is None or record.finished_s is None:
            continue
        row, color = rows[record.session_index], FAILED
        if record.state == "completed" and record.usage is not None:
            color = LOCAL if record.usage.prefill == "local" else REMOTE
        first_s = record.first_token_s if record.first_token_s is not None else record.finished_s
        axes.barh(row, first_s - record.sent_s, left=record.sent_s, height=0.7, color=color, alpha=0.4)
        axes.barh(row, record.finished_s - first_s, left=first_s, height=0.7, color=color)
        if not attains(record, run.slo):
            whole_s = record.finished_s - record.sent_s
            axes.barh(row, whole_s, left=record.sent_s, height=0.7, fill=False, edgecolor=MISSED, linewidth=1.2)
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("session" if len(rows) < MAX_LANES else f"session (the first {MAX_LANES})")
    axes.invert_yaxis()
    axes.legend(
        handles=[
            Patch(color=LOCAL, label="local prefill"),
            Patch(color=REMOTE, label="remote prefill"),
            Patch(color=FAILED, label="failed"),
            Patch(facecolor="none", edgecolor=MISSED, label="SLO missed"),
        ],
        loc="upper right",
        ncols=4,
        title="pale: until the first token",
    )
