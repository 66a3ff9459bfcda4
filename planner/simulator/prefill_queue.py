"""The prefills of one worker: those that wait their turn, and those that have begun."""

from __future__ import annotations

from dataclasses import dataclass

from planner.simulator.kv_memory import SimKv
from planner.simulator.rounds import SimRound
from shared.core.reordering import WaitingPrefill

DECODE_MARGIN_TOKENS = 32  # room kept for each sequence of the batch to grow


@dataclass(slots=True, eq=False)
class SimPrefill:
    """A prefill on a worker: compute positions [start, stop) of the round's session."""

    round: SimRound
    waiting: WaitingPrefill
    kv: SimKv
    stop: int
    arrival: float
    is_local: bool
    start: int = 0  # of what is computed; set when it is admitted
    is_fetching: bool = False  # its history is on its way

    @property
    def num_missing(self) -> int:
        """Positions that have no KV in device memory yet."""
        return self.stop - self.kv.num_tokens

    @property
    def is_elsewhere(self) -> bool:
        """Whether some of its history is to be fetched."""
        return self.kv.num_host_tokens > 0 or self.round.moved_from is not None


def make_prefill(round_: SimRound, kv: SimKv, *, is_local: bool, now: float) -> SimPrefill:
    waiting = WaitingPrefill(round_.key, round_.placed_at, round_.session.arrival, round_.deadline, round_.work_s)
    return SimPrefill(round_, waiting, kv, round_.num_prompt + round_.num_produced, now, is_local)


class PrefillQueue:
    """A remote prefill has begun before it is in the queue: room is kept for it while its history is read."""

    def __init__(self) -> None:
        self.waiting: list[SimPrefill] = []  # ready or restoring, by arrival
        self.admitted: dict[SimPrefill, None] = {}  # have begun: they may take room to their end

    def begin(self, prefill: SimPrefill) -> None:
        self.admitted[prefill] = None
        prefill.start = prefill.kv.num_tokens

    def end(self, prefill: SimPrefill) -> None:
        self.waiting.remove(prefill)
        del self.admitted[prefill]

    def count_reserved(self, num_decoding: int) -> int:
        """Room that the admitted prefills still need, and the batch for a while."""
        return sum(one.stop - one.kv.num_tokens for one in self.admitted) + num_decoding * DECODE_MARGIN_TOKENS

    def clear(self) -> None:
        self.waiting.clear()
        self.admitted.clear()
