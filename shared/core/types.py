"""Values that the pure core, the engine and the transport share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class SessionKey(NamedTuple):
    """A session's identity. The tenant comes from the authenticated subject, never from a message body."""

    tenant: str
    session: str


NO_SESSION = SessionKey("", "")  # of a command that is about none


class RoundKey(NamedTuple):
    """One attempt at one round of one session."""

    tenant: str
    session: str
    round: int
    attempt: int


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of the KV pool: [num_blocks, num_layers, 2 (key, value), block_size, num_kv_heads, head_dim].

    One block is one contiguous byte range. Two workers may exchange KV only if their layout_hash is equal.
    """

    model: str  # fingerprint of the weights' folder: KV of another model is never accepted
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's keys (or values) in one layer."""
        return self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.slot_bytes

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size

    @property
    def layout_hash(self) -> str:
        text = f"{self.model}|{self.num_layers}|{self.num_kv_heads}|{self.head_dim}|{self.block_size}|{self.dtype}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Segment(NamedTuple):
    """KV of token positions [token_start, token_stop) in layers [layer_start, layer_stop) of one session.

    Its bytes, in the order both ends of a transfer use: by block, then layer, then keys before values, then slot.
    """

    layer_start: int
    layer_stop: int
    token_start: int
    token_stop: int

    def num_bytes(self, layout: KvLayout) -> int:
        return (self.layer_stop - self.layer_start) * (self.token_stop - self.token_start) * 2 * layout.slot_bytes
