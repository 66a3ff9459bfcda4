"""How long one step, one prefill or one transfer takes on one worker: a profile's tables, made fast to ask."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from shared.core.profile import Curve, DegreeProfile, Grid, Links, Profile

CHUNK_STEP = 8  # tokens: a largest chunk is found to within this
PREFILL_STEP_TOKENS = 8_192  # T_pre of more tokens is the sum of steps of this size


class PiecewiseLinear:
    """y(x) through ascending points; beyond the ends the nearest piece goes on, never below 0."""

    __slots__ = ("_slopes", "_xs", "_ys")

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self._xs = [float(x) for x in xs]
        self._ys = [float(y) for y in ys]
        self._slopes = [
            (y1 - y0) / (x1 - x0)
            for x0, x1, y0, y1 in zip(self._xs, self._xs[1:], self._ys, self._ys[1:], strict=False)
        ]

    @classmethod
    def of(cls, curve: Curve) -> PiecewiseLinear:
        return cls(curve.at, curve.s)

    def __call__(self, x: float) -> float:
        index = bisect_right(self._xs, x) - 1
        if index < 0:
            index = 0
        elif index >= len(self._slopes):
            index = len(self._slopes) - 1
        y = self._ys[index] + (x - self._xs[index]) * self._slopes[index]
        return y if y > 0.0 else 0.0

    def inverse(self, y: float) -> float:
        """The largest x with y(x) <= `y`, below the first point where there is none; y must ascend."""
        index = bisect_right(self._ys, y) - 1
        if index < 0:
            return -1.0
        index = min(index, len(self._slopes) - 1)
        while index > 0 and self._slopes[index] <= 0.0:
            index -= 1
        slope = self._slopes[index]
        return self._xs[-1] if slope <= 0.0 else self._xs[index] + (y - self._ys[index]) / slope


class Bilinear:
    """y(row, column): linear between rows of piecewise-linear curves."""

    __slots__ = ("_curves", "_rows")

    def __init__(self, grid: Grid) -> None:
        self._rows = [float(row) for row in grid.rows]
        self._curves = [PiecewiseLinear(grid.columns, row) for row in grid.s]

    def __call__(self, row: float, column: float) -> float:
        rows = self._rows
        index = bisect_right(rows, row) - 1
        if index < 0:
            index = 0
        elif index >= len(rows) - 1:
            index = len(rows) - 2
        low = self._curves[index](column)
        high = self._curves[index + 1](column)
        y = low + (high - low) * (row - rows[index]) / (rows[index + 1] - rows[index])
        return y if y > 0.0 else 0.0


class StepCosts:
    """Durations on one worker in seconds. `scale` multiplies every computed time (a running correction, a what-if)."""

    __slots__ = ("attend", "decode_attend", "host_bytes_per_s", "kv_bytes_per_token", "latency_s", "linear",
                 "link_bytes_per_s", "node_bytes_per_s", "num_kv_tokens", "parallel_degree", "scale")  # fmt: skip

    def __init__(self, degree: DegreeProfile, links: Links, kv_bytes_per_token: int, *, scale: float = 1.0) -> None:
        self.linear = PiecewiseLinear.of(degree.linear)
        self.attend = Bilinear(degree.prefill_attention)
        self.decode_attend = Bilinear(degree.decode_attention)
        self.parallel_degree = degree.parallel_degree
        self.num_kv_tokens = degree.num_kv_tokens
        self.kv_bytes_per_token = kv_bytes_per_token
        self.link_bytes_per_s = links.inter_node_bytes_per_s * degree.parallel_degree
        self.node_bytes_per_s = links.intra_node_bytes_per_s * degree.parallel_degree
        self.host_bytes_per_s = links.host_bytes_per_s * degree.parallel_degree
        self.latency_s = links.latency_s
        self.scale = scale

    @classmethod
    def from_profile(cls, profile: Profile, parallel_degree: int, *, scale: float = 1.0) -> StepCosts:
        """Raises AmpdError INVALID_REQUEST for a degree that the profile does not have."""
        return cls(profile.degree(parallel_degree), profile.links, profile.kv_bytes_per_token, scale=scale)

    def decode_step_s(self, batch: int, mean_context: float) -> float:
        """T_dec: one token for each of `batch` sequences."""
        if batch <= 0:
            return 0.0
        return self.scale * (self.linear(batch) + self.decode_attend(batch, mean_context))

    def step_s(self, batch: int, mean_context: float, chunks: Sequence[tuple[int, int]]) -> float:
        """A mixed step: `batch` decodes and prefill chunks (history tokens, chunk tokens)."""
        num_tokens = batch
        attention_s = self.decode_attend(batch, mean_context) if batch else 0.0
        for history, chunk in chunks:
            num_tokens += chunk
            attention_s += self.attend(history, chunk)
        return self.scale * (self.linear(num_tokens) + attention_s) if num_tokens else 0.0

    def prefill_s(self, num_history: int, num_new: int) -> float:
        """T_pre: a prefill alone on the worker."""
        total_s = 0.0
        while num_new > PREFILL_STEP_TOKENS:
            total_s += self.linear(PREFILL_STEP_TOKENS) + self.attend(num_history, PREFILL_STEP_TOKENS)
            num_history += PREFILL_STEP_TOKENS
            num_new -= PREFILL_STEP_TOKENS
        if num_new > 0:
            total_s += self.linear(num_new) + self.attend(num_history, num_new)
        return self.scale * total_s

    def largest_chunk(self, batch: int, mean_context: float, num_history: int, budget_s: float) -> int:
        """The most prefill tokens that fit into a step of `budget_s` beside the decodes; 0 when none does."""
        rest_s = budget_s / self.scale - (self.decode_attend(batch, mean_context) if batch else 0.0)
        high = int(self.linear.inverse(rest_s)) - batch  # more cannot fit, attention aside
        low = 0
        while high - low > CHUNK_STEP:
            chunk = (low + high + 1) // 2
            if self.linear(batch + chunk) + self.attend(num_history, chunk) <= rest_s:
                low = chunk
            else:
                high = chunk - 1
        return low
