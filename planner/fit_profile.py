"""From measured steps to a DegreeProfile: no clock, no engine, numpy only.

    T_step = linear(tokens) + sum over chunks of prefill_attention(history, chunk)
             + decode_attention(batch, mean context)

One kind of step alone does not tell the parts apart: every prefill of c tokens at history 0 pays linear(c) and
prefill_attention(0, c) together. Several chunks in one step do, since linear sees their sum and attention each of
them; so do the same chunk at several histories, and decodes at short and long contexts. What remains undetermined,
a x n moved from linear to both attentions, changes no prediction.

Method: a straight-line model of five numbers first, cost per step, token, attended pair, decode, and decoded pair.
Its surfaces are the prior of the second fit, whose unknowns are the values of the curves at knots, written as sums of
increments >= 0 along both axes: more work never takes less time, and a knot that nothing measured (a batch whose
contexts exceed the pool's memory, a chunk longer than any measured) lies where the straight-line model says. Both are
non-negative least squares of relative errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.nonnegative_least_squares import solve_nonnegative
from shared.core.profile import Curve, DegreeProfile, Grid
from shared.core.step_costs import PREFILL_STEP_TOKENS
from shared.errors import AmpdError, ErrorCode

Array = NDArray[np.float64]
MAX_LINEAR_KNOTS, MAX_GRID_KNOTS = 24, 12  # on an axis
# Weight of the prior, per increment, against the relative error of one measured step: a doubled increment weighs as
# much as an error of 5 %.
PRIOR_WEIGHT = 0.05
MIN_CHUNK_SIZES, MIN_HISTORIES, MIN_BATCHES, MIN_CONTEXTS = 3, 2, 2, 2


@dataclass(frozen=True, slots=True)
class StepShape:
    """What is in one step: `contexts` tokens of KV of each decoding sequence, (history, new tokens) of each chunk."""

    contexts: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()

    @property
    def kind(self) -> str:
        if self.contexts and self.chunks:
            return "mixed"
        return "decode" if self.contexts else "prefill"

    @property
    def batch(self) -> int:
        return len(self.contexts)

    @property
    def mean_context(self) -> float:
        return sum(self.contexts) / len(self.contexts) if self.contexts else 0.0

    @property
    def num_tokens(self) -> int:
        return self.batch + sum(chunk for _, chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepSample:
    """A step's measured duration, the median of its repeats. `held_out`: to judge the fit by, never to fit."""

    shape: StepShape
    seconds: float
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class _Knots:
    tokens: tuple[int, ...]
    histories: tuple[int, ...]
    chunks: tuple[int, ...]  # without 0, where attention is 0
    batches: tuple[int, ...]
    contexts: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        return (
            len(self.tokens),
            len(self.histories) * len(self.chunks),
            len(self.batches) * len(self.contexts),
        )


def fit_degree(
    samples: Sequence[StepSample], *, parallel_degree: int, num_kv_tokens: int, max_context_tokens: int
) -> DegreeProfile:
    """Fit the samples that are not held out. Raises AmpdError INVALID_REQUEST naming the steps that are missing."""
    training = [sample for sample in samples if not sample.held_out]
    _check_samples(training)
    knots = _choose_knots([sample.shape for sample in training], max_context_tokens)
    prior = _prior_increments(_fit_straight_lines(training), knots)
    seconds = np.array([sample.seconds for sample in training])
    rows = np.array([_increment_weights(sample.shape, knots) for sample in training]) / seconds[:, None]
    scale = np.maximum(prior, 1e-6 * float(np.median(seconds)))
    a = np.vstack([rows, np.diag(PRIOR_WEIGHT / scale)])
    b = np.concatenate([np.ones(len(training)), PRIOR_WEIGHT * prior / scale])
    return _build_degree(solve_nonnegative(a, b, start=prior), knots, parallel_degree, num_kv_tokens)


def _check_samples(training: Sequence[StepSample]) -> None:
    for sample in training:
        if not sample.seconds > 0.0:
            raise _too_few(f"the step {sample.shape} took {sample.seconds:g} s: a duration must be above 0")
    shapes = [sample.shape for sample in training]
    prefills = [shape.chunks for shape in shapes if shape.kind == "prefill"]
    first = {chunks[0][1] for chunks in prefills if len(chunks) == 1 and chunks[0][0] == 0}
    histories = {chunks[0][0] for chunks in prefills if len(chunks) == 1}
    decodes = [shape for shape in shapes if shape.kind == "decode"]
    for what, values, least in (
        ("chunk sizes of single-chunk prefill steps at history 0", first, MIN_CHUNK_SIZES),
        ("histories of single-chunk prefill steps", histories, MIN_HISTORIES),
        ("batch sizes of decode steps", {shape.batch for shape in decodes}, MIN_BATCHES),
        ("mean contexts of decode steps", {shape.mean_context for shape in decodes}, MIN_CONTEXTS),
    ):
        if len(values) < least:
            found = ", ".join(f"{value:g}" for value in sorted(values)) or "none"
            raise _too_few(f"{what}: at least {least} different ones are needed, there are {len(values)} ({found})")
    if not any(len(chunks) > 1 for chunks in prefills):
        raise _too_few(
            "prefill steps of several chunks: at least one is needed, there are none "
            "(without them the linear part and attention at history 0 cannot be told apart)"
        )


def _too_few(problem: str) -> AmpdError:
    return AmpdError(ErrorCode.INVALID_REQUEST, f"cannot fit a profile: {problem}; measure more points")


# ------------------------------------------------------------------------------ knots and weights


def _choose_knots(shapes: Sequence[StepShape], max_context_tokens: int) -> _Knots:
    chunks = [chunk for shape in shapes for chunk in shape.chunks]
    # a size seen at history 0 alone would leave the rest of its column to the prior; beyond them there is no choice
    repeated = {size for history, size in chunks if history > 0} or {size for _, size in chunks}
    columns = _thin({*repeated, *(size for _, size in chunks if size > max(repeated))})
    longest = min(PREFILL_STEP_TOKENS, max_context_tokens)
    while columns[-1] < longest:  # attention of a chunk grows with its square: the last slope would fall short
        columns = (*columns, min(2 * columns[-1], longest))
    decodes = [shape for shape in shapes if shape.contexts]
    return _Knots(
        tokens=_thin((shape.num_tokens for shape in shapes), MAX_LINEAR_KNOTS),
        histories=_thin(history for history, _ in chunks),
        chunks=columns,
        batches=_thin(shape.batch for shape in decodes),
        contexts=_thin(round(shape.mean_context) for shape in decodes),
    )


def _thin(values: Iterable[int], most: int = MAX_GRID_KNOTS) -> tuple[int, ...]:
    """The distinct values, evenly thinned by rank to `most`, both ends kept."""
    distinct = sorted(set(values))
    if len(distinct) <= most:
        return tuple(distinct)
    ranks = sorted({round(i * (len(distinct) - 1) / (most - 1)) for i in range(most)})
    return tuple(distinct[rank] for rank in ranks)


def _hat(axis: Sequence[int], x: float) -> Array:
    """Weights w with y(x) = w . y(axis), as PiecewiseLinear reads it, beyond the ends too."""
    weights = np.zeros(len(axis))
    if len(axis) == 1:
        weights[0] = 1.0
        return weights
    index = min(max(int(np.searchsorted(axis, x, side="right")) - 1, 0), len(axis) - 2)
    share = (x - axis[index]) / (axis[index + 1] - axis[index])
    weights[index], weights[index + 1] = 1.0 - share, share
    return weights


def _suffix_sums(weights: Array) -> Array:
    """Weights of increments from weights of values: a value is the sum of all increments up to it, on every axis."""
    for axis in range(weights.ndim):
        weights = np.flip(np.flip(weights, axis).cumsum(axis), axis)
    return weights.ravel()


def _increment_weights(shape: StepShape, knots: _Knots) -> Array:
    attention = np.zeros((len(knots.histories), len(knots.chunks)))
    for history, chunk in shape.chunks:
        attention += np.outer(_hat(knots.histories, history), _hat((0, *knots.chunks), chunk)[1:])
    decode = np.zeros((len(knots.batches), len(knots.contexts)))
    if shape.contexts:
        decode = np.outer(_hat(knots.batches, shape.batch), _hat(knots.contexts, shape.mean_context))
    linear = _hat(knots.tokens, shape.num_tokens)
    return np.concatenate([_suffix_sums(part) for part in (linear, attention, decode)])


# ---------------------------------------------------------------------------- the straight-line prior


@dataclass(frozen=True, slots=True)
class _StraightLines:
    step_s: float
    token_s: float
    pair_s: float  # a prefilled token attending to one token
    decode_s: float  # beside token_s: the logits of a sequence
    decode_pair_s: float

    def linear(self, tokens: Array) -> Array:
        return self.step_s + self.token_s * tokens

    def attention(self, histories: Array, chunks: Array) -> Array:
        return self.pair_s * chunks * (histories + chunks / 2.0)

    def decode(self, batches: Array, contexts: Array) -> Array:
        return batches * (self.decode_s + self.decode_pair_s * contexts)


def _fit_straight_lines(training: Sequence[StepSample]) -> _StraightLines:
    rows = np.array(
        [
            [
                1.0,
                sample.shape.num_tokens,
                sum(chunk * (history + chunk / 2.0) for history, chunk in sample.shape.chunks),
                sample.shape.batch,
                sum(sample.shape.contexts),
            ]
            for sample in training
        ]
    )
    seconds = np.array([sample.seconds for sample in training])
    solution = solve_nonnegative(rows / seconds[:, None], np.ones(len(training)))
    return _StraightLines(*(float(value) for value in solution))


def _prior_increments(lines: _StraightLines, knots: _Knots) -> Array:
    linear = np.diff(lines.linear(np.array(knots.tokens, dtype=float)), prepend=0.0)
    attention = lines.attention(np.array(knots.histories, dtype=float)[:, None], np.array(knots.chunks, dtype=float))
    decode = lines.decode(np.array(knots.batches, dtype=float)[:, None], np.array(knots.contexts, dtype=float))
    parts = [
        linear,
        *(np.diff(np.diff(grid, axis=0, prepend=0.0), axis=1, prepend=0.0) for grid in (attention, decode)),
    ]
    return np.concatenate([part.ravel() for part in parts])


def _build_degree(increments: Array, knots: _Knots, parallel_degree: int, num_kv_tokens: int) -> DegreeProfile:
    num_linear, num_attention, _ = knots.sizes
    linear = increments[:num_linear].cumsum()
    attention = increments[num_linear : num_linear + num_attention].reshape(len(knots.histories), len(knots.chunks))
    decode = increments[num_linear + num_attention :].reshape(len(knots.batches), len(knots.contexts))
    attention, decode = (grid.cumsum(axis=0).cumsum(axis=1) for grid in (attention, decode))
    return DegreeProfile(
        parallel_degree=parallel_degree,
        num_kv_tokens=num_kv_tokens,
        linear=Curve(at=knots.tokens, s=_round(linear)),
        prefill_attention=Grid(
            rows=knots.histories,
            columns=(0, *knots.chunks),
            s=tuple((0.0, *_round(row)) for row in attention),
        ),
        decode_attention=Grid(rows=knots.batches, columns=knots.contexts, s=tuple(_round(row) for row in decode)),
    )


def _round(times: Array) -> tuple[float, ...]:
    """Six digits: more is noise. Rounding keeps an ascending row ascending."""
    return tuple(float(f"{time:.6g}") for time in times)
