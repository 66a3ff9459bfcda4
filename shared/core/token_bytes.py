"""Token ids as little-endian int32 bytes: the form in which the coordinator keeps, slices and sends them."""

from __future__ import annotations

import numpy as np

from shared.errors import AmpdError, ErrorCode
from shared.messages import TokenIds, pack_token_ids

TOKEN_BYTES = 4


def count_tokens(token_ids: bytes | bytearray) -> int:
    return len(token_ids) // TOKEN_BYTES


def slice_tokens(token_ids: bytes | bytearray, start: int, stop: int | None = None) -> bytes:
    """Tokens [start, stop) as bytes."""
    return bytes(token_ids[start * TOKEN_BYTES : None if stop is None else stop * TOKEN_BYTES])


def last_token(token_ids: bytes | bytearray) -> int | None:
    if not token_ids:
        return None
    return int.from_bytes(token_ids[-TOKEN_BYTES:], "little", signed=True)


def as_token_bytes(token_ids: TokenIds) -> bytes:
    """Bytes as they are, a list packed. Raises INVALID_REQUEST for ids outside int32."""
    if isinstance(token_ids, bytes):
        return token_ids
    try:
        return pack_token_ids(token_ids)
    except OverflowError as error:
        raise AmpdError(ErrorCode.INVALID_REQUEST, "a token id is outside the range of int32") from error


def check_token_ids(token_ids: bytes, vocab_size: int) -> None:
    """Raises EMPTY_INPUT, or INVALID_REQUEST for bytes that are no int32 array or ids outside [0, vocab_size)."""
    if not token_ids:
        raise AmpdError(ErrorCode.EMPTY_INPUT, "the round's input is empty: send at least one token")
    if len(token_ids) % TOKEN_BYTES:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"token_ids must be little-endian int32 bytes: {len(token_ids)} bytes is not a multiple of 4",
        )
    # One unsigned maximum covers both ends: a negative int32 is larger than any vocabulary.
    ids = np.frombuffer(token_ids, dtype="<u4")
    if int(ids.max()) >= vocab_size:
        index = int(np.argmax(ids >= vocab_size))
        wrong = int(ids[index].astype(np.int32))
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"token_ids[{index}] is {wrong}: token ids must be in [0, {vocab_size})",
        )
