"""What happens to the coordinator: everything that reaches its core, as one tagged union.

Events are values that encode to JSON, so that a log of (now, event) lines replays into a fresh core. What needs
randomness (seeds) or a tokeniser is done by the service and stands in the event.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shared.core.records import RecordEntry
from shared.core.types import SessionKey
from shared.errors import ErrorCode
from shared.messages import (
    Ack,
    CancelRound,
    ChangeRole,
    CloseSession,
    Encoding,
    ErrorReply,
    Heartbeat,
    HistoryGranted,
    InspectSession,
    KvStaged,
    NeedTokens,
    OpenSession,
    PrefillEnded,
    ReadRound,
    RoundEnded,
    RunRoundAck,
    SubmitRound,
    WorkerLeaving,
)


class EventBase(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=True):
    pass


class ClientRequested(EventBase, frozen=True, kw_only=True):
    """A client's request. Token input is packed int32 bytes; `random_seed` is for a sampled round without a seed;
    `digest` tells two requests with one idempotency key apart."""

    request_id: int
    key: SessionKey
    request: OpenSession | SubmitRound | CancelRound | CloseSession | InspectSession | ReadRound
    encoding: Encoding
    random_seed: int = 0
    digest: bytes = b""


class RoleRequested(EventBase, frozen=True, kw_only=True):
    """An operator's request, or the planner's, answered by a Reply."""

    request_id: int
    request: ChangeRole


class InputEncoded(EventBase, frozen=True, kw_only=True):
    """The answer to an EncodeInput command."""

    request_id: int
    key: SessionKey
    token_ids: bytes


class InputRefused(EventBase, frozen=True, kw_only=True):
    request_id: int
    key: SessionKey
    error: ErrorReply


class HeartbeatSeen(EventBase, frozen=True, kw_only=True):
    heartbeat: Heartbeat


class WorkerReported(EventBase, frozen=True, kw_only=True):
    """A worker's report, which it repeats until AcknowledgeEvent with this `ack_id`."""

    ack_id: int
    report: RoundEnded | PrefillEnded | KvStaged | WorkerLeaving


class CommandReplied(EventBase, frozen=True, kw_only=True):
    command_id: int
    reply: RunRoundAck | NeedTokens | HistoryGranted | Ack | ErrorReply


class CommandFailed(EventBase, frozen=True, kw_only=True):
    command_id: int
    reason: Literal["timeout", "no_responders"]


class RecordAppended(EventBase, frozen=True, kw_only=True):
    key: SessionKey
    append_id: int


class AppendFailed(EventBase, frozen=True, kw_only=True):
    """NOT_OWNER: another coordinator writes this record. Anything else may pass."""

    key: SessionKey
    append_id: int
    code: ErrorCode
    message: str


class StreamSeen(EventBase, frozen=True, kw_only=True):
    """Messages seen on a round's stream, as they were sent: they are decoded only when needed."""

    key: SessionKey
    round: int
    payloads: tuple[bytes, ...]


class Ticked(EventBase, frozen=True, kw_only=True):
    """Time has passed. Sent every 50 to 100 ms."""


class SessionRecord(msgspec.Struct, frozen=True):
    key: SessionKey
    entries: tuple[RecordEntry, ...]


class RecordsLoaded(EventBase, frozen=True, kw_only=True):
    """Every session's record, once, before anything else."""

    records: tuple[SessionRecord, ...]


Event = (
    ClientRequested
    | RoleRequested
    | InputEncoded
    | InputRefused
    | HeartbeatSeen
    | WorkerReported
    | CommandReplied
    | CommandFailed
    | RecordAppended
    | AppendFailed
    | StreamSeen
    | Ticked
    | RecordsLoaded
)
