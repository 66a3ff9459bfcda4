"""The simulated sessions and rounds: what is planned, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loadgen.plan import PlannedRound, PlannedSession
from shared.core.retention import GapStats
from shared.core.routing import RoutingDecision
from shared.core.types import RoundKey, SessionKey

if TYPE_CHECKING:
    from planner.simulator.worker import SimWorker

TENANT = "simulated"


class SimSession:
    """One session. Compared and hashed by identity."""

    __slots__ = ("arrival", "decode", "ended_at", "gaps", "index", "key", "num_promised", "num_tokens", "planned",
                 "resident", "running")  # fmt: skip

    def __init__(self, planned: PlannedSession) -> None:
        self.index = planned.index
        self.planned = planned
        self.key = SessionKey(TENANT, str(planned.index))
        self.arrival = planned.arrival_s
        self.num_tokens = 0  # of its finished rounds
        self.decode: SimWorker | None = None  # bound here
        self.num_promised = 0
        self.resident: dict[str, int] = {}  # worker -> tokens of this session's KV kept there, as far as is known
        self.gaps = GapStats()
        self.ended_at = 0.0
        self.running: SimRound | None = None


@dataclass(slots=True, eq=False)
class SimRound:
    """One round from the client's request to its last token. Times are simulated seconds since the start."""

    session: SimSession
    index: int
    planned: PlannedRound
    sent_at: float
    deadline: float
    decode: SimWorker
    moved_from: SimWorker | None = None  # its session's KV is to be fetched from there
    decision: RoutingDecision | None = None
    work_s: float = 0.0  # of its prefill, as predicted
    num_history: int = 0
    num_cached: int = 0  # on the decode worker when its prefill was placed
    num_produced: int = 0  # output tokens by the time it was last stopped
    attempt: int = 1
    joined_tick: int = 0  # of its decode worker, when it began to decode
    finish_tick: int = 0
    entry: int = 0  # of the finish heap: an older one is void
    placed_at: float = 0.0
    started_at: float = -1.0  # its prefill's first step
    first_token_at: float = -1.0
    last_token_at: float = -1.0  # of those produced before it joined a batch, or left it
    finished_at: float = -1.0
    transfer_s: float = 0.0
    kv_bytes_read: int = 0
    kv_bytes_written: int = 0
    num_preemptions: int = 0
    gaps: list[tuple[int, float]] = field(default_factory=list)  # (count, seconds), in order
    error: str = ""

    @property
    def num_prompt(self) -> int:
        return self.num_history + self.planned.input_tokens

    @property
    def key(self) -> RoundKey:
        return RoundKey(TENANT, self.session.key.session, self.index, self.attempt)

    @property
    def is_remote(self) -> bool:
        return self.decision is not None and self.decision.placement == "remote"

    @property
    def ttft_s(self) -> float:
        return self.first_token_at - self.sent_at

    def note_token(self, now: float) -> None:
        """A prefill ends with a token: the first, or the next one after a preemption or a restart."""
        if self.first_token_at < 0.0:
            self.first_token_at = now
        else:
            self.gaps.append((1, now - self.last_token_at))
        self.last_token_at = now
        self.num_produced += 1

    @property
    def num_gaps(self) -> int:
        return sum(count for count, _ in self.gaps)

    @property
    def tpot_s(self) -> float:
        """0 for a round of one token."""
        num_gaps, total_s = 0, 0.0
        for count, gap_s in self.gaps:
            num_gaps += count
            total_s += count * gap_s
        return total_s / num_gaps if num_gaps else 0.0

    def percentile_gap_s(self, share: float) -> float:
        """The gap that `share` of the round's gaps do not exceed (nearest rank); 0 without gaps."""
        num_above = self.num_gaps - int(share * self.num_gaps + 0.999999)
        for count, gap_s in sorted(self.gaps, key=lambda run: -run[1]):
            num_above -= count
            if num_above < 0:
                return gap_s
        return 0.0
