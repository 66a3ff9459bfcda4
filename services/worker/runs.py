"""One attempt at a round on its decode worker: what it is waiting for, what it has produced, what it cost."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from shared.core.sequences import Sequence, SequenceState
from shared.core.types import RoundKey
from shared.messages import (
    Encoding,
    FinishReason,
    PrefillDone,
    RoundEnded,
    RoundFinished,
    RoundTokens,
    RunRound,
    Usage,
)
from shared.text import StreamDecoder
from shared.transport.client import Pull
from shared.transport.leases import Lease
from shared.transport.receiver import PullResult


@dataclass(eq=False)
class Run:
    message: RunRound
    sequence: Sequence
    decoder: StreamDecoder
    stream: str
    received_at: float
    num_cached_tokens: int
    history_lease: Lease | None = None
    offered: bool = False
    pull: Pull | None = None
    pulled: PullResult | None = None
    pulled_at: float = 0.0
    num_fetch_tokens: int = 0  # positions [0, n) to be fetched from the worker that the session comes from
    fetching: asyncio.Task[None] | None = None
    fetched: PullResult | None = None
    fetch_s: float = 0.0
    prefill_done: PrefillDone | None = None
    prefill_done_at: float = 0.0
    first_token_at: float | None = None
    last_token_at: float = 0.0
    num_messages: int = 0
    num_streamed: int = 0
    ended: RoundEnded | None = None
    halted: bool = False  # no transfer may write to its blocks any more
    stopped: bool = False  # superseded, cancelled or dropped: whatever still arrives for it is ignored

    @property
    def key(self) -> RoundKey:
        return self.sequence.key

    @property
    def is_waiting(self) -> bool:
        """For KV on its way here, and still wanted."""
        waiting = self.sequence.state is SequenceState.WAITING_KV
        return waiting and not self.halted and self.ended is None

    def note_first_step(self) -> None:
        """Of a local prefill: what need not be computed is known now."""
        self.num_cached_tokens = self.sequence.kv.num_kv

    @property
    def encoding(self) -> Encoding:
        return self.message.stream_encoding

    @property
    def num_output_tokens(self) -> int:
        return self.sequence.kv.num_tokens - self.sequence.output_start

    def output_token_ids(self) -> bytes:
        """All output so far, the forced prefix included, packed."""
        return self.sequence.kv.tokens[self.sequence.output_start :].tobytes()

    def finish_reason(self, token: int, eos_token_ids: frozenset[int], max_context_tokens: int) -> FinishReason | None:
        """Whether the round is over after `token`, the newest of its output."""
        stop = self.message.stop
        if token in stop.stop_token_ids or (token in eos_token_ids and not stop.ignore_eos) or self.decoder.stopped:
            return "stop"
        at_limit = self.num_output_tokens >= stop.max_output_tokens
        if at_limit or self.sequence.kv.num_tokens >= max_context_tokens:
            return "length"
        return None

    def tokens_message(self, token: int, text: str, encoding: Encoding) -> RoundTokens:
        message = RoundTokens(
            session=self.message.session,
            round=self.message.round,
            attempt=self.message.attempt,
            seq=self._next_seq(),
            start_index=self.num_streamed,
            token_ids=token.to_bytes(4, "little", signed=True) if encoding == "msgpack" else [token],
            text=text,
        )
        self.num_streamed += 1
        return message

    def finished_message(self, reason: FinishReason, usage: Usage) -> RoundFinished:
        return RoundFinished(
            session=self.message.session,
            round=self.message.round,
            attempt=self.message.attempt,
            seq=self._next_seq(),
            num_output_tokens=self.num_output_tokens,
            finish_reason=reason,
            usage=usage,
        )

    def _next_seq(self) -> int:
        self.num_messages += 1
        return self.num_messages - 1

    def usage(self, worker_id: str, now: float) -> Usage:
        """Costs as of `now`. A remote prefill's queue and compute times are as its worker measured them."""
        message, done, pulled = self.message, self.prefill_done, self.pulled
        num_bytes_read = done.kv_bytes_read if done is not None else 0
        if self.fetched is not None:
            num_bytes_read += self.fetched.num_bytes
        first_at = self.first_token_at if self.first_token_at is not None else now
        if message.remote is not None and done is not None and pulled is not None:
            queued_s, prefill_s = done.queued_s, done.prefill_s
            transfer_s = done.transfer_s + max(0.0, self.pulled_at - self.prefill_done_at)
        else:
            started_at = self.sequence.first_step_at if self.sequence.first_step_at is not None else first_at
            transfer_s, prefill_s = self.fetch_s, first_at - started_at
            queued_s = max(0.0, started_at - self.received_at - transfer_s)
        return Usage(
            num_history_tokens=message.num_history_tokens,
            num_input_tokens=message.num_input_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            prefill="local" if message.remote is None else "remote",
            prefill_worker=worker_id if message.remote is None else message.remote.worker_id,
            decode_worker=worker_id,
            kv_bytes_read=num_bytes_read,
            kv_bytes_written=pulled.num_bytes if pulled is not None else 0,
            queued_s=queued_s,
            transfer_s=transfer_s,
            prefill_s=prefill_s,
            decode_s=now - first_at,
            num_attempts=message.attempt,
            num_preemptions=self.sequence.num_preemptions,
            moved_from=message.source.worker_id if message.source is not None else "",
            num_moved_tokens=self.num_fetch_tokens if self.fetched is not None else 0,
        )
