"""What a simulated worker tells the coordinator's side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from planner.simulator.kv_memory import SimKv
from planner.simulator.rounds import SimRound

if TYPE_CHECKING:
    from planner.simulator.worker import SimWorker


class WorkerReports(Protocol):
    def prefill_ended(self, round_: SimRound, worker: SimWorker, now: float) -> None:
        """A prefill is computed."""

    def prefill_refused(self, round_: SimRound, worker: SimWorker, now: float) -> None:
        """A remote prefill has no room on `worker`."""

    def hand_over(self, round_: SimRound, source: SimWorker, kv: SimKv, now: float) -> None:
        """A remote prefill is computed: its KV is to go to the decode worker."""

    def round_ended(self, round_: SimRound, now: float) -> None:
        """A round has its last token."""
