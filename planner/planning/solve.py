"""HiGHS behind a small interface: a program goes in; values, status and gap come out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import log2
from typing import Literal

import highspy
import numpy as np
import numpy.typing as npt

from planner.planning.linear_program import LinearProgram, Row

Status = Literal["optimal", "infeasible", "time limit"]
GAP = 1e-4  # relative, at which a plan counts as optimal
TIME_LIMIT_S = 60.0


class SolverError(RuntimeError):
    """The solver gave up on a program for a reason of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """`values` by the place of the variable; empty when there is none. gap: relative, between it and what is proven.
    duals: of the rows, where no variable is an integer."""

    status: Status
    objective: float
    gap: float
    seconds: float
    values: tuple[float, ...]
    duals: tuple[float, ...] = ()


def solve(lp: LinearProgram, *, time_limit_s: float = TIME_LIMIT_S, gap: float = GAP) -> Solution:
    started = time.monotonic()
    highs = highspy.Highs()  # type: ignore[no-untyped-call]
    highs.silent()
    highs.setOptionValue("time_limit", time_limit_s)
    highs.setOptionValue("mip_rel_gap", gap)
    highs.setOptionValue("threads", 1)
    scales = np.array([_choose_scale(row) for row in lp.rows])
    highs.passModel(_convert(lp, scales))
    highs.run()
    seconds = time.monotonic() - started
    info, status = highs.getInfo(), highs.getModelStatus()
    kinds = highspy.HighsModelStatus
    has_solution = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    if status in (kinds.kInfeasible, kinds.kUnboundedOrInfeasible):
        return Solution(status="infeasible", objective=np.inf, gap=0.0, seconds=seconds, values=())
    if status not in (kinds.kOptimal, kinds.kTimeLimit):
        raise SolverError(f"the solver stopped with {highs.modelStatusToString(status)}")
    is_integer = any(variable.is_integer for variable in lp.variables)
    return Solution(
        status="optimal" if status == kinds.kOptimal else "time limit",
        objective=info.objective_function_value if has_solution else np.inf,
        gap=info.mip_gap if is_integer else 0.0,
        seconds=seconds,
        values=tuple(highs.getSolution().col_value) if has_solution else (),
        duals=()
        if is_integer or not has_solution
        else tuple((scales * np.array(highs.getSolution().row_dual)).tolist()),
    )


def _choose_scale(row: Row) -> float:
    """The power of two that brings its largest coefficient to about 1. Rows of bytes beside rows of workers are beyond
    what the solver's tolerances are made for: it has cut off the best plan, and called the next one optimal."""
    largest = max(map(abs, row.coefficients.values()), default=1.0)
    return 2.0 ** -round(log2(largest))


def _convert(lp: LinearProgram, scales: npt.NDArray[np.float64]) -> highspy.HighsLp:
    """Each row times its scale."""
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = len(lp.variables), len(lp.rows)
    model.col_cost_ = np.array([one.cost for one in lp.variables])
    model.col_lower_ = np.array([one.low for one in lp.variables])
    model.col_upper_ = np.array([one.high for one in lp.variables])
    model.row_lower_ = scales * np.array([row.low for row in lp.rows])
    model.row_upper_ = scales * np.array([row.high for row in lp.rows])
    starts, indices, values = [0], [], []
    for row, scale in zip(lp.rows, scales, strict=True):
        indices += list(row.coefficients)
        values += [scale * coefficient for coefficient in row.coefficients.values()]
        starts.append(len(indices))
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.array(starts)
    model.a_matrix_.index_ = np.array(indices)
    model.a_matrix_.value_ = np.array(values)
    if any(one.is_integer for one in lp.variables):
        model.integrality_ = [
            highspy.HighsVarType.kInteger if one.is_integer else highspy.HighsVarType.kContinuous
            for one in lp.variables
        ]
    return model
