"""Swim-lanes: what some sessions did when, a lane each: queued, transferring, prefilling, decoding, at the tool."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from loadgen.records import RoundRecord
from loadgen.report import attains
from shared.messages import Slo

STAGES = {
    "queued": "#d9a441",
    "transferring": "#b35c9e",
    "prefilling": "#3b6fb6",
    "decoding": "#7fb58a",
    "waiting for the tool": "#e6e6e6",
}
MISSED = "#d62728"
HEIGHT, TOOL_HEIGHT = 0.72, 0.26
CANDIDATES = 8  # lanes are chosen from so many times as many sessions

Bars = list[tuple[float, float]]  # (from, width), seconds


def choose_lanes(records: Sequence[RoundRecord], num_lanes: int) -> list[int]:
    """Sessions to show, by what was planned for them alone, so that every policy shows the same ones.

    From the middle of the run on, those of several rounds whose tools take the least time: else nothing but waiting
    would be seen.
    """
    sessions: dict[int, list[RoundRecord]] = {}
    for record in records:
        sessions.setdefault(record.session_index, []).append(record)
    by_arrival = sorted(sessions)  # sessions are numbered by arrival
    middle = by_arrival[len(by_arrival) * 2 // 5 :] + by_arrival[: len(by_arrival) * 2 // 5]
    several = [one for one in middle if len(sessions[one]) >= 3] or [one for one in middle if len(sessions[one]) >= 2]
    candidates = (several or middle)[: CANDIDATES * num_lanes]
    chosen = sorted(candidates, key=lambda one: sum(r.delay_s for r in sessions[one]) / max(1, len(sessions[one]) - 1))
    return sorted(chosen[:num_lanes])


def draw_lanes(axes: Axes, records: Sequence[RoundRecord], lanes: Sequence[int], slo: Slo) -> None:
    """Times are relative to the first of these sessions' arrivals. A red line under a round: it missed its SLO."""
    shown = [record for record in records if record.session_index in set(lanes)]
    start_s = min((one.due_s for one in shown if one.due_s is not None), default=0.0)
    for row, session in enumerate(lanes):
        rounds = sorted((one for one in shown if one.session_index == session), key=lambda one: one.round)
        for stage, bars in _collect_bars(rounds, start_s).items():
            height = TOOL_HEIGHT if stage == "waiting for the tool" else HEIGHT
            axes.broken_barh(bars, (row - height / 2, height), facecolors=STAGES[stage], linewidth=0)
        for one in rounds:
            if one.state == "failed" and one.sent_s is not None:
                axes.plot(one.sent_s - start_s, row, marker="x", color=MISSED, markersize=6, markeredgewidth=2)
            elif one.sent_s is not None and one.finished_s is not None and not attains(one, slo):
                axes.plot([one.sent_s - start_s, one.finished_s - start_s], [row + 0.45] * 2, color=MISSED, linewidth=2)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_yticks(range(len(lanes)), [f"session {session}" for session in lanes], fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)


def find_end(records: Sequence[RoundRecord], lanes: Sequence[int]) -> float:
    """When the last of these sessions ended, seconds after the first of them arrived."""
    shown = [record for record in records if record.session_index in set(lanes)]
    start_s = min((one.due_s for one in shown if one.due_s is not None), default=0.0)
    return max((one.finished_s - start_s for one in shown if one.finished_s is not None), default=0.0)


def legend_handles() -> list[Patch]:
    handles = [Patch(facecolor=color, label=stage) for stage, color in STAGES.items()]
    return [*handles, Patch(facecolor=MISSED, label="round missed its SLO")]


def _collect_bars(rounds: Sequence[RoundRecord], start_s: float) -> dict[str, Bars]:
    """The time to the first token is divided as the round's usage says; what it does not explain counts as queued."""
    bars: dict[str, Bars] = {stage: [] for stage in STAGES}
    ended_s: float | None = None
    for one in rounds:
        if one.sent_s is None or one.finished_s is None:
            continue
        if ended_s is not None:
            bars["waiting for the tool"].append((ended_s - start_s, max(0.0, one.sent_s - ended_s)))
        ended_s = one.finished_s
        first_s = one.first_token_s if one.first_token_s is not None else one.finished_s
        at_s, ttft_s = one.sent_s - start_s, first_s - one.sent_s
        transfer_s, prefill_s = (one.usage.transfer_s, one.usage.prefill_s) if one.usage else (0.0, 0.0)
        scale = min(1.0, ttft_s / (transfer_s + prefill_s)) if transfer_s + prefill_s > 0 else 0.0
        transfer_s, prefill_s = transfer_s * scale, prefill_s * scale
        queued_s = max(0.0, ttft_s - transfer_s - prefill_s)
        for stage, width_s in (("queued", queued_s), ("transferring", transfer_s), ("prefilling", prefill_s)):
            bars[stage].append((at_s, width_s))
            at_s += width_s
        bars["decoding"].append((at_s, one.finished_s - first_s))
    return bars
