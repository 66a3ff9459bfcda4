"""One session: its durable part, folded from record entries, and what the coordinator knows on top of it.

`Session.apply` is the only place where an entry changes a session, live and after a restart alike. Live, an entry
is applied when it is put into the outbox: memory runs ahead of the record, effects (replies, commands to workers)
wait until the record has it.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from shared.core.commands import Command
from shared.core.events import ClientRequested
from shared.core.fleet import WorkerState
from shared.core.records import (
    AttemptStartedEntry,
    RecordEntry,
    RoundEndedEntry,
    RoundStartedEntry,
    SessionClosedEntry,
    SessionOpenedEntry,
    WorkerRef,
)
from shared.core.routing import RoutingDecision
from shared.core.stream_output import StreamOutput
from shared.core.token_bytes import TOKEN_BYTES, count_tokens, last_token, slice_tokens
from shared.core.types import SessionKey
from shared.messages import ErrorReply, FinishReason, HistoryGranted, Slo, Usage

Phase = Literal[
    "recording",  # the attempt's entry is on its way into the record
    "starting",  # run_round is on its way to the decode worker
    "prefilling",  # the decode worker has the round
    "decoding",  # its first new token was seen
    "waiting",  # for the next attempt's time, or for a worker
    "reconciling",  # after a restart: for a word from the worker that had the round
    "stopping",  # for the worker's word that nothing more will come
]


@dataclass(frozen=True, slots=True)
class HeldKv:
    """KV of a session that a worker is believed to have: positions [0, num_device_tokens), and in its host memory those
    of the next num_host_tokens."""

    num_device_tokens: int = 0
    num_host_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_device_tokens + self.num_host_tokens

    def cut(self, num_tokens: int) -> HeldKv:
        """What it is of the first `num_tokens` positions."""
        num_device = min(self.num_device_tokens, num_tokens)
        return HeldKv(num_device, min(self.num_host_tokens, num_tokens - num_device))


NOTHING_HELD = HeldKv()


@dataclass(slots=True)
class Move:
    """The session has left `source` for this attempt, and is to take its KV along (see moving.py)."""

    source: WorkerRef
    num_known_tokens: int  # there, as is `held`
    held: HeldKv
    grant_id: int | None = None  # of the command that asks for the KV
    granted: HistoryGranted | None = None
    is_settled: bool = False  # granted, or not to be had


@dataclass(slots=True)
class RoundInFlight:
    """The round that runs. `started` and the fields up to `prefill` are durable, the rest is the coordinator's."""

    started: RoundStartedEntry
    attempt: int
    forced: bytes
    decode: WorkerRef
    prefill: WorkerRef | None
    deadline_s: float  # what remained when the attempt started
    phase: Phase
    output: StreamOutput
    received_at: float = 0.0
    recovered: bool = False  # begun under an earlier coordinator: its times are not known
    delay_s: float | None = None  # idle time of the session before it
    deadline_at: float = 0.0
    not_before: float = 0.0  # waiting: next try; stopping, reconciling: end of patience
    no_worker_since: float | None = None
    first_token_at: float | None = None
    ended_at_worker: bool = False  # the worker says it has finished: round_ended is on its way
    prefill_sent: bool = False
    prefill_ended: bool = False
    avoid: set[str] = field(default_factory=set)  # workers that failed this round
    num_remote_failures: int = 0
    decision: RoutingDecision | None = None
    move: Move | None = None  # until its first token
    num_prefill_tokens: int = 0  # counted at the worker that prefills
    stop_reason: ErrorReply | None = None
    cancel_requests: list[int] = field(default_factory=list)

    @property
    def index(self) -> int:
        return self.started.round

    @property
    def is_ending(self) -> bool:
        """It has ended for the client, or may have; the coordinator waits for the worker's report."""
        return self.phase in ("reconciling", "stopping") or self.ended_at_worker or self.output.finished is not None

    @property
    def num_input_tokens(self) -> int:
        return count_tokens(self.started.input_token_ids)


@dataclass(frozen=True, slots=True)
class EndedRound:
    index: int
    attempt: int
    num_history_tokens: int
    num_input_tokens: int
    idempotency_key: str
    digest: bytes
    stop: tuple[str, ...]
    output_start: int  # of a finished round: index of its first output token in the history
    num_output_tokens: int
    failed_output: bytes  # of a failed round: its output is not in the history
    finish_reason: FinishReason | None
    usage: Usage | None
    error: ErrorReply | None
    slo: Slo
    # not durable: of rounds that this coordinator placed and saw
    decision: RoutingDecision | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(slots=True)
class Binding:
    """The session's decode worker. Tokens [0, num_known_tokens) need not be sent to it again."""

    worker: WorkerState
    num_known_tokens: int
    num_promised_tokens: int = 0


@dataclass(slots=True)
class PendingAppend:
    """An entry in the outbox and what waits for the record to have it."""

    append_id: int
    entry: RecordEntry
    then: list[Command] = field(default_factory=list)  # replies, acknowledgements, publications


@dataclass(slots=True)
class HeldRequest:
    """A client's request that is not answered yet: it may wait, at most to `until`."""

    event: ClientRequested
    received_at: float
    until: float


@dataclass(slots=True)
class Session:
    key: SessionKey
    opened: SessionOpenedEntry
    rounds_kept: int
    history: bytearray = field(default_factory=bytearray)  # tokens of every finished round, int32
    history_checksum: int = 0  # crc32 of history
    num_rounds: int = 0  # started, the one in flight included
    rounds: dict[int, EndedRound] = field(default_factory=dict)  # the newest rounds_kept
    round_of_key: dict[str, int] = field(default_factory=dict)
    in_flight: RoundInFlight | None = None
    closed: bool = False
    last_decode: WorkerRef | None = None  # of the newest attempt

    binding: Binding | None = None
    held: HeldKv = NOTHING_HELD  # by the decode worker, as bound or, before this coordinator started, as recorded
    resident: dict[WorkerRef, int] = field(default_factory=dict)  # see residency.py
    opened_at: float = 0.0  # by this coordinator: opened or recovered
    outbox: deque[PendingAppend] = field(default_factory=deque)  # only the first is with the service
    append_retry_at: float | None = None
    encoding: HeldRequest | None = None  # a round whose text is being tokenised
    close_requests: list[int] = field(default_factory=list)
    closing: bool = False
    last_active_at: float = 0.0
    last_ended_at: float | None = None
    timer_at: float | None = None

    @property
    def num_tokens(self) -> int:
        return count_tokens(self.history)

    @property
    def last_token_id(self) -> int | None:
        return last_token(self.history)

    @property
    def state(self) -> Literal["idle", "running", "closed"]:
        if self.closed or self.closing:
            return "closed"
        return "running" if self.in_flight is not None else "idle"

    def output_of(self, ended: EndedRound) -> bytes:
        """Output tokens of an ended round, as far as they are known."""
        if ended.error is not None:
            return ended.failed_output
        return slice_tokens(self.history, ended.output_start, ended.output_start + ended.num_output_tokens)

    def is_recording_end(self, round_index: int) -> bool:
        """The round has ended here, but the record does not have it yet."""
        return any(isinstance(p.entry, RoundEndedEntry) and p.entry.round == round_index for p in self.outbox)

    def conversation_from(self, start: int) -> bytes:
        """Tokens from position `start` on: history, the input of the round in flight, its forced prefix."""
        assert self.in_flight is not None
        tail = self.in_flight.started.input_token_ids + self.in_flight.forced
        num_history = self.num_tokens
        if start >= num_history:
            return slice_tokens(tail, start - num_history)
        return slice_tokens(self.history, start) + tail

    def checksum_until(self, stop: int) -> int:
        """crc32 of the conversation's first `stop` tokens: a worker that has other tokens finds out by it."""
        num_history = self.num_tokens
        if stop < num_history:
            return zlib.crc32(memoryview(self.history)[: stop * TOKEN_BYTES])
        if stop == num_history:
            return self.history_checksum
        return zlib.crc32(
            self.conversation_from(num_history)[: (stop - num_history) * TOKEN_BYTES], self.history_checksum
        )

    def apply(self, entry: RecordEntry) -> None:
        """Change the durable part. An entry that has been applied before changes nothing."""
        match entry:
            case SessionOpenedEntry():
                pass  # the session was made from it
            case RoundStartedEntry():
                self._apply_round_started(entry)
            case AttemptStartedEntry():
                self._apply_attempt_started(entry)
            case RoundEndedEntry():
                self._apply_round_ended(entry)
            case SessionClosedEntry():
                self.closed = True

    def _apply_round_started(self, entry: RoundStartedEntry) -> None:
        if entry.round < self.num_rounds:
            return
        self.num_rounds = entry.round + 1
        self.in_flight = RoundInFlight(
            started=entry,
            attempt=1,
            forced=b"",
            decode=entry.decode,
            prefill=entry.prefill,
            deadline_s=entry.deadline_s,
            phase="recording",
            output=StreamOutput(self.key, entry.round, 1, entry.stop.max_output_tokens),
        )
        self.last_decode = entry.decode
        if entry.idempotency_key:
            self.round_of_key[entry.idempotency_key] = entry.round

    def _apply_attempt_started(self, entry: AttemptStartedEntry) -> None:
        running = self.in_flight
        if running is None or running.index != entry.round or entry.attempt <= running.attempt:
            return
        running.attempt = entry.attempt
        running.forced = entry.forced_token_ids
        running.decode = entry.decode
        running.prefill = entry.prefill
        running.phase = "recording"
        running.output.begin_attempt(entry.attempt, entry.forced_token_ids)
        running.deadline_s = entry.deadline_s
        running.ended_at_worker = running.prefill_sent = running.prefill_ended = False
        self.last_decode = entry.decode

    def _apply_round_ended(self, entry: RoundEndedEntry) -> None:
        running = self.in_flight
        if running is None or running.index != entry.round:
            return
        succeeded = entry.error is None
        num_history = self.num_tokens
        if succeeded:
            added = running.started.input_token_ids + entry.output_token_ids
            self.history += added
            self.history_checksum = zlib.crc32(added, self.history_checksum)
        self.rounds[entry.round] = EndedRound(
            index=entry.round,
            attempt=entry.attempt,
            num_history_tokens=num_history,
            num_input_tokens=running.num_input_tokens,
            idempotency_key=running.started.idempotency_key,
            digest=running.started.digest,
            stop=running.started.stop.stop,
            output_start=num_history + running.num_input_tokens,
            num_output_tokens=count_tokens(entry.output_token_ids),
            failed_output=b"" if succeeded else entry.output_token_ids,
            finish_reason=entry.finish_reason,
            usage=entry.usage,
            error=entry.error,
            slo=running.started.slo,
            decision=running.decision,
        )
        self.in_flight = None
        while len(self.rounds) > self.rounds_kept:
            oldest = self.rounds.pop(next(iter(self.rounds)))
            if self.round_of_key.get(oldest.idempotency_key) == oldest.index:
                del self.round_of_key[oldest.idempotency_key]


def fold(key: SessionKey, entries: Sequence[RecordEntry], rounds_kept: int) -> Session | None:
    """The session that a record tells of; None if the record has no beginning (nothing was ever promised).

    A closed session comes back with `closed` set: its record is still to be purged. One that was opened again
    before that begins anew.
    """
    session: Session | None = None
    for entry in entries:
        if isinstance(entry, SessionOpenedEntry) and (session is None or session.closed):
            session = Session(key=key, opened=entry, rounds_kept=rounds_kept)
        elif session is not None:
            session.apply(entry)
    return session
