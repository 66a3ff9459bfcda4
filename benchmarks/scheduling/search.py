"""Each policy's own best cluster and options, found the same way for all: the one with the highest goodput."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from benchmarks.scheduling.cells import Candidate, Cell, list_clusters, list_options, make_candidate
from planner.simulator.goodput import Goodput, find_goodput

GAIN = 1.04  # a candidate must do this much better to replace the best so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    candidate: Candidate
    goodput: Goodput
    num_candidates: int
    num_runs: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        outcome = self.goodput.outcome
        return {
            "cluster": self.candidate.cluster.describe(),
            "groups": [[g.role, g.count, g.parallel_degree] for g in self.candidate.cluster.groups],
            "options": self.candidate.options,
            "goodput_sessions_per_s": self.goodput.rate,
            "at_goodput": None if outcome is None else outcome.as_dict(),
            "num_candidates": self.num_candidates,
            "num_runs": self.num_runs,
            "seconds": round(self.seconds, 1),
        }


def find_best(cell: Cell, policy_name: str) -> Best:
    """First the cluster, with the policy's first options, then the options on it. Candidates race: one that does not
    attain just above the best goodput so far is out after one run, which stops as soon as that is certain."""
    started = time.monotonic()
    race = _Race(cell)
    options = list_options(policy_name)
    for groups in list_clusters(cell, policy_name):
        race.enter(make_candidate(cell, policy_name, groups, options[0]))
    assert race.best is not None, "a policy has at least one cluster"
    groups = race.best.cluster.groups
    for variant in options[1:]:
        race.enter(make_candidate(cell, policy_name, groups, variant))
    return Best(
        candidate=race.best,
        goodput=race.goodput,
        num_candidates=race.num_candidates,
        num_runs=race.num_runs,
        seconds=time.monotonic() - started,
    )


class _Race:
    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self.best: Candidate | None = None
        self.goodput = Goodput(0.0, None, 0)
        self.num_candidates = 0
        self.num_runs = 0

    def enter(self, candidate: Candidate) -> None:
        self.num_candidates += 1
        scenario = candidate.scenario(self._cell)
        if self.goodput.rate > 0:
            outcome, _ = scenario.run(self.goodput.rate * GAIN, 0, needed_share=0.9)
            self.num_runs += 1
            if outcome.attainment < 0.9:
                return
        start = self._cell.first_rate if self.goodput.rate == 0 else self.goodput.rate * GAIN
        found = find_goodput(scenario, start=start, lowest=self._cell.lowest_rate)
        self.num_runs += found.num_runs
        if self.best is None or found.rate > self.goodput.rate:
            self.best, self.goodput = candidate, found
