"""min |A x - b| with x >= 0, by the active-set method of Lawson and Hanson (Solving Least Squares Problems, 1974)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
TOLERANCE = 1e-10  # of the largest gradient at x = 0


def solve_nonnegative(a: Array, b: Array, *, start: Array | None = None) -> Array:
    """x [columns] for a [rows, columns], b [rows]. Columns that are all zero get 0.

    `start` >= 0 only saves time: without it columns become positive one by one.

    Works on the normal equations: the callers' columns are scaled, and their prior rows keep them well conditioned.
    Raises ArithmeticError if it has not ended after 10 steps a column, which rounding alone could cause.
    """
    scale = np.sqrt((a * a).sum(axis=0))
    scale[scale == 0.0] = 1.0
    scaled = a / scale
    gram, target = scaled.T @ scaled, scaled.T @ b
    num_columns = a.shape[1]
    x = np.zeros(num_columns) if start is None else start * scale
    passive = x > 0.0
    x = _restrict(gram, target, x, passive)
    useless = np.zeros(num_columns, dtype=bool)  # entered and left at once, by rounding: not again until x has moved
    smallest = TOLERANCE * max(1e-300, float(np.abs(target).max(initial=0.0)))
    for _ in range(10 * num_columns + 10):
        gradient = target - gram @ x
        gradient[passive | useless] = -np.inf
        entering = int(gradient.argmax())
        if gradient[entering] <= smallest:
            return np.asarray(x / scale)
        passive[entering] = True
        x = _restrict(gram, target, x, passive)
        if passive[entering]:
            useless[:] = False
        else:
            useless[entering] = True
    raise ArithmeticError(f"non-negative least squares of {a.shape} did not end")


def _restrict(gram: Array, target: Array, x: Array, passive: NDArray[np.bool_]) -> Array:
    """The least-squares solution over `passive`, which loses every column that would have become negative."""
    while True:
        chosen = np.flatnonzero(passive)
        solution = np.zeros_like(x)
        solution[chosen] = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], target[chosen], rcond=None)[0]
        negative = chosen[solution[chosen] <= 0.0]
        if negative.size == 0:
            return solution
        steps = x[negative] / np.maximum(x[negative] - solution[negative], 1e-300)
        x = x + steps.min() * (solution - x)
        passive[negative[steps <= steps.min()]] = False
        x[~passive] = 0.0
