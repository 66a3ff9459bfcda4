"""The union of all messages, and how they become bytes: MessagePack, or JSON."""

from __future__ import annotations

import msgspec

from shared.errors import AmpdError, ErrorCode
from shared.messages.admin import AdminMessage
from shared.messages.base import Ack, Encoding, ErrorReply, Message
from shared.messages.client import ClientAnswer, ClientRequest
from shared.messages.peers import PeerMessage
from shared.messages.replanning import ReplanningMessage
from shared.messages.stream import StreamMessage
from shared.messages.worker_commands import WorkerAnswer, WorkerCommand
from shared.messages.worker_events import CoordinatorEvent, Heartbeat

AnyMessage = (
    ClientRequest | ClientAnswer | StreamMessage
    | WorkerCommand | WorkerAnswer | CoordinatorEvent | Heartbeat | PeerMessage
    | AdminMessage | ReplanningMessage | Ack | ErrorReply
)  # fmt: skip

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(AnyMessage)
_JSON_ENCODER = msgspec.json.Encoder()
_JSON_DECODER = msgspec.json.Decoder(AnyMessage)
_MAX_REASON_CHARS = 400


def encode(message: Message, encoding: Encoding = "msgpack") -> bytes:
    return _ENCODER.encode(message) if encoding == "msgpack" else _JSON_ENCODER.encode(message)


def encoding_of(data: bytes) -> Encoding:
    """JSON starts with `{` or white space; a MessagePack map of up to 15 or 65,535 fields never does."""
    return "json" if data[:1] in (b"{", b" ", b"\n", b"\t", b"\r") else "msgpack"


def decode(data: bytes, *, max_bytes: int | None = None) -> Message:
    """Decode and validate. Raises AmpdError MALFORMED_MESSAGE that names the offending field.

    What is decoded takes at most about 12 times the memory of `data` (a list of one-byte integers); a receiver of
    strangers' messages bounds it by max_bytes. NaN and infinity are accepted: whoever uses a float checks its range.
    """
    if max_bytes is not None and len(data) > max_bytes:
        raise AmpdError(
            ErrorCode.MALFORMED_MESSAGE,
            f"the message of {len(data):,} bytes exceeds the limit of {max_bytes:,} bytes: send less",
        )
    try:
        if encoding_of(data) == "json":
            message = _JSON_DECODER.decode(data)
            _ENCODER.encode(message)  # an integer of more than 64 bits is valid JSON, but cannot travel on
        else:
            message = _DECODER.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OverflowError) as error:
        # what the sender wrote is part of some of the texts, whatever its length
        raise AmpdError(
            ErrorCode.MALFORMED_MESSAGE, f"cannot decode the message: {str(error)[:_MAX_REASON_CHARS]}"
        ) from error
    assert isinstance(message, Message)
    return message


def error_reply(error: AmpdError) -> ErrorReply:
    return ErrorReply(code=error.code, message=error.message, retry_after_s=error.retry_after_s)


def raise_if_error(message: Message) -> Message:
    """Turn an ErrorReply back into the AmpdError it carries."""
    if isinstance(message, ErrorReply):
        raise AmpdError(message.code, message.message, retry_after_s=message.retry_after_s)
    return message
