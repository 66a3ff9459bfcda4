"""What the coordinator's core wants done: the service carries these out, in order, and reports back by events."""

from __future__ import annotations

import msgspec

from shared.core.records import RecordEntry
from shared.core.types import SessionKey
from shared.messages import (
    ChatInput,
    Encoding,
    ErrorReply,
    RoleChanged,
    RoundAccepted,
    RoundCancelled,
    RoundFailed,
    RoundObserved,
    RoundSnapshot,
    SessionClosed,
    SessionInfo,
    SessionOpened,
    TextInput,
    WorkerCommand,
)


class CommandBase(msgspec.Struct, frozen=True, kw_only=True, tag_field="command", tag=True):
    pass


class SnapshotText(msgspec.Struct, frozen=True):
    """What the text of a RoundSnapshot is made from: the whole output so far, cut at the first stop string."""

    output_token_ids: bytes
    stop: tuple[str, ...]


class Reply(CommandBase, frozen=True, kw_only=True):
    """Answer a client's request, or an operator's. Token ids in it are bytes; `snapshot` is of a RoundSnapshot only."""

    request_id: int
    message: (
        SessionOpened | RoundAccepted | RoundCancelled | SessionClosed | SessionInfo | RoundSnapshot
        | RoleChanged | ErrorReply
    )  # fmt: skip
    snapshot: SnapshotText | None = None


class EncodeInput(CommandBase, frozen=True, kw_only=True):
    """Tokenise a round's text or messages; answer with InputEncoded or InputRefused.

    `last_token_id` is the history's last token (a chat template closes a turn that did not end in EOS), None in a
    session's first round.
    """

    request_id: int
    key: SessionKey
    input: TextInput | ChatInput
    last_token_id: int | None


class AppendRecord(CommandBase, frozen=True, kw_only=True):
    """Append to the session's record; answer with RecordAppended or AppendFailed. One at a time for a session."""

    key: SessionKey
    append_id: int
    entry: RecordEntry


class PurgeRecord(CommandBase, frozen=True, kw_only=True):
    """The session is closed and its record can go. Comes before any later append for the same key."""

    key: SessionKey


class SendToWorker(CommandBase, frozen=True, kw_only=True):
    """Send a command and answer with CommandReplied or CommandFailed. Tickets in it are empty: the service signs."""

    command_id: int
    worker_id: str
    message: WorkerCommand
    timeout_s: float


class PublishStream(CommandBase, frozen=True, kw_only=True):
    """Publish the terminal message of a failed round on its stream."""

    key: SessionKey
    message: RoundFailed
    encoding: Encoding


class AcknowledgeEvent(CommandBase, frozen=True, kw_only=True):
    """Answer a worker's report: Ack, or `error`, after which the worker repeats it."""

    ack_id: int
    error: ErrorReply | None = None


class ObserveRound(CommandBase, frozen=True, kw_only=True):
    """One line about an ended round, for the planner. Nothing of this round follows on its stream."""

    observation: RoundObserved


Command = (
    Reply | EncodeInput | AppendRecord | PurgeRecord | SendToWorker | PublishStream | AcknowledgeEvent | ObserveRound
)
