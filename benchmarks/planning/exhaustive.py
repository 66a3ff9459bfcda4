"""On a few GPUs every plan can be simulated: how good is the one that was chosen?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.planning.judge import Race, describe_workers, plan_and_choose
from benchmarks.planning.packing import list_workers
from benchmarks.planning.settings import Spec, prepare
from planner.planning.simulated import GAIN


def compare_exhaustively(spec: Spec, traces: Path) -> dict[str, Any]:
    """By the seed that chose: it is the search that is judged here. Plans less than GAIN better are not told apart."""
    started = time.monotonic()
    prepared = prepare(spec, traces)
    plans, simulated = plan_and_choose(prepared.problem, prepared.setting)
    chosen, goodput = simulated[0].plan, simulated[0].goodput_sessions_per_s
    race = Race(prepared.setting, plans[0].rate)
    race.begin_with(chosen, goodput)
    for workers in list_workers(prepared.problem):
        if sorted(workers) != sorted(chosen.workers):
            race.enter(workers)
    assert race.best is not None, "the chosen plan is in it"
    return {
        "setting": spec.name,
        "slo": {"ttft_s": prepared.slo.ttft_s, "itl_s": prepared.slo.itl_s},
        "chosen": {**describe_workers(chosen), "goodput": goodput},
        "best": {**describe_workers(race.best), "goodput": race.goodput},
        "share": goodput / race.goodput if race.goodput else None,
        "resolution": GAIN - 1.0,
        "plans": race.num_entered,
        "seconds": round(time.monotonic() - started, 1),
    }
