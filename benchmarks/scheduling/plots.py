"""Attainment against rate, and goodput by policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = {
    "adaptive": "#d62728",
    "colocated": "#1f77b4",
    "colocated-untuned": "#9ecae1",
    "colocated-host": "#08306b",
    "continuum": "#17becf",
    "remote": "#2ca02c",
    "local": "#98df8a",
    "threshold": "#bcbd22",
    "ampd": "#9467bd",
    "ampd-best": "#c5b0d5",
    "ampd-split": "#e377c2",
}
TARGET = 90


def plot_attainment(contents: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel a workload: attainment of each policy over the offered rate, with its spread over the seeds."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).flat
    for panel, content in zip(axes, contents, strict=False):
        grid = content["grid"]
        for name, points in grid["policies"].items():
            values = [100 * point["attainment"][0] for point in points]
            low = [100 * point["attainment"][1] for point in points]
            high = [100 * point["attainment"][2] for point in points]
            width = 2.4 if name == "adaptive" else 1.3
            panel.plot(grid["rates"], values, marker="o", markersize=3, linewidth=width, color=COLORS[name], label=name)
            panel.fill_between(grid["rates"], low, high, color=COLORS[name], alpha=0.12, linewidth=0)
        panel.axhline(TARGET, color="black", linestyle=":", linewidth=1)
        slo = content["slo"]
        panel.set_title(f"{content['workload']} (TTFT {slo['ttft_s']:g} s, ITL {1000 * slo['itl_s']:.0f} ms)")
        panel.set_xlabel("sessions offered a second")
        panel.set_ylabel("rounds that attain, %")
        panel.set_ylim(0, 102)
        panel.grid(alpha=0.3)
    for unused in figure.axes[len(contents) :]:
        unused.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.suptitle(f"{contents[0]['profile']}, 32 GPUs, simulated; each policy on its own best cluster")
    figure.savefig(path, dpi=110)


def plot_goodput(contents: Sequence[dict[str, Any]], path: Path) -> None:
    """Goodput of each policy relative to the tuned `colocated`, one group of bars a cell."""
    shown = [content for content in contents if content["search"].get("colocated")]
    if not shown:
        return
    figure = Figure(figsize=(max(8, 1.5 * len(shown)), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [name for name in COLORS if any(name in content["search"] for content in shown)]
    width = 0.85 / len(names)
    for place, name in enumerate(names):
        heights = []
        for content in shown:
            base = content["search"]["colocated"]["goodput_sessions_per_s"]
            found = content["search"].get(name, {}).get("goodput_sessions_per_s", 0.0)
            heights.append(found / base if base else 0.0)
        places = [index + (place - len(names) / 2) * width for index in range(len(shown))]
        axes.bar(places, heights, width=width, color=COLORS[name], label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(shown)), [f"{c['profile']}\n{c['workload']}" for c in shown], fontsize=7, rotation=30)
    axes.set_ylabel("goodput over tuned colocated")
    axes.legend(ncols=3, fontsize=8)
    axes.set_title("Goodput, simulated, 32 GPUs, each policy on its own best cluster")
    figure.savefig(path, dpi=110)
