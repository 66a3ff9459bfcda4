"""Bytes from the bus to the values that the core takes, validated; anything else is refused with what is wrong."""

from __future__ import annotations

import hashlib

import msgspec

from shared.core.token_bytes import TOKEN_BYTES, as_token_bytes
from shared.errors import AmpdError, ErrorCode
from shared.messages import (
    Ack,
    CancelRound,
    ClientRequest,
    CloseSession,
    ErrorReply,
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
    TokensInput,
    WorkerLeaving,
    decode,
    encode,
)

# A million token ids as bytes. Decoding takes at most about 12 times the memory of what is decoded.
MAX_REQUEST_BYTES = 4 * 1024 * 1024


def read_request(data: bytes) -> ClientRequest:
    """A client's request, its token ids as bytes. Raises MALFORMED_MESSAGE, INVALID_REQUEST."""
    message = decode(data, max_bytes=MAX_REQUEST_BYTES)
    if not isinstance(message, OpenSession | SubmitRound | CancelRound | CloseSession | InspectSession | ReadRound):
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            "a session takes the requests open, round, cancel, close, inspect and read_round",
        )
    if isinstance(message, SubmitRound) and isinstance(message.input, TokensInput):
        token_ids = as_token_bytes(message.input.token_ids)
        if len(token_ids) % TOKEN_BYTES:
            raise AmpdError(
                ErrorCode.MALFORMED_MESSAGE,
                f"token_ids must be a list, or little-endian int32 bytes: {len(token_ids)} is no multiple of 4",
            )
        if token_ids is not message.input.token_ids:
            return msgspec.structs.replace(message, input=TokensInput(token_ids=token_ids))
    return message


def digest_request(request: SubmitRound) -> bytes:
    """Tells two requests with one idempotency key apart; the same request repeated has the same digest."""
    return hashlib.blake2b(encode(request), digest_size=16).digest()


def read_report(data: bytes) -> RoundEnded | PrefillEnded | KvStaged | WorkerLeaving:
    """A worker's report. Raises MALFORMED_MESSAGE."""
    message = decode(data)
    if not isinstance(message, RoundEnded | PrefillEnded | KvStaged | WorkerLeaving):
        raise AmpdError(ErrorCode.MALFORMED_MESSAGE, f"{type(message).__name__} is no worker's report")
    if isinstance(message, RoundEnded):
        is_whole = message.error is not None or (message.finish_reason is not None and message.usage is not None)
        if not is_whole or len(message.output_token_ids) % TOKEN_BYTES:
            raise AmpdError(
                ErrorCode.MALFORMED_MESSAGE,
                "round_ended needs int32 output tokens, and an error or finish_reason and usage",
            )
    return message


def read_command_reply(data: bytes) -> RunRoundAck | NeedTokens | HistoryGranted | Ack | ErrorReply:
    """A worker's answer to a command. Raises MALFORMED_MESSAGE, INTERNAL."""
    reply = decode(data)
    if not isinstance(reply, RunRoundAck | NeedTokens | HistoryGranted | Ack | ErrorReply):
        raise AmpdError(ErrorCode.INTERNAL, f"the worker answered {type(reply).__name__}")
    return reply
