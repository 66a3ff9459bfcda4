"""What a plan is worth: its goodput in simulation, with a seed that chose none of the plans."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.planning.packing import Workers, as_plan
from planner.planning.choose import list_plans
from planner.planning.neighbours import list_neighbours
from planner.planning.plans import SolvedPlan
from planner.planning.program import PlanProblem
from planner.planning.simulated import GAIN, GROWTH, Setting, Simulated, choose_by_goodput
from planner.simulator.goodput import find_goodput

JUDGE_SEED = 1
COARSE = 0.1  # a race's goodputs are found to: it looks at many plans, and what wins is judged again
LOWEST = 1 / 50  # of where the search starts, below which a plan counts as serving nothing
NUM_PLANS = 4  # as `ampd plan` simulates


def plan_and_choose(problem: PlanProblem, setting: Setting) -> tuple[list[SolvedPlan], list[Simulated]]:
    """What `ampd plan` does: (the program's best plans, the same simulated, best first)."""
    plans = list_plans(problem, "goodput", NUM_PLANS)
    return plans, choose_by_goodput(setting, plans, partial(list_neighbours, problem))


def judge(setting: Setting, plan: SolvedPlan, start: float) -> float:
    """Sessions per second; the search starts at `start`."""
    fresh = replace(setting, seed=JUDGE_SEED)
    found = find_goodput(
        fresh.scenario(plan, start),
        start=start,
        lowest=start * LOWEST,
        target=setting.target,
        growth=GROWTH,
        seed=JUDGE_SEED,
    )
    return found.rate


class Race:
    """Plans that enter one after another: one that does not attain just above the best so far is out after one run."""

    def __init__(self, setting: Setting, start: float, *, tolerance: float = 0.03) -> None:
        self._setting = setting
        self._start = start
        self._tolerance = tolerance
        self.best: SolvedPlan | None = None
        self.goodput = 0.0
        self.num_entered = 0

    def enter(self, workers: Workers) -> None:
        self.num_entered += 1
        plan, setting = as_plan(workers), self._setting
        rate = self.goodput * GAIN or self._start
        scenario = setting.scenario(plan, rate)
        if self.goodput:
            outcome, _ = scenario.run(rate, setting.seed, needed_share=setting.target)
            if outcome.attainment < setting.target:
                return
        found = find_goodput(
            scenario,
            start=rate,
            lowest=rate * LOWEST,
            target=setting.target,
            tolerance=self._tolerance,
            growth=GROWTH,
            seed=setting.seed,
        )
        if found.rate > self.goodput:
            self.best, self.goodput = plan, found.rate

    def begin_with(self, plan: SolvedPlan, goodput: float) -> None:
        self.best, self.goodput = plan, goodput
        self.num_entered += 1


def describe_workers(plan: SolvedPlan) -> dict[str, Any]:
    return {"plan": plan.describe(), "gpus": plan.num_gpus}
