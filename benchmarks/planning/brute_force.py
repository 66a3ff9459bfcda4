"""The optimum without the mixed-integer program: every set of workers that fits, a linear program for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import highspy
import numpy as np

from benchmarks.planning.packing import Workers, list_workers
from planner.planning.linear_program import LinearProgram
from planner.planning.plans import PlanRole
from planner.planning.program import LEVELS, PlanProblem, build_program, latency_at

PACKING = ("gpus of", "nodes of")  # rows that the search stands for


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """goodput: the highest rate. fewest_gpus, least_latency_s: at the problem's rate, None where that is too much."""

    goodput: float
    fewest_gpus: int | None
    least_latency_s: float | None
    num_plans: int


class FixedWorkers:
    """The linear program of given workers, solved again and again with other numbers of them."""

    def __init__(self, problem: PlanProblem) -> None:
        self.problem = problem
        self._program = build_program(problem, "goodput")
        lp = self._program.lp
        lp.rows = [row for row in lp.rows if not row.name.startswith(PACKING)]
        self._highs = make_continuous(lp)
        self._time_rows = {row.name: number for number, row in enumerate(lp.rows) if row.name.startswith("time of")}

    def max_rate(self, workers: Workers, latest_s: float | None = None) -> float:
        """0 when nothing can be served. latest_s: no worker may be so busy that its TTFT p95 is above it."""
        numbers = {(one.role, one.gpu_type, one.parallel_degree): one.replicas for one in workers}
        tables: tuple[tuple[PlanRole, str, dict[int, int]], ...] = (
            ("prefill", "time of prefill workers", self._program.num_prefill),
            ("both", "time of decode workers", self._program.num_decode),
        )
        for role, row_name, counts in tables:
            for place, variable in counts.items():
                kind = self.problem.kinds[place]
                number = float(numbers.get((role, kind.gpu_type, kind.parallel_degree), 0))
                busy = self.problem.efficiency
                if latest_s is not None and number:
                    busy = min(busy, self._highest_level(place, latest_s))
                    if busy <= 0.0:
                        return 0.0
                self._highs.changeColBounds(variable, number, number)
                slack = (busy - self.problem.efficiency) * number  # the row takes the efficiency off already
                self._highs.changeRowBounds(self._time_rows[f"{row_name}, {kind.name}"], -highspy.kHighsInf, slack)
        self._highs.run()
        if self._highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return 0.0
        return -float(self._highs.getInfo().objective_function_value)

    def _highest_level(self, place: int, latest_s: float) -> float:
        kind, variability = self.problem.kinds[place], self.problem.variability
        return max((level for level in LEVELS if latency_at(kind, level, variability) <= latest_s), default=0.0)


def make_continuous(lp: LinearProgram) -> highspy.Highs:
    """`lp` in HiGHS, with no variable an integer."""
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = len(lp.variables), len(lp.rows)
    model.col_cost_ = np.array([one.cost for one in lp.variables])
    model.col_lower_ = np.array([one.low for one in lp.variables])
    model.col_upper_ = np.array([one.high for one in lp.variables])
    model.row_lower_ = np.array([row.low for row in lp.rows])
    model.row_upper_ = np.array([row.high for row in lp.rows])
    entries = [(index, value) for row in lp.rows for index, value in row.coefficients.items()]
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.cumsum([0, *(len(row.coefficients) for row in lp.rows)])
    model.a_matrix_.index_ = np.array([index for index, _ in entries])
    model.a_matrix_.value_ = np.array([value for _, value in entries])
    highs = highspy.Highs()  # type: ignore[no-untyped-call]
    highs.silent()
    highs.setOptionValue("threads", 1)
    highs.passModel(model)
    return highs


def search_goodput(problem: PlanProblem) -> tuple[float, Mapping[Workers, float]]:
    """(highest rate, the rate of every plan)."""
    fixed = FixedWorkers(problem)
    rates = {workers: fixed.max_rate(workers) for workers in list_workers(problem)}
    return max(rates.values(), default=0.0), rates


def search_at_rate(problem: PlanProblem, rates: Mapping[Workers, float]) -> Optimum:
    """At the problem's rate; `rates`: of every plan, which do not depend on it."""
    able = [workers for workers, rate in rates.items() if rate >= problem.rate]
    return Optimum(
        goodput=max(rates.values(), default=0.0),
        fewest_gpus=min((sum(one.num_gpus for one in workers) for workers in able), default=None),
        least_latency_s=_search_latency(problem, able),
        num_plans=len(rates),
    )


def _search_latency(problem: PlanProblem, able: list[Workers]) -> float | None:
    """A rate that can be served with TTFT p95 up to Z everywhere can be with a larger Z: bisects the possible Z."""
    fixed = FixedWorkers(problem)
    possible = sorted({latency_at(kind, level, problem.variability) for kind in problem.kinds for level in LEVELS})

    def is_served(latest_s: float) -> bool:
        return any(fixed.max_rate(workers, latest_s) >= problem.rate for workers in able)

    place = _find_first(len(possible), lambda index: is_served(possible[index]))
    return None if place is None else possible[place]


def _find_first(size: int, holds: Callable[[int], bool]) -> int | None:
    """The lowest index from which on it holds; None: it does not at the last."""
    if not size or not holds(size - 1):
        return None
    low, high = 0, size - 1
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
