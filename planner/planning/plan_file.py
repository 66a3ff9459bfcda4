"""The plan as files: plan.json for machines, plan.md and plan.png for people, an override for docker compose."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isinf
from pathlib import Path
from typing import Any

from planner.planning.plans import SolvedPlan
from planner.planning.prediction import Prediction
from planner.planning.program import Objective
from planner.planning.simulated import Simulated
from planner.planning.workload_model import WorkloadModel
from shared.messages import Slo

FORMAT = "ampd-plan/1"
MAX_BINDING = 8
ROWS = ("at sessions/s", "rounds on time", "goodput, sessions/s", "TTFT p95, s", "ITL p95, s", "local prefills")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """The chosen plan first among `simulated`, or the program's own best where nothing was simulated.

    gains: {GPU type: {GPUs more: sessions per second that they add}}. curve: (GPUs, sessions per second).
    """

    objective: Objective
    gpus: Mapping[str, int]
    profiles: Mapping[str, str]
    slo: Slo
    target: float
    policy: str
    workload: WorkloadModel
    plan: SolvedPlan
    prediction: Prediction
    simulated: Sequence[Simulated]
    gains: Mapping[str, Mapping[int, float]]
    curve: Sequence[tuple[int, float]]

    def as_dict(self) -> dict[str, Any]:
        predicted, solution = self.prediction, self.plan.solution
        return {
            "format": FORMAT,
            "objective": self.objective,
            "workers": [asdict(one) for one in self.plan.workers],
            "num_gpus": self.plan.num_gpus,
            "gpus": dict(self.gpus),
            "profiles": dict(self.profiles),
            "slo": {"ttft_s": self.slo.ttft_s, "itl_s": self.slo.itl_s},
            "target": self.target,
            "policy": self.policy,
            "workload": self.workload.describe(),
            "predicted": {
                "rate_sessions_per_s": predicted.rate,
                "attainment": predicted.attainment,
                "goodput_sessions_per_s": predicted.goodput_sessions_per_s,
                "capacity_sessions_per_s": predicted.capacity_sessions_per_s,
                "ttft_p95_s": _finite(predicted.ttft_p95_s),
                "itl_p95_s": _finite(predicted.itl_p95_s),
                "local_share": predicted.local_share,
            },
            "simulated": None if not self.simulated else describe_simulated(self.simulated[0]),
            "candidates": [
                {
                    "workers": [asdict(w) for w in one.plan.workers],
                    "num_changes": one.plan.num_changes,
                    "simulated": describe_simulated(one),
                }
                for one in self.simulated
            ],
            "solver": {"status": solution.status, "gap": solution.gap, "seconds": round(solution.seconds, 3)},
            "binding": [{"constraint": name, "share": share} for name, share in predicted.binding[:MAX_BINDING]],
            "further_gpus": {name: {str(n): gain for n, gain in gains.items()} for name, gains in self.gains.items()},
            "goodput_by_gpus": [{"gpus": n, "capacity_sessions_per_s": rate} for n, rate in self.curve],
        }


def describe_simulated(one: Simulated) -> dict[str, Any]:
    return {
        "rate_sessions_per_s": one.rate,
        "attainment": one.outcome.attainment,
        "goodput_sessions_per_s": one.goodput_sessions_per_s or None,
        "ttft_p95_s": one.outcome.ttft_p95_s,
        "itl_p95_s": one.outcome.tpot_p95_s,
        "local_share": one.outcome.local_share,
    }


def write_plan(report: PlanReport, out: Path) -> None:
    """plan.json, plan.md, plan.png and docker-compose.override.yml in the folder `out`."""
    (out / "plan.json").write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    (out / "plan.md").write_text(describe_plan(report))
    (out / "docker-compose.override.yml").write_text(make_override(report.plan))
    _draw(report, out / "plan.png")


def make_override(plan: SolvedPlan) -> str:
    """As many containers as the plan has workers, on this machine: the plan's shape, not its GPUs."""
    numbers = {role: sum(one.replicas for one in plan.workers if one.role == role) for role in ("prefill", "both")}
    return (
        f"# {plan.describe()}\n"
        "# docker compose -f docker-compose.yml -f docker-compose.override.yml up -d --wait\n"
        "services:\n"
        f"  prefill-worker: {{deploy: {{replicas: {numbers['prefill']}}}}}\n"
        f"  decode-worker: {{deploy: {{replicas: {numbers['both']}}}}}\n"
    )


def describe_plan(report: PlanReport) -> str:
    """The page: what to run, what to expect of it, what limits it, and what more would bring."""
    predicted, plan = report.prediction, report.plan
    lines = [
        f"# {plan.describe()}",
        "",
        f"{plan.num_gpus} of {sum(report.gpus.values())} GPUs, objective {report.objective}, TTFT "
        f"{report.slo.ttft_s:g} s, ITL {report.slo.itl_s:g} s for {report.target:.0%} of the rounds, policy "
        f"{report.policy}. Solver: {plan.solution.status}, gap {plan.solution.gap:.2%}, {plan.solution.seconds:.2f} s"
        f"{_describe_changes(plan)}.",
        "",
        "| | predicted | simulated |",
        "|---|---|---|",
    ]
    ours = (
        predicted.rate,
        predicted.attainment,
        predicted.goodput_sessions_per_s,
        predicted.ttft_p95_s,
        predicted.itl_p95_s,
        predicted.local_share,
    )
    theirs = _list_simulated(report.simulated[0]) if report.simulated else (None,) * len(ours)
    rows = zip(ROWS, ours, theirs, strict=True)
    lines += [f"| {name} | {_number(one)} | {_number(other)} |" for name, one, other in rows]
    lines += [
        "",
        "## What limits it",
        "",
        "Share of the limit: 100 % means that one percent more of it raises the capacity by one percent.",
        "",
    ]
    lines += [f"- {name}: {gain:.0%}" for name, gain in predicted.binding[:MAX_BINDING]]
    lines += ["", "## What further GPUs would bring", ""]
    lines += [
        f"- {number} {gpu_type} more: {gain:+.4g} sessions/s"
        for gpu_type, gains in report.gains.items()
        for number, gain in gains.items()
    ]
    if len(report.simulated) > 1:
        lines += ["", "## Other plans that were simulated", ""]
        lines += [f"- {one.plan.describe()}: {_describe_other(one)}" for one in report.simulated[1:]]
    return "\n".join(lines) + "\n"


def _list_simulated(one: Simulated) -> tuple[float | None, ...]:
    outcome = one.outcome
    return (
        one.rate,
        outcome.attainment,
        one.goodput_sessions_per_s or None,
        outcome.ttft_p95_s,
        outcome.tpot_p95_s,
        outcome.local_share,
    )


def _describe_other(one: Simulated) -> str:
    if one.goodput_sessions_per_s:
        return f"{one.goodput_sessions_per_s:.4g} sessions/s"
    return f"{one.outcome.attainment:.1%} of the rounds on time at {one.rate:.4g} sessions/s"


def _describe_changes(plan: SolvedPlan) -> str:
    if not plan.num_changes:
        return ""
    return f"; then changed in {plan.num_changes} place{'s' if plan.num_changes > 1 else ''}, as simulation says"


def _number(value: float | None) -> str:
    return "-" if value is None or isinf(value) else f"{value:.4g}"


def _finite(value: float) -> float | None:
    """JSON has no infinity: a latency that grows without end is null."""
    return None if isinf(value) else value


def _draw(report: PlanReport, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([n for n, _ in report.curve], [rate for _, rate in report.curve], marker="o", label="program, capacity")
    for one in report.simulated[:1]:
        if one.goodput_sessions_per_s:
            axes.plot([one.plan.num_gpus], [one.goodput_sessions_per_s], "s", label="this plan, simulated goodput")
    axes.set_xlabel("GPUs")
    axes.set_ylabel("sessions/s")
    axes.set_ylim(bottom=0)
    axes.set_title(report.plan.describe(), fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=110)
