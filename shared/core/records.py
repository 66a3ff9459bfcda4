"""The durable record of a session: a list of entries, appended in order; folding them gives the session back.

Entries are MessagePack of a tagged union. Token ids are little-endian int32 bytes. `version` is of the entry's
shape: a coordinator refuses entries newer than it knows. Entries are idempotent: one that was appended twice (an
append whose acknowledgement was lost) changes nothing the second time.
"""

from __future__ import annotations

import msgspec

from shared.errors import AmpdError, ErrorCode
from shared.messages import Encoding, ErrorReply, FinishReason, SamplingParams, Slo, StopConditions, Usage

RECORD_VERSION = 1


class WorkerRef(msgspec.Struct, frozen=True):
    """A worker process: `incarnation` is drawn anew at each of its starts."""

    worker_id: str
    incarnation: int


class Entry(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    version: int = RECORD_VERSION


class SessionOpenedEntry(Entry, frozen=True, kw_only=True, tag="opened"):
    model: str
    max_context_tokens: int
    vocab_size: int
    slo: Slo
    idle_timeout_s: float


class RoundStartedEntry(Entry, frozen=True, kw_only=True, tag="round_started"):
    """Everything needed to run the round again. `digest` is of the request as sent, for its idempotency key."""

    round: int
    idempotency_key: str
    digest: bytes
    input_token_ids: bytes
    sampling: SamplingParams  # its seed is set
    stop: StopConditions
    slo: Slo
    deadline_s: float
    stream_encoding: Encoding
    decode: WorkerRef
    prefill: WorkerRef | None  # None: local


class AttemptStartedEntry(Entry, frozen=True, kw_only=True, tag="attempt_started"):
    """The round runs again, with the output already delivered as forced prefix. deadline_s is what remains."""

    round: int
    attempt: int
    forced_token_ids: bytes
    deadline_s: float
    decode: WorkerRef
    prefill: WorkerRef | None


class RoundEndedEntry(Entry, frozen=True, kw_only=True, tag="round_ended"):
    """`error` None: the round succeeded and its input and output join the history. Otherwise they do not."""

    round: int
    attempt: int
    output_token_ids: bytes
    finish_reason: FinishReason | None
    usage: Usage | None
    error: ErrorReply | None


class SessionClosedEntry(Entry, frozen=True, kw_only=True, tag="closed"):
    pass


RecordEntry = SessionOpenedEntry | RoundStartedEntry | AttemptStartedEntry | RoundEndedEntry | SessionClosedEntry

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(RecordEntry)


def encode_entry(entry: RecordEntry) -> bytes:
    return _ENCODER.encode(entry)


def decode_entry(data: bytes) -> RecordEntry:
    """Raises AmpdError MALFORMED_MESSAGE for anything that is not an entry of a version known here."""
    try:
        entry: RecordEntry = _DECODER.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise AmpdError(ErrorCode.MALFORMED_MESSAGE, f"cannot decode the record entry: {error}") from error
    if entry.version > RECORD_VERSION:
        raise AmpdError(
            ErrorCode.MALFORMED_MESSAGE,
            f"the record entry has version {entry.version}, this coordinator knows {RECORD_VERSION}: upgrade it",
        )
    return entry
