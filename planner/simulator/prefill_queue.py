"""The prefills of one worker: those that wait their turn, and those that have begun."""

from __future__ import annotations

from dataclasses import dataclass

from planner.simulator.kv_memory import SimKv
from planner.simulator.rounds import SimRound
from shared.core.load import WorkerLoad
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
    work_s: float  # predicted, of computing [start, stop)
    start: int = 0  # what is before it has KV, here or where it is fetched from
    is_fetching: bool = False  # its history is on its way

    @property
    def num_missing(self) -> int:
        """Positions that have no KV in device memory yet."""
        return self.stop - self.kv.num_tokens

    @property
    def is_elsewhere(self) -> bool:
        """Whether some of its history is to be fetched."""
        return self.kv.num_host_tokens > 0 or self.round.moved_from is not None

    def predict_again(self, load: WorkerLoad) -> None:
        """It has lost KV: what has none on the device or in host memory is to be computed."""
        self.start = self.kv.num_tokens + self.kv.num_host_tokens
        self.work_s = self.waiting.work_s = load.work_s(self.start, self.stop - self.start)

    def note_progress(self) -> None:
        """What is left of its work is what its place in the queue depends on."""
        self.waiting.work_s = self.work_s * self.num_missing / max(1, self.stop - self.start)


def make_prefill(round_: SimRound, kv: SimKv, *, is_local: bool, now: float) -> SimPrefill:
    waiting = WaitingPrefill(round_.key, round_.placed_at, round_.session.arrival, round_.deadline, round_.work_s)
    stop = round_.num_prompt + round_.num_produced
    return SimPrefill(round_, waiting, kv, stop, now, is_local, round_.work_s)


class PrefillQueue:
    """A remote prefill has begun before it is in the queue: room is kept for it while its history is read."""

    def __init__(self) -> None:
        self.waiting: list[SimPrefill] = []  # ready or restoring, by arrival
        self.unstaged: list[SimPrefill] = []  # for other workers, whose history is not asked for yet
        self.admitted: dict[SimPrefill, None] = {}  # have begun: they may take room to their end

    def begin(self, prefill: SimPrefill) -> None:
        self.admitted[prefill] = None
        prefill.start = prefill.kv.num_tokens + prefill.kv.num_host_tokens

    def end(self, prefill: SimPrefill) -> None:
        self.waiting.remove(prefill)
        del self.admitted[prefill]

    def count_reserved(self, num_decoding: int) -> int:
        """Room that the admitted prefills still need, and the batch for a while."""
        return sum(one.stop - one.kv.num_tokens for one in self.admitted) + num_decoding * DECODE_MARGIN_TOKENS

    def clear(self) -> None:
        self.waiting.clear()
        self.admitted.clear()
