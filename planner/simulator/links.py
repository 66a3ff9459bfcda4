"""Links between workers: each end carries one transfer after another, at the slower end's rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.simulator.worker import SimWorker


class Links:
    """Contention: a transfer starts when both the source's way out and the destination's way in are free."""

    def __init__(self, *, bandwidth_scale: float = 1.0) -> None:
        self._out_free_at: dict[int, float] = {}
        self._in_free_at: dict[int, float] = {}
        self._bandwidth_scale = bandwidth_scale
        self.num_bytes = 0

    def transfer(
        self, source: SimWorker, destination: SimWorker, num_tokens: int, now: float, hidden_s: float
    ) -> float:
        """When KV of `num_tokens` has arrived. It may have been under way for `hidden_s` (layer by layer, while it was
        computed), at most for as long as the links were free."""
        costs = source.costs
        num_bytes = num_tokens * costs.kv_bytes_per_token
        if source.node == destination.node:
            rate = min(costs.node_bytes_per_s, destination.costs.node_bytes_per_s)
        else:
            rate = min(costs.link_bytes_per_s, destination.costs.link_bytes_per_s)
        free_at = max(self._out_free_at.get(source.index, 0.0), self._in_free_at.get(destination.index, 0.0))
        start = max(now - hidden_s, free_at)
        end = max(now, start + num_bytes / (rate * self._bandwidth_scale)) + costs.latency_s
        self._out_free_at[source.index] = self._in_free_at[destination.index] = end
        self.num_bytes += num_bytes
        return end

    def idle_at(self, source: SimWorker, destination: SimWorker) -> float:
        return max(self._out_free_at.get(source.index, 0.0), self._in_free_at.get(destination.index, 0.0))
