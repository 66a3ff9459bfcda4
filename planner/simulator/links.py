"""Links between workers: each end carries what it sends, and what it receives, one transfer after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.simulator.worker import SimWorker


class Links:
    """Contention: a transfer takes its turn at the source's way out and at the destination's way in, each at its own
    rate, and has arrived when both have carried it. Neither idles for the other, as transfers of several peers share a
    link. Within a node and between nodes are links of their own."""

    def __init__(self, *, bandwidth_scale: float = 1.0) -> None:
        self._out_free_at: dict[tuple[int, bool], float] = {}  # (worker, within its node)
        self._in_free_at: dict[tuple[int, bool], float] = {}
        self._bandwidth_scale = bandwidth_scale
        self.num_bytes = 0

    def transfer(
        self, source: SimWorker, destination: SimWorker, num_tokens: int, now: float, hidden_s: float
    ) -> float:
        """When KV of `num_tokens` has arrived. It may have been under way for `hidden_s` (layer by layer, while it was
        computed), at most for as long as the links were free."""
        num_bytes = num_tokens * source.costs.kv_bytes_per_token
        within = source.node == destination.node
        out_rate, in_rate = (
            (source.costs.node_bytes_per_s, destination.costs.node_bytes_per_s)
            if within
            else (source.costs.link_bytes_per_s, destination.costs.link_bytes_per_s)
        )
        out, into = (source.index, within), (destination.index, within)
        sent_at = self._carry(self._out_free_at, out, num_bytes / out_rate, now - hidden_s)
        received_at = self._carry(self._in_free_at, into, num_bytes / in_rate, now - hidden_s)
        self.num_bytes += num_bytes
        return max(now, sent_at, received_at) + source.costs.latency_s

    def _carry(
        self, free_at: dict[tuple[int, bool], float], end: tuple[int, bool], seconds: float, begin: float
    ) -> float:
        free_at[end] = done_at = max(begin, free_at.get(end, 0.0)) + seconds / self._bandwidth_scale
        return done_at

    def idle_at(self, source: SimWorker, destination: SimWorker) -> float:
        within = source.node == destination.node
        return max(
            self._out_free_at.get((source.index, within), 0.0), self._in_free_at.get((destination.index, within), 0.0)
        )
