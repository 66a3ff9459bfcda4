"""Tables of a profile from step times: sample on a grid, make monotone, hold the sums against whole steps off the grid.

More tokens cannot take less time, yet measurements wiggle. Two ways make a table monotone:
- linear, whose wiggles go both ways (tile sizes of the matrix products): the geometric mean of the largest value at or
  below a point and the smallest at or above it. Of all monotone curves it has the smallest largest change (isotonic
  regression in the maximum norm, here of logarithms; Barlow et al., Statistical Inference under Order Restrictions,
  1972);
- attention, whose wiggles are single slow points and dearer kernels for a prefill without history: the smallest value
  at or above a point along both axes, since a disturbance only ever adds time.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from planner.gpu_timing import StepTimes
from shared.core.profile import Curve, DegreeProfile, Grid, Links
from shared.core.step_costs import StepCosts

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536,
          1792, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192)  # fmt: skip
CHUNKS = (1, 4, 16, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
HISTORIES = (0, 16, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
CONTEXTS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
HELD_OUT = 300  # points of each kind

Array = NDArray[np.float64]
Changes = dict[str, float]
Errors = dict[str, dict[str, float]]


def fit_degree(
    times: StepTimes, parallel_degree: int, num_kv_tokens: int, max_context: int
) -> tuple[DegreeProfile, Changes]:
    """The tables, and for each the largest change of a step's time, relative, that making it monotone took."""
    histories = [h for h in HISTORIES if h <= max_context]
    contexts = [c for c in CONTEXTS if c <= max_context]
    linear = np.array([times.linear_s(n) for n in TOKENS])
    prefill = _sample(times.prefill_attention_s, histories, CHUNKS)
    decode = _sample(times.decode_attention_s, BATCHES, contexts)
    fitted_linear = balance_monotone(linear)
    fitted_prefill, fitted_decode = lower_monotone(prefill), lower_monotone(decode)
    of_chunks = np.interp(CHUNKS, TOKENS, fitted_linear)[None, :]
    of_batches = np.interp(BATCHES, TOKENS, fitted_linear)[:, None]
    changes = {
        "linear": _largest(np.abs(fitted_linear / linear - 1.0)),
        "prefill_attention": _largest((prefill - fitted_prefill) / (prefill + of_chunks)),
        "decode_attention": _largest((decode - fitted_decode) / (decode + of_batches)),
    }
    degree = DegreeProfile(
        parallel_degree=parallel_degree,
        num_kv_tokens=num_kv_tokens,
        linear=Curve(at=TOKENS, s=_round(fitted_linear)),
        prefill_attention=Grid(rows=tuple(histories), columns=CHUNKS, s=tuple(_round(row) for row in fitted_prefill)),
        decode_attention=Grid(rows=BATCHES, columns=tuple(contexts), s=tuple(_round(row) for row in fitted_decode)),
    )
    return degree, changes


def measure_errors(
    degree: DegreeProfile, times: StepTimes, links: Links, max_context: int, kv_bytes_per_token: int, seed: int
) -> Errors:
    """Median and 90th percentile of |ours / theirs - 1| for prefills, decodes and mixed steps off the grid.

    Sizes are drawn log-uniformly; decodes and mixed steps hold no more context than the worker has KV for.
    """
    costs = StepCosts(degree, links, kv_bytes_per_token)
    rng = random.Random(seed)
    found: dict[str, list[float]] = {"prefill": [], "prefill_of_256_up": [], "decode": [], "mixed": []}
    for _ in range(HELD_OUT):
        chunk = _draw(rng, 1, min(7_680, max_context // 2))
        history = _draw(rng, 1, max_context - chunk - 1) if rng.random() < 0.8 else 0
        theirs = times.prefill_s(history, chunk)
        error = abs(costs.prefill_s(history, chunk) / theirs - 1.0)
        for kind in ("prefill", "prefill_of_256_up") if chunk >= 256 else ("prefill",):
            found[kind].append(error)
        batch, context = _draw_decode(rng, degree.num_kv_tokens, 16, max_context)
        theirs = times.decode_s(batch, context)
        found["decode"].append(abs(costs.decode_step_s(batch, context) / theirs - 1.0))
        history = min(history, max_context // 2 - chunk) if history else 0
        batch, context = _draw_decode(rng, degree.num_kv_tokens, history + chunk + 1, max_context)
        theirs = times.mixed_s(history, chunk, batch, context)
        found["mixed"].append(abs(costs.step_s(batch, context, [(history, chunk)]) / theirs - 1.0))
    return {kind: _summarise(errors) for kind, errors in found.items()}


def balance_monotone(values: Array) -> Array:
    """Ascending, with the smallest largest relative change; see the head of this file."""
    return np.asarray(np.sqrt(np.maximum.accumulate(values) * lower_monotone(values)))


def lower_monotone(values: Array) -> Array:
    """The largest table below `values` that ascends along every axis."""
    for axis in range(values.ndim):
        values = np.flip(np.minimum.accumulate(np.flip(values, axis), axis), axis)
    return values


def _sample(time: Callable[[int, int], float], rows: Sequence[int], columns: Sequence[int]) -> Array:
    return np.array([time(r, c) for r, c in product(rows, columns)]).reshape(len(rows), len(columns))


def _round(values: Array) -> tuple[float, ...]:
    """4 significant digits keep the order: rounding is monotone."""
    return tuple(float(f"{value:.4g}") for value in values)


def _largest(changes: Array) -> float:
    return round(float(changes.max()), 3)


def _draw(rng: random.Random, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(max(low, high)))))


def _draw_decode(rng: random.Random, num_kv_tokens: int, low: int, max_context: int) -> tuple[int, int]:
    context = _draw(rng, low, min(max_context, max(low, num_kv_tokens)))
    return _draw(rng, 1, max(1, min(512, num_kv_tokens // context))), context


def _summarise(errors: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(errors), 4),
        "p90": round(statistics.quantiles(errors, n=10)[-1], 4),
    }
