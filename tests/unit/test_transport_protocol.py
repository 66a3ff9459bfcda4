"""KV frames: their bytes, how a range is cut into them, and that each position passes exactly once."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shared.core.types import KvLayout, RoundKey, Segment
from shared.errors import AmpdError, ErrorCode, KvTransferError
from shared.transport.memory import HostKvMemory
from shared.transport.protocol import (
    HEADER,
    MAX_CONTROL_BYTES,
    Coverage,
    FrameKind,
    Hello,
    LeaseId,
    PullBody,
    Refused,
    Trailer,
    check_peer,
    decode_body,
    decode_header,
    encode_body,
    encode_header,
    split_segment,
)

LAYOUT = KvLayout("m", 5, 2, 4, 4, "bfloat16")  # 16 bytes a slot, 128 a block and layer, 640 a block
U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)


def test_the_bytes_of_a_header() -> None:
    """What other implementations must send: little-endian, 64 bytes."""
    header = encode_header(FrameKind.SEGMENT, LeaseId(1, 2, 3), Segment(4, 5, 6, 7), 8)
    assert header.hex(" ", 8) == (
        "414b563104000000 0100000000000000 0200000000000000 0300000000000000 "
        "0400000005000000 0600000007000000 0800000000000000 0000000000000000"
    )
    assert HEADER.size == 64


@given(
    st.sampled_from(FrameKind),
    st.builds(LeaseId, U64, U64, U64),
    st.builds(Segment, U32, U32, U32, U32),
    st.integers(0, MAX_CONTROL_BYTES),
)
def test_headers_survive(kind: FrameKind, lease: LeaseId, segment: Segment, length: int) -> None:
    assert decode_header(encode_header(kind, lease, segment, length)) == (kind, lease, segment, length)


@given(st.binary(min_size=HEADER.size, max_size=HEADER.size))
def test_any_other_64_bytes_are_malformed(data: bytes) -> None:
    with pytest.raises(AmpdError) as caught:
        decode_header(data)
    assert caught.value.code is ErrorCode.MALFORMED_MESSAGE


@given(st.binary(max_size=200), st.sampled_from([Hello, PullBody, Trailer, Refused]))
def test_any_body_that_is_no_map_is_malformed(data: bytes, body_type: type[Hello]) -> None:
    assume(not 0x80 <= (data or b"\0")[0] <= 0x8F)
    with pytest.raises(AmpdError) as caught:
        decode_body(data, body_type)
    assert caught.value.code is ErrorCode.MALFORMED_MESSAGE


def test_bodies_survive() -> None:
    body = PullBody(
        ticket=b"t", key=RoundKey("t", "s", 1, 2), token_start=3, token_stop=9, keepalive_s=0.5, progress_timeout_s=5.0
    )
    assert decode_body(encode_body(body), PullBody) == body


def test_a_refusal_of_a_newer_version_is_still_a_failure() -> None:
    assert Refused(code="kv_quota", message="m").error().code is ErrorCode.KV_TRANSFER_FAILED
    assert Refused(code="kv_lease_invalid", message="m").error().code is ErrorCode.KV_LEASE_INVALID


def test_a_layout_mismatch_says_what_differs() -> None:
    def hello(layout: KvLayout) -> Hello:
        return Hello(
            protocol=1,
            worker_id="w",
            incarnation=1,
            layout_hash=layout.layout_hash,
            layout=layout,
            peer_id="w",
            peer_incarnation=1,
            lanes=("stream",),
        )

    check_peer(hello(LAYOUT), hello(LAYOUT))
    with pytest.raises(KvTransferError, match=r"^kv_layout_mismatch: model m at w and other at w$"):
        check_peer(hello(LAYOUT), hello(KvLayout("other", 5, 2, 4, 4, "bfloat16")))


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    layer_start = draw(st.integers(0, 4))
    token_start = draw(st.integers(0, 30))
    return Segment(
        layer_start, draw(st.integers(layer_start + 1, 5)), token_start, draw(st.integers(token_start + 1, 40))
    )


@given(segments(), st.integers(1, 4000))
def test_frames_concatenated_are_the_segment(segment: Segment, chunk_bytes: int) -> None:
    memory = HostKvMemory(LAYOUT, 10)
    memory.blocks.reshape(-1)[:] = [i * 7 % 251 for i in range(memory.blocks.size)]
    block_table = [3, 1, 9, 0, 4, 8, 2, 7, 6, 5]

    def content(part: Segment) -> bytes:
        return b"".join(memory.segment_views(block_table, part))

    frames = list(split_segment(segment, LAYOUT, chunk_bytes))
    assert b"".join(content(frame) for frame in frames) == content(segment)
    block_and_layer = 2 * LAYOUT.slot_bytes * LAYOUT.block_size
    for frame in frames:
        assert len(content(frame)) == frame.num_bytes(LAYOUT) <= max(chunk_bytes, block_and_layer)


@given(st.integers(1, 4000), st.lists(st.integers(1, 39), max_size=4), st.booleans())
def test_chunks_layer_by_layer_cover_their_range_exactly_once(chunk_bytes: int, cuts: list[int], again: bool) -> None:
    coverage = Coverage(LAYOUT.num_layers, 0, 40)
    edges = sorted({0, 40, *cuts})
    for token_start, token_stop in pairwise(edges):
        for layer in range(LAYOUT.num_layers):
            assert not coverage.complete
            for frame in split_segment(Segment(layer, layer + 1, token_start, token_stop), LAYOUT, chunk_bytes):
                coverage.add(frame)
                if again:
                    with pytest.raises(ValueError, match=r"goes on at|do not end"):
                        coverage.add(frame)
    assert coverage.complete


@pytest.mark.parametrize(
    "segment",
    [
        Segment(0, 6, 8, 9),  # a layer too many
        Segment(2, 2, 8, 9),  # no layer
        Segment(0, 5, 7, 9),  # before the range
        Segment(0, 5, 8, 21),  # after it
        Segment(0, 5, 9, 20),  # a gap
        Segment(0, 5, 8, 8),  # nothing
        Segment(0, 5, 9, 8),
    ],
)
def test_what_is_not_due_is_not_covered(segment: Segment) -> None:
    coverage = Coverage(5, 8, 20)
    with pytest.raises(ValueError):  # noqa: PT011 - each has its own words
        coverage.add(segment)
    coverage.add(Segment(0, 5, 8, 20))
    assert coverage.complete


def test_a_table_that_does_not_hold_the_range_is_a_transfer_error() -> None:
    with pytest.raises(KvTransferError):
        HostKvMemory(LAYOUT, 3).segment_views([0, 1], Segment(0, 1, 0, 9))
