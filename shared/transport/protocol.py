"""The KV data plane on the wire: frames, their typed bodies, and how a range of KV is cut into frames.

One connection carries one pull at a time, any number one after another:

    receiver                                  sender
    HELLO  who I am, my layout, whom I want    WELCOME (or REFUSED: says what differs)
    PULL   ticket, lease, range                SEGMENT* with payload; KEEPALIVE while the producer computes
                                               TRAILER ok + digest, or failed + why   (or REFUSED)
    DELIVERED

HELLO offers ways to move the payload (lanes.py), WELCOME chooses one. Of a one-sided way the sender's segments are
RANGES* instead: where in its pool they lie. The receiver reads them there, and says COPIED of each, in order.

A frame is a fixed header and `length` bytes: MessagePack for control frames, KV in Segment's order for SEGMENT,
pairs (start, stop) of 64 bits each for RANGES. Every header names (incarnation, lease, generation); the digest is over
headers and payloads of all SEGMENT frames, or headers, ranges and what lies there of all RANGES frames, so bytes that
arrive intact but under another header do not pass either.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol, TypeVar, cast

import msgspec
import numpy as np
import xxhash

from shared.core.types import KvLayout, RoundKey, Segment
from shared.errors import AmpdError, ErrorCode, KvTransferError
from shared.transport.ranges import ByteRange

PROTOCOL_VERSION = 3
MAGIC = b"AKV1"
MAX_CONTROL_BYTES = 16_384
CHUNK_BYTES = 4 << 20  # payload of one frame, unless one block of one layer is larger (why: ADR 0004)
KEEPALIVE_S = 0.5
_RANGE_BYTES = 16

HEADER = struct.Struct("<4sBxxxQQQIIIIQ8x")  # magic, kind, incarnation, lease, generation, segment, length
Digest = xxhash.xxh3_64  # why this one: docs/decisions/0004-kv-transport.md


class KvMemory(Protocol):
    """A pool of KV blocks that transfers read from and write to."""

    @property
    def layout(self) -> KvLayout: ...

    def segment_views(self, block_table: Sequence[int], segment: Segment) -> list[memoryview]:
        """Writable views of the segment's bytes, in the order Segment defines. block_table[p // block_size] holds
        position p. Called from transport threads. Raises KvTransferError if the block table does not cover it."""
        ...


class StagedKvMemory(Protocol):
    """A KvMemory whose attribute has_views is False: its bytes cannot be reached where they lie (they are on a device,
    or in another order), so they are copied. Both methods take bytes in Segment's order, and raise as segment_views."""

    def read_segment(self, block_table: Sequence[int], segment: Segment) -> memoryview: ...
    def write_segment(self, block_table: Sequence[int], segment: Segment, data: memoryview) -> None: ...


def as_staged(memory: KvMemory) -> StagedKvMemory | None:
    """`memory` if it must be copied from and to; None if it has views, as memories have that do not say."""
    return None if getattr(memory, "has_views", True) else cast(StagedKvMemory, memory)


class FrameKind(IntEnum):
    HELLO = 1
    WELCOME = 2
    PULL = 3
    SEGMENT = 4
    KEEPALIVE = 5
    TRAILER = 6
    DELIVERED = 7
    REFUSED = 8
    RANGES = 9
    COPIED = 10
    POOL = 11


class LeaseId(NamedTuple):
    """What a frame belongs to. All zero before a lease has been named."""

    incarnation: int  # of the sender of the KV
    lease_id: int
    generation: int


NO_LEASE = LeaseId(0, 0, 0)
NO_SEGMENT = Segment(0, 0, 0, 0)


class Frame(NamedTuple):
    kind: FrameKind
    lease: LeaseId
    segment: Segment
    length: int


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """First frame of a connection, and (as WELCOME) its answer. `peer_*` is whom the sender means to talk to."""

    protocol: int
    worker_id: str
    incarnation: int
    layout_hash: str
    layout: KvLayout  # so that a mismatch can be explained
    peer_id: str
    peer_incarnation: int
    lanes: tuple[str, ...]  # HELLO: what is offered, best first; WELCOME: the one chosen


class PullBody(msgspec.Struct, frozen=True, kw_only=True):
    """`progress_timeout_s` is how long the sender may wait for a receiver that takes no byte."""

    ticket: bytes
    key: RoundKey
    token_start: int
    token_stop: int
    keepalive_s: float
    progress_timeout_s: float


class PoolBody(msgspec.Struct, frozen=True, kw_only=True):
    """Behind the connection's first PULL that is granted, if its lane is one-sided: how to read the sender's pool."""

    description: bytes


class Trailer(msgspec.Struct, frozen=True, kw_only=True):
    """`waiting_s`: time in which the sender had nothing to send because nothing new had been published."""

    ok: bool
    digest: bytes
    num_bytes: int
    waiting_s: float
    code: str = ""
    message: str = ""


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    message: str

    def error(self) -> KvTransferError:
        """As the error it stands for; a code of a newer version becomes KV_TRANSFER_FAILED."""
        known = self.code in ErrorCode.__members__.values()
        return KvTransferError(ErrorCode(self.code) if known else ErrorCode.KV_TRANSFER_FAILED, self.message)


_PAYLOAD_KINDS = (FrameKind.SEGMENT, FrameKind.RANGES)
ControlBody = Hello | PullBody | PoolBody | Trailer | Refused
Body = TypeVar("Body", Hello, PullBody, PoolBody, Trailer, Refused)

_ENCODER = msgspec.msgpack.Encoder()


def encode_body(body: ControlBody) -> bytes:
    return _ENCODER.encode(body)


def decode_body(data: bytes | memoryview, body_type: type[Body]) -> Body:
    """Raises AmpdError MALFORMED_MESSAGE."""
    try:
        return msgspec.msgpack.decode(data, type=body_type)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise AmpdError(ErrorCode.MALFORMED_MESSAGE, f"bad {body_type.__name__}: {error}") from error


def encode_header(kind: FrameKind, lease: LeaseId, segment: Segment, length: int) -> bytes:
    return HEADER.pack(MAGIC, kind, *lease, *segment, length)


def decode_header(data: bytes | memoryview) -> Frame:
    """Raises AmpdError MALFORMED_MESSAGE: wrong magic, unknown kind, or a control frame over MAX_CONTROL_BYTES.

    The length of SEGMENT and RANGES is not judged here: the receiver knows what their segment allows.
    """
    magic, number, incarnation, lease_id, generation, l0, l1, t0, t1, length = HEADER.unpack(data)
    if magic != MAGIC:
        raise AmpdError(ErrorCode.MALFORMED_MESSAGE, "this is not an AMPD KV connection: wrong magic bytes")
    if number not in FrameKind.__members__.values():
        raise AmpdError(ErrorCode.MALFORMED_MESSAGE, f"unknown frame kind {number}")
    kind = FrameKind(number)
    if kind not in _PAYLOAD_KINDS and length > MAX_CONTROL_BYTES:
        raise AmpdError(
            ErrorCode.MALFORMED_MESSAGE, f"{kind.name} of {length} bytes is over the limit of {MAX_CONTROL_BYTES}"
        )
    return Frame(kind, LeaseId(incarnation, lease_id, generation), Segment(l0, l1, t0, t1), length)


def encode_ranges(ranges: Sequence[ByteRange]) -> bytes:
    return np.array(ranges, dtype="<u8").tobytes()


def check_ranges_length(length: int, segment: Segment, layout: KvLayout) -> None:
    """Before room is made for them. A range has one token's keys of a layer at least. Raises KvTransferError."""
    most = segment.num_bytes(layout) // layout.slot_bytes
    if length % _RANGE_BYTES or not 0 < length // _RANGE_BYTES <= most:
        raise KvTransferError(ErrorCode.KV_TRANSFER_FAILED, f"RANGES of {length} bytes for {segment}")


def decode_ranges(data: bytes | bytearray, num_bytes: int, pool_bytes: int) -> list[ByteRange]:
    """Raises KvTransferError unless they lie in a pool of pool_bytes and have num_bytes together."""
    pairs = np.frombuffer(data, dtype="<u8").reshape(-1, 2)
    starts, stops = pairs[:, 0], pairs[:, 1]
    if not (starts < stops).all() or int(stops.max()) > pool_bytes or int((stops - starts).sum()) != num_bytes:
        raise KvTransferError(ErrorCode.KV_TRANSFER_FAILED, "ranges came that are not within the sender's pool")
    return [ByteRange(start, stop) for start, stop in pairs.tolist()]


def check_peer(mine: Hello, theirs: Hello) -> None:
    """Refuse a peer that speaks another version, is not whom we meant or is another process, or whose KV is shaped
    differently. Raises KvTransferError that says what differs (KV_LAYOUT_MISMATCH, WRONG_INCARNATION)."""
    if mine.protocol != theirs.protocol:
        raise KvTransferError(
            ErrorCode.KV_LAYOUT_MISMATCH,
            f"KV protocol {mine.protocol} at {mine.worker_id}, {theirs.protocol} at {theirs.worker_id}: "
            "run the same version of ampd on both",
        )
    if theirs.worker_id != mine.peer_id:
        raise KvTransferError(
            ErrorCode.WRONG_INCARNATION, f"worker {mine.peer_id} was wanted, {theirs.worker_id} is here"
        )
    if theirs.incarnation != mine.peer_incarnation:
        raise KvTransferError(
            ErrorCode.WRONG_INCARNATION,
            f"incarnation {mine.peer_incarnation} of worker {mine.peer_id} was wanted, "
            f"{theirs.incarnation} is here: it has restarted",
        )
    if theirs.layout_hash != mine.layout_hash:
        names = [name for name in KvLayout.__slots__ if getattr(mine.layout, name) != getattr(theirs.layout, name)]
        differences = ", ".join(
            f"{name} {getattr(mine.layout, name)} at {mine.worker_id} and {getattr(theirs.layout, name)} "
            f"at {theirs.worker_id}"
            for name in names
        )
        raise KvTransferError(ErrorCode.KV_LAYOUT_MISMATCH, differences or "the layout hash")


def split_segment(segment: Segment, layout: KvLayout, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Segment]:
    """Cut a segment into frames of at most chunk_bytes (or one block of one layer), at block boundaries.

    Their bytes one after another are the segment's: whole blocks while they fit, else groups of layers of one block.
    """
    layer_start, layer_stop, position, token_stop = segment
    layer_bytes = 2 * layout.slot_bytes * layout.block_size
    blocks_per_frame = chunk_bytes // (layer_bytes * (layer_stop - layer_start))
    while position < token_stop:
        first_block = position // layout.block_size
        stop = min(token_stop, (first_block + max(1, blocks_per_frame)) * layout.block_size)
        if blocks_per_frame:
            yield Segment(layer_start, layer_stop, position, stop)
        else:
            step = max(1, chunk_bytes // layer_bytes)
            for layer in range(layer_start, layer_stop, step):
                yield Segment(layer, min(layer + step, layer_stop), position, stop)
        position = stop


class Coverage:
    """Which KV of a range has passed. Invariant: layer i has [token_start, _next[i]), each position exactly once.

    Each layer's positions must come in order, which is how a causal prefill makes them; that keeps the check O(layers).
    """

    def __init__(self, num_layers: int, token_start: int, token_stop: int) -> None:
        self._next = [token_start] * num_layers
        self._token_stop = token_stop

    def add(self, segment: Segment) -> None:
        """Raises ValueError for a segment outside the range, a repeat, or a gap."""
        layer_start, layer_stop, token_start, token_stop = segment
        if not 0 <= layer_start < layer_stop <= len(self._next):
            raise ValueError(f"layers [{layer_start}, {layer_stop}) are not within [0, {len(self._next)})")
        if not token_start < token_stop <= self._token_stop:
            raise ValueError(f"tokens [{token_start}, {token_stop}) do not end within the range")
        for layer in range(layer_start, layer_stop):
            if self._next[layer] != token_start:
                raise ValueError(f"layer {layer} goes on at token {self._next[layer]}, not at {token_start}")
        self._next[layer_start:layer_stop] = [token_stop] * (layer_stop - layer_start)

    @property
    def complete(self) -> bool:
        return all(position == self._token_stop for position in self._next)
