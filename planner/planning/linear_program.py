"""A mixed-integer linear program as plain data: named variables and named rows, to be solved, fixed, or relaxed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf


@dataclass(slots=True)
class Variable:
    name: str
    low: float
    high: float
    is_integer: bool
    cost: float = 0.0  # of the objective, which is minimised


@dataclass(slots=True)
class Row:
    """low <= sum of coefficient x variable <= high."""

    name: str
    coefficients: dict[int, float]
    low: float
    high: float


@dataclass(slots=True)
class LinearProgram:
    variables: list[Variable] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def add(self, name: str, *, low: float = 0.0, high: float = inf, is_integer: bool = False) -> int:
        self.variables.append(Variable(name, low, high, is_integer))
        return len(self.variables) - 1

    def require(self, name: str, coefficients: Mapping[int, float], *, low: float = -inf, high: float = inf) -> None:
        self.rows.append(Row(name, {index: c for index, c in coefficients.items() if c != 0.0}, low, high))

    def minimise(self, costs: Mapping[int, float]) -> None:
        for index, variable in enumerate(self.variables):
            variable.cost = costs.get(index, 0.0)

    def fix(self, values: Mapping[int, float]) -> None:
        for index, value in values.items():
            self.variables[index].low = self.variables[index].high = value
