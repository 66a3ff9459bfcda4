"""What the closed forms say of a plan against what the simulation does."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.planning.judge import JUDGE_SEED, describe_workers, judge, plan_and_choose
from benchmarks.planning.settings import Spec, prepare
from planner.planning.prediction import predict
from planner.planning.simulated import simulate_at

SHARES = (0.8, 1.0)  # of the chosen plan's predicted goodput


def compare_prediction(spec: Spec, traces: Path) -> dict[str, Any]:
    started = time.monotonic()
    prepared = prepare(spec, traces)
    _, simulated = plan_and_choose(prepared.problem, prepared.setting)
    plan = simulated[0].plan
    fresh = replace(prepared.setting, seed=JUDGE_SEED)
    goodput = predict(prepared.problem, plan, 1.0, prepared.slo).goodput_sessions_per_s
    points = []
    for share in SHARES:
        predicted = predict(prepared.problem, plan, share * goodput, prepared.slo)
        outcome = simulate_at(fresh, plan, share * goodput)
        points.append(
            {
                "share": share,
                "rate": predicted.rate,
                "predicted": predicted.attainment,
                "simulated": outcome.attainment,
                "simulated_ttft": outcome.attainment_ttft,
                "difference_points": 100 * (predicted.attainment - outcome.attainment),
                "predicted_local_share": predicted.local_share,
                "simulated_local_share": outcome.local_share,
            }
        )
    measured = judge(prepared.setting, plan, goodput)
    return {
        "setting": spec.name,
        "slo": {"ttft_s": prepared.slo.ttft_s, "itl_s": prepared.slo.itl_s},
        **describe_workers(plan),
        "predicted_goodput": goodput,
        "simulated_goodput": measured,
        "ratio": goodput / measured if measured else None,
        "points": points,
        "seconds": round(time.monotonic() - started, 1),
    }


def summarise_prediction(rows: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [row["ratio"] for row in rows if row["ratio"]]
    return {
        "rows": rows,
        "mean_abs_difference_points": {
            str(share): statistics.mean(
                abs(point["difference_points"]) for row in rows for point in row["points"] if point["share"] == share
            )
            for share in SHARES
        },
        "largest_difference_points": max(abs(point["difference_points"]) for row in rows for point in row["points"]),
        "goodput_ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        if ratios
        else None,
    }
