"""How long one step, one prefill or one transfer takes on one worker: a profile's tables, made fast to ask."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import ceil

from shared.core.profile import Curve, DegreeProfile, Grid, Links, Profile

CHUNK_STEP = 8  # tokens: a largest chunk is found to within this
MIN_ADDED_S = 1e-9  # of a chunk that costs a step nothing: a measured curve may be flat
FULL_STEP_TOKENS = 2_048  # of a step at the best rate
PREFILL_STEP_TOKENS = 8_192  # T_pre of more tokens is the sum of steps of this size


class PiecewiseLinear:
    """y(x) through ascending points; beyond the ends the nearest piece goes on, never below 0."""

    __slots__ = ("_cuts", "_inner_ys", "_offsets", "_slopes", "_xs", "_ys")

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self._xs = [float(x) for x in xs]
        self._ys = [float(y) for y in ys]
        self._slopes = [
            (y1 - y0) / (x1 - x0)
            for x0, x1, y0, y1 in zip(self._xs, self._xs[1:], self._ys, self._ys[1:], strict=False)
        ]
        self._offsets = [y - x * slope for x, y, slope in zip(self._xs, self._ys, self._slopes, strict=False)]
        self._cuts, self._inner_ys = self._xs[1:-1], self._ys[1:-1]  # the first and the last piece have no end

    @classmethod
    def of(cls, curve: Curve) -> PiecewiseLinear:
        return cls(curve.at, curve.s)

    def at(self, x: float) -> float:
        index = bisect_right(self._cuts, x)
        y = self._offsets[index] + x * self._slopes[index]
        return y if y > 0.0 else 0.0

    def piece_at(self, y: float) -> tuple[float, float]:
        """(offset, slope) of the piece that reaches `y`; y must ascend."""
        index = bisect_right(self._inner_ys, y)
        return self._offsets[index], self._slopes[index]

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
    """y(row, column): bilinear in every cell of a grid; the cells at the edges go on beyond it, never below 0.

    A cell is its four coefficients: y = a + b * column + row * (c + d * column).
    """

    __slots__ = ("_cells", "_column_cuts", "_row_cuts")

    def __init__(self, grid: Grid) -> None:
        self._row_cuts = [float(row) for row in grid.rows[1:-1]]
        self._column_cuts = [float(column) for column in grid.columns[1:-1]]
        self._cells = [
            [_fit_cell(grid, row, column) for column in range(len(grid.columns) - 1)]
            for row in range(len(grid.rows) - 1)
        ]

    def at(self, row: float, column: float) -> float:
        a, b, c, d = self._cells[bisect_right(self._row_cuts, row)][bisect_right(self._column_cuts, column)]
        y = a + b * column + row * (c + d * column)
        return y if y > 0.0 else 0.0


def _fit_cell(grid: Grid, row: int, column: int) -> tuple[float, float, float, float]:
    """Coefficients of the bilinear function through the corners of the cell that begins at (row, column)."""
    (r0, r1), (c0, c1) = grid.rows[row : row + 2], grid.columns[column : column + 2]
    (y00, y01), (y10, y11) = (one[column : column + 2] for one in grid.s[row : row + 2])
    low_slope, high_slope = (y01 - y00) / (c1 - c0), (y11 - y10) / (c1 - c0)
    low_offset, high_offset = y00 - low_slope * c0, y10 - high_slope * c0
    c, d = (high_offset - low_offset) / (r1 - r0), (high_slope - low_slope) / (r1 - r0)
    return low_offset - c * r0, low_slope - d * r0, c, d


class StepCosts:
    """Durations on one worker in seconds. `scale` multiplies every computed time (a running correction, a what-if)."""

    __slots__ = (
        "_attended",
        "_attended_before",
        "_decode_attended",
        "_efficient",
        "attend",
        "attend_floor_s",
        "decode_attend",
        "host_bytes_per_s",
        "kv_bytes_per_token",
        "latency_s",
        "linear",
        "link_bytes_per_s",
        "node_bytes_per_s",
        "num_kv_tokens",
        "parallel_degree",
        "scale",
        "token_s",
    )

    def __init__(self, degree: DegreeProfile, links: Links, kv_bytes_per_token: int, *, scale: float = 1.0) -> None:
        self.linear = PiecewiseLinear.of(degree.linear)
        self.attend = Bilinear(degree.prefill_attention)
        self.decode_attend = Bilinear(degree.decode_attention)
        self.attend_floor_s = self.attend.at(0, 1)
        self.token_s = self.linear.at(FULL_STEP_TOKENS) / FULL_STEP_TOKENS
        self._attended = self._attended_before = (0, 1, self.attend_floor_s)
        self._decode_attended = (0, 0.0, self.decode_attend.at(0, 0.0))
        self._efficient: dict[tuple[int, float, int, int], int] = {}
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

    def attend_s(self, num_history: int, num_new: int) -> float:
        """Attention of one prefill chunk, unscaled. A decision asks for the same two several times in turn."""
        asked_history, asked_new, attended_s = self._attended
        if asked_history == num_history and asked_new == num_new:
            return attended_s
        asked_history, asked_new, attended_s = self._attended_before
        if asked_history == num_history and asked_new == num_new:
            return attended_s
        attended_s = self.attend.at(num_history, num_new)
        self._attended_before = self._attended
        self._attended = (num_history, num_new, attended_s)
        return attended_s

    def decode_attend_s(self, batch: int, mean_context: float) -> float:
        """Attention of a decode step, unscaled. A decision asks for the same one several times in turn."""
        asked_batch, asked_context, attended_s = self._decode_attended
        if asked_batch == batch and asked_context == mean_context:
            return attended_s
        attended_s = self.decode_attend.at(batch, mean_context)
        self._decode_attended = (batch, mean_context, attended_s)
        return attended_s

    def work_s(self, num_history: int, num_new: int) -> float:
        """Time that a prefill takes of a worker whose steps are full: its tokens at the best rate, its attention."""
        attended_s = self.attend_s(num_history, num_new) - self.attend_floor_s
        return self.scale * (num_new * self.token_s + max(0.0, attended_s))

    def decode_step_s(self, batch: int, mean_context: float) -> float:
        """T_dec: one token for each of `batch` sequences."""
        if batch <= 0:
            return 0.0
        return self.scale * (self.linear.at(batch) + self.decode_attend_s(batch, mean_context))

    def step_s(self, batch: int, mean_context: float, chunks: Sequence[tuple[int, int]]) -> float:
        """A mixed step: `batch` decodes and prefill chunks (history tokens, chunk tokens).

        The attention of all chunks is one launch: what even one token takes is counted once.
        """
        num_tokens = batch
        attention_s = self.decode_attend_s(batch, mean_context) if batch else 0.0
        for index, (history, chunk) in enumerate(chunks):
            num_tokens += chunk
            attended_s = self.attend_s(history, chunk)
            attention_s += attended_s if index == 0 else max(0.0, attended_s - self.attend_floor_s)
        return self.scale * (self.linear.at(num_tokens) + attention_s) if num_tokens else 0.0

    def chunk_step_s(self, batch: int, mean_context: float, num_history: int, num_new: int) -> float:
        """`step_s` with one prefill chunk, of one token at least: what every prediction asks for."""
        attention_s = self.attend_s(num_history, num_new)
        if batch:
            attention_s += self.decode_attend_s(batch, mean_context)
        return self.scale * (self.linear.at(batch + num_new) + attention_s)

    def prefill_s(self, num_history: int, num_new: int) -> float:
        """T_pre: a prefill alone on the worker."""
        total_s = 0.0
        while num_new > PREFILL_STEP_TOKENS:
            total_s += self.linear.at(PREFILL_STEP_TOKENS) + self.attend.at(num_history, PREFILL_STEP_TOKENS)
            num_history += PREFILL_STEP_TOKENS
            num_new -= PREFILL_STEP_TOKENS
        if num_new > 0:
            total_s += self.linear.at(num_new) + self.attend_s(num_history, num_new)
        return self.scale * total_s

    def sliced_prefill_s(
        self,
        batch: int,
        mean_context: float,
        num_history: int,
        num_new: int,
        limit_s: float,
        *,
        min_chunk: int,
        max_chunk: int,
    ) -> float:
        """A prefill beside `batch` decodes, in equal chunks as large as keep each step within `limit_s`; chunks are of
        min_chunk tokens at least and max_chunk at most. As many steps as the linear piece that reaches the limit and
        the attention in all ask for: no chunk is sought."""
        limit_s /= self.scale
        decode_s = self.decode_attend_s(batch, mean_context)
        attended_s = max(0.0, self.attend_s(num_history, num_new) - self.attend_floor_s)
        offset, slope = self.linear.piece_at(limit_s - decode_s)
        room_s = limit_s - (offset + slope * batch + decode_s + self.attend_floor_s)
        num_steps = -(-num_new // min_chunk)
        if room_s > 0.0:
            num_steps = min(num_steps, ceil((slope * num_new + attended_s) / room_s))
        num_steps = max(num_steps, -(-num_new // max_chunk))
        chunk = num_new / num_steps
        step_s = self.linear.at(batch + chunk) + decode_s + self.attend.at(num_history + num_new / 2, chunk)
        return self.scale * num_steps * step_s

    def count_fitting_tokens(self, batch: int, mean_context: float, limit_s: float) -> int:
        """Prefill tokens that fit a step of `limit_s` beside the decodes, whatever they attend to; never below 0."""
        rest_s = limit_s / self.scale - self.decode_attend_s(batch, mean_context) - self.attend_floor_s
        return max(0, int(self.linear.inverse(rest_s)) - batch)

    def efficient_chunk(self, batch: int, share: float, least: int, most: int) -> int:
        """The fewest prefill tokens, by doubling `least`, that cost a step beside `batch` decodes so little each that
        `share` of the best rate up to `most` is reached; attention to a history aside, which costs the same in any
        chunks."""
        asked = (batch, share, least, most)
        found = self._efficient.get(asked)
        if found is None:
            sizes = [least << power for power in range(32) if least << power <= max(least, most)]
            decode_s = self.linear.at(batch) if batch else 0.0
            added_s = [self.linear.at(batch + size) + self.attend_floor_s - decode_s for size in sizes]
            rates = [size / max(MIN_ADDED_S, one_s) for size, one_s in zip(sizes, added_s, strict=True)]
            enough = share * max(rates)
            found = next(size for size, rate in zip(sizes, rates, strict=True) if rate >= enough)
            self._efficient[asked] = found
        return found

    def largest_chunk(self, batch: int, mean_context: float, num_history: int, budget_s: float) -> int:
        """The most prefill tokens that fit into a step of `budget_s` beside the decodes; 0 when none does."""
        linear, attend = self.linear, self.attend
        rest_s = budget_s / self.scale - (self.decode_attend_s(batch, mean_context) if batch else 0.0)
        low, high = 0, int(linear.inverse(rest_s)) - batch  # more cannot fit, attention aside
        if high <= 0:
            return 0
        over_low = linear.at(batch) + attend.at(num_history, 0) - rest_s
        over_high = linear.at(batch + high) + attend.at(num_history, high) - rest_s
        if over_low > 0.0:
            return 0
        if over_high <= 0.0:
            return high
        was_low: bool | None = None
        while high - low > CHUNK_STEP:  # false position; the end that stays twice counts half (the Illinois method)
            chunk = low + int((high - low) * over_low / (over_low - over_high))
            chunk = min(max(chunk, low + 1), high - 1)
            over = linear.at(batch + chunk) + attend.at(num_history, chunk) - rest_s
            if over <= 0.0:
                low, over_low = chunk, over
                over_high *= 0.5 if was_low is True else 1.0
            else:
                high, over_high = chunk, over
                over_low *= 0.5 if was_low is False else 1.0
            was_low = over <= 0.0
        return low


class StepCost:
    """A mixed step that chunks are added to one by one (see `StepCosts.step_s`)."""

    __slots__ = ("_attention_s", "_costs", "_num_tokens")

    def __init__(self, costs: StepCosts, batch: int, mean_context: float) -> None:
        self._costs = costs
        self._num_tokens = batch
        self._attention_s = costs.attend_floor_s + (costs.decode_attend_s(batch, mean_context) if batch else 0.0)

    def add(self, history: int, chunk: int) -> float:
        """Seconds that the step takes with one chunk more."""
        costs = self._costs
        self._num_tokens += chunk
        self._attention_s += max(0.0, costs.attend_s(history, chunk) - costs.attend_floor_s)
        return costs.scale * (costs.linear.at(self._num_tokens) + self._attention_s)
