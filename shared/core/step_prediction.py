"""What a worker expects its own steps to last: the costs of a profile, corrected by what was measured.

Without a profile only a rate is known, once something was measured.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from shared.core.step_costs import StepCosts
from shared.messages import StepTimes

CORRECTION_WEIGHT = 0.1  # of the newest step in a running mean
CORRECTION_RANGE = (0.2, 5.0)  # one step that the machine held up must not stop every prefill


class StepPredictor:
    """`costs` is a copy: its scale follows the measurements when `corrects` is set."""

    def __init__(self, costs: StepCosts | None = None, *, corrects: bool = False) -> None:
        self.costs = copy.copy(costs)
        self.tokens_per_s = 0.0  # measured, 0 when nothing was yet
        self.correction = 1.0  # measured / predicted, a running mean; this one of all steps
        self.prefill_correction = 1.0  # of steps that prefill
        self.decode_correction = 1.0  # of those that only decode
        self._prefill_s = self._prefill_profile_s = 0.0  # of all steps so far, measured and by the profile
        self._decode_s = self._decode_profile_s = 0.0
        self._scale = costs.scale if costs is not None else 1.0
        self._corrects = corrects

    def prefill_s(self, num_history: int, num_new: int) -> float:
        """Seconds to compute `num_new` tokens after `num_history`; 0 when nothing is known."""
        if self.costs is not None:
            return self.costs.prefill_s(num_history, num_new)
        return num_new / self.tokens_per_s if self.tokens_per_s > 0 else 0.0

    def work_s(self, num_history: int, num_new: int) -> float:
        """Of the worker's time, when steps are full: what queues are made of. The fixed part of a step is shared."""
        if self.costs is not None:
            return self.costs.work_s(num_history, num_new)
        return self.prefill_s(num_history, num_new)

    def read_host_s(self, num_tokens: int) -> float:
        """Seconds to bring KV of `num_tokens` tokens back from host memory."""
        if self.costs is None:
            return 0.0
        return self.costs.latency_s + num_tokens * self.costs.kv_bytes_per_token / self.costs.host_bytes_per_s

    def read_peer_s(self, num_tokens: int) -> float:
        """Seconds to bring KV of `num_tokens` tokens back from another worker."""
        if self.costs is None:
            return 0.0
        return self.costs.latency_s + num_tokens * self.costs.kv_bytes_per_token / self.costs.link_bytes_per_s

    def observe(self, batch: int, mean_context: float, chunks: Sequence[tuple[int, int]], seconds: float) -> None:
        """A step of `batch` decodes and chunks (history, tokens) has lasted `seconds`."""
        if self.costs is None:
            return
        predicted_s = self.costs.step_s(batch, mean_context, chunks) * self._scale / self.costs.scale
        self.correction = correct(self.correction, predicted_s, seconds)
        if chunks:
            self.prefill_correction = correct(self.prefill_correction, predicted_s, seconds)
            self._prefill_s += seconds
            self._prefill_profile_s += predicted_s
        else:
            self.decode_correction = correct(self.decode_correction, predicted_s, seconds)
            self._decode_s += seconds
            self._decode_profile_s += predicted_s
        if self._corrects:
            self.costs.scale = self._scale * self.correction

    @property
    def times(self) -> StepTimes:
        return StepTimes(
            prefill_s=self._prefill_s,
            prefill_profile_s=self._prefill_profile_s,
            decode_s=self._decode_s,
            decode_profile_s=self._decode_profile_s,
        )

    @property
    def prefill_scale(self) -> float:
        """Of steps that prefill, over the profile's durations; 0 without a profile."""
        return self._scale * self.prefill_correction if self.costs is not None else 0.0

    @property
    def decode_scale(self) -> float:
        """Of steps that only decode, over the profile's durations; 0 without a profile."""
        return self._scale * self.decode_correction if self.costs is not None else 0.0


def correct(correction: float, predicted_s: float, measured_s: float, num_steps: int = 1) -> float:
    """The running mean of measured over predicted durations after so many equal steps more. Steps are compared, not
    prefills: what a prefill takes also says who shared its steps, and who went before."""
    if predicted_s <= 0.0 or measured_s <= 0.0:
        return correction
    low, high = CORRECTION_RANGE
    ratio = min(high, max(low, measured_s / predicted_s))
    return ratio + (correction - ratio) * (1.0 - CORRECTION_WEIGHT) ** num_steps
