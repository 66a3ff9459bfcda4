"""How long prefills, transfers and decode steps take: what routing and reordering predict with.

`LinearCostModel` is fitted online from what workers measure. A profile's piecewise model implements the same
protocol: everything that predicts asks for `CostModel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shared.messages import Heartbeat

PRIOR_PREFILL_TOKENS_PER_S = 2_000.0
PRIOR_KV_BYTES_PER_S = 500e6
PRIOR_DECODE_STEP_S = 0.05
PREFILL_OVERHEAD_S = 0.002
TRANSFER_OVERHEAD_S = 0.002
# A new token attends to every token before it: at this many tokens of context, attention costs as much as the rest.
ATTENTION_EQUAL_TOKENS = 20_000.0
CORRECTION_WEIGHT = 0.2  # of the newest measurement in the running correction
CORRECTION_RANGE = (0.1, 10.0)


class CostModel(Protocol):
    """Predictions in seconds, per worker (a worker has its own device and parallel degree)."""

    def predict_prefill_s(self, worker_id: str, num_history_tokens: int, num_new_tokens: int) -> float: ...

    def predict_queue_s(self, worker_id: str, num_tokens: int) -> float:
        """Time to work off a queue of `num_tokens` new tokens whose contexts are not known."""

    def predict_transfer_s(self, source_id: str, destination_id: str, num_tokens: int) -> float: ...

    def predict_decode_step_s(self, worker_id: str, batch_size: int, num_context_tokens: int) -> float: ...

    def observe_worker(self, heartbeat: Heartbeat) -> None:
        """Learn a worker's measured rates."""

    def observe_prefill(self, worker_id: str, num_history_tokens: int, num_new_tokens: int, prefill_s: float) -> None:
        """Learn from one prefill that has ended."""

    def forget_worker(self, worker_id: str) -> None: ...


@dataclass(slots=True)
class _Rates:
    prefill_tokens_per_s: float = PRIOR_PREFILL_TOKENS_PER_S
    kv_bytes_per_s: float = PRIOR_KV_BYTES_PER_S
    kv_bytes_per_token: int = 0
    decode_step_s: float = PRIOR_DECODE_STEP_S
    prefill_correction: float = 1.0  # measured / predicted, a running mean


_PRIOR = _Rates()


class LinearCostModel:
    """T_pre = overhead + l_incr / rate * (1 + mean context / 20k), T_kv = overhead + bytes / rate, T_dec measured.

    Rates come from the newest heartbeat; a running correction per worker follows single prefills.
    """

    def __init__(self) -> None:
        self._rates: dict[str, _Rates] = {}

    def predict_prefill_s(self, worker_id: str, num_history_tokens: int, num_new_tokens: int) -> float:
        rates = self._rates.get(worker_id, _PRIOR)
        return rates.prefill_correction * _prefill_s(rates, num_history_tokens, num_new_tokens)

    def predict_queue_s(self, worker_id: str, num_tokens: int) -> float:
        rates = self._rates.get(worker_id, _PRIOR)
        return rates.prefill_correction * num_tokens / rates.prefill_tokens_per_s

    def predict_transfer_s(self, source_id: str, destination_id: str, num_tokens: int) -> float:
        if num_tokens <= 0:
            return 0.0
        source = self._rates.get(source_id, _PRIOR)
        destination = self._rates.get(destination_id, _PRIOR)
        num_bytes = num_tokens * max(source.kv_bytes_per_token, destination.kv_bytes_per_token)
        return TRANSFER_OVERHEAD_S + num_bytes / min(source.kv_bytes_per_s, destination.kv_bytes_per_s)

    def predict_decode_step_s(self, worker_id: str, batch_size: int, num_context_tokens: int) -> float:
        return self._rates.get(worker_id, _PRIOR).decode_step_s

    def observe_worker(self, heartbeat: Heartbeat) -> None:
        rates = self._rates.setdefault(heartbeat.worker_id, _Rates())
        rates.kv_bytes_per_token = heartbeat.kv_bytes_per_token
        if heartbeat.prefill_tokens_per_s > 0:
            rates.prefill_tokens_per_s = heartbeat.prefill_tokens_per_s
        if heartbeat.kv_bytes_per_s > 0:
            rates.kv_bytes_per_s = heartbeat.kv_bytes_per_s
        if heartbeat.decode_step_s > 0:
            rates.decode_step_s = heartbeat.decode_step_s

    def observe_prefill(self, worker_id: str, num_history_tokens: int, num_new_tokens: int, prefill_s: float) -> None:
        rates = self._rates.get(worker_id)
        if rates is None or prefill_s <= 0 or num_new_tokens <= 0:
            return
        low, high = CORRECTION_RANGE
        ratio = min(high, max(low, prefill_s / _prefill_s(rates, num_history_tokens, num_new_tokens)))
        rates.prefill_correction += CORRECTION_WEIGHT * (ratio - rates.prefill_correction)

    def forget_worker(self, worker_id: str) -> None:
        self._rates.pop(worker_id, None)


def _prefill_s(rates: _Rates, num_history_tokens: int, num_new_tokens: int) -> float:
    if num_new_tokens <= 0:
        return 0.0
    mean_context = num_history_tokens + num_new_tokens / 2
    return PREFILL_OVERHEAD_S + num_new_tokens / rates.prefill_tokens_per_s * (
        1 + mean_context / ATTENTION_EQUAL_TOKENS
    )
