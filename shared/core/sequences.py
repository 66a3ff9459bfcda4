"""Sessions' KV on one worker, and the sequences that run on it."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from shared.core.reordering import WaitingPrefill
from shared.core.retention import GapStats
from shared.core.types import RoundKey, SessionKey
from shared.messages import SamplingParams


class SequenceState(Enum):
    WAITING_KV = "waiting_kv"  # its prefill runs on another worker; its blocks may be read or written by a transfer
    READY = "ready"  # has tokens to compute
    RESTORING = "restoring"  # as READY, once its KV is back from host memory
    ENDED = "ended"


@dataclass(eq=False)
class SessionKv:
    """Tokens of one session and the KV this worker holds of them.

    Invariant: positions [0, num_kv) have valid KV in block_table; num_kv <= num_tokens.
    `tokens[0]` is at position `tokens_base`; of the tokens before it `checksum`, their zlib.crc32, is known (a prefill
    whose history comes as KV, or KV kept for a session bound elsewhere).
    """

    key: SessionKey
    tokens: array[int] = field(default_factory=lambda: array("i"))
    tokens_base: int = 0
    checksum: int = 0
    num_kv: int = 0
    block_table: list[int] = field(default_factory=list)
    last_used: float = 0.0
    sequence: Sequence | None = None
    pinned: bool = False  # a transfer reads or writes its blocks: not to be evicted even while no sequence runs
    resident: bool = False  # kept for a session bound elsewhere: another worker should have the KV, too
    num_leased: int = 0  # positions that another worker may read although the session is idle
    revoke_lease: Callable[[], object] | None = None  # called once, before any of them is given up
    lent: bool = False  # to the worker that the session moves to: not to be evicted meanwhile
    told: tuple[int, int] = (0, 0)  # tokens in the pool, and behind them in host memory, that the coordinator knows of
    gaps: GapStats = field(default_factory=GapStats)
    last_round: int = -1

    @property
    def num_tokens(self) -> int:
        return self.tokens_base + len(self.tokens)

    @property
    def num_missing(self) -> int:
        """Tokens that are known and whose KV is not."""
        return self.num_tokens - self.num_kv

    def identify(self, num_tokens: int) -> tuple[int, int]:
        """(n, zlib.crc32 of the tokens [0, n)) for the smallest n >= num_tokens that is known."""
        known = self.tokens[: max(0, num_tokens - self.tokens_base)]
        return self.tokens_base + len(known), zlib.crc32(known.tobytes(), self.checksum)


@dataclass(eq=False)
class Sequence:
    """One attempt at a round while it runs on this worker."""

    key: RoundKey
    kv: SessionKv
    sampling: SamplingParams
    output_start: int  # position of the first output token
    arrival: float
    state: SequenceState = SequenceState.READY
    preemptible: bool = True  # False: all its blocks are reserved up front, and a transfer reads them
    on_layer: Callable[[int, int, int], object] | None = None  # (layer, token_start, token_stop), in the forward thread
    on_start: Callable[[], object] | None = None  # its first step begins
    waiting: WaitingPrefill | None = None  # as reordering sees its prefill; None: it has no deadline
    itl_slo_s: float = 0.5
    num_preemptions: int = 0
    first_step_at: float | None = None
    first_token_at: float | None = None  # when it was first ready to decode
    admitted: bool = False  # its prefill may take room to its end; no longer, once it has been preempted

    @property
    def has_produced(self) -> bool:
        return self.kv.num_tokens > self.output_start

    def as_waiting(self) -> WaitingPrefill:
        if self.waiting is None:
            self.waiting = WaitingPrefill(self.key, self.arrival, self.arrival, float("inf"), 0.0)
        return self.waiting


@dataclass(frozen=True, slots=True)
class PlannedItem:
    """Feed `num_tokens` tokens of the sequence from position kv.num_kv on; `samples`: none is missing after them."""

    sequence: Sequence
    num_tokens: int
    samples: bool
