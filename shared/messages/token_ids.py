"""Token ids on the wire: little-endian int32 bytes."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

from shared.errors import AmpdError, ErrorCode
from shared.messages.base import TokenIds


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian int32 bytes. Raises OverflowError for ids outside int32."""
    packed = array("i", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_token_ids(token_ids: TokenIds) -> list[int]:
    """The inverse of pack_token_ids; a list (from JSON) is returned as it is."""
    if isinstance(token_ids, list):
        return token_ids
    if len(token_ids) % 4:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"token_ids must be little-endian int32 bytes: {len(token_ids)} bytes is not a multiple of 4",
        )
    unpacked = array("i", token_ids)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked.tolist()
