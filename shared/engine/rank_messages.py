"""What rank 0 tells the other ranks of a tensor-parallel worker, over a socket pair each: MessagePack behind a length.

Not over torch.distributed: an idle rank waits for its next step as long as it takes, and the socket's end says that
the other side is gone.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from shared.engine.step import StepItem
from shared.messages import SamplingParams, pack_token_ids, unpack_token_ids

_LENGTH = struct.Struct("<Q")
_ANY_SAMPLING = SamplingParams()  # rank 0 samples; the others only have to compute the same rows of logits

Message = TypeVar("Message")


class RankStarted(msgspec.Struct, frozen=True):
    """A rank, to rank 0: I have imported what I need, and am about to join the group."""


class RankReady(msgspec.Struct, frozen=True):
    """A rank, to rank 0: weights and pool are there."""


class RankItem(msgspec.Struct, frozen=True, array_like=True):
    """A StepItem without what only rank 0 needs. Integers are packed as int32."""

    token_ids: bytes
    start_position: int
    block_table: bytes
    samples: bool


class RankStep(msgspec.Struct, frozen=True):
    items: list[RankItem]


def encode_step(items: Sequence[StepItem]) -> bytes:
    return _frame(
        RankStep(
            [
                RankItem(
                    token_ids=pack_token_ids(item.token_ids),
                    start_position=item.start_position,
                    block_table=pack_token_ids(item.block_table),
                    samples=item.sampling is not None,
                )
                for item in items
            ]
        )
    )


def decode_items(step: RankStep) -> list[StepItem]:
    return [
        StepItem(
            token_ids=unpack_token_ids(item.token_ids),
            start_position=item.start_position,
            block_table=unpack_token_ids(item.block_table),
            sampling=_ANY_SAMPLING if item.samples else None,
        )
        for item in step.items
    ]


def send(sock: socket.socket, message: msgspec.Struct) -> None:
    """Raises OSError."""
    sock.sendall(_frame(message))


def receive(sock: socket.socket, message_type: type[Message]) -> Message | None:
    """The next message, or None at the end of the stream. Raises OSError, TimeoutError by the socket's timeout."""
    header = _receive_exactly(sock, _LENGTH.size)
    body = None if header is None else _receive_exactly(sock, _LENGTH.unpack(header)[0])
    return None if body is None else msgspec.msgpack.decode(body, type=message_type)


def _frame(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


def _receive_exactly(sock: socket.socket, num_bytes: int) -> bytearray | None:
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view.nbytes:
        received = sock.recv_into(view)
        if received == 0:
            return None
        view = view[received:]
    return data
