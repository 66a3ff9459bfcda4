"""The KV pool's bytes: order, coalescing, bounds."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.core.types import KvLayout, Segment
from shared.engine.kv_pool import KvPool
from shared.errors import AmpdError, ErrorCode, KvTransferError

LAYOUT = KvLayout(model="m", num_layers=3, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32")
NUM_BLOCKS = 12


def filled_pool(dtype: str = "float32") -> KvPool:
    layout = KvLayout(model="m", num_layers=3, num_kv_heads=2, head_dim=4, block_size=4, dtype=dtype)
    pool = KvPool(layout, NUM_BLOCKS)
    pool.tensor.copy_(torch.randn(pool.tensor.shape, generator=torch.Generator().manual_seed(1)))
    return pool


def canonical_bytes(pool: KvPool, table: list[int], segment: Segment) -> bytes:
    """Segment's docstring, taken literally: by block, then layer, then keys before values, then slot."""
    size = pool.layout.block_size
    chunks = []
    for index in range(segment.token_start // size, -(-segment.token_stop // size)):
        slots = [s for s in range(size) if segment.token_start <= index * size + s < segment.token_stop]
        for layer in range(segment.layer_start, segment.layer_stop):
            for plane in (0, 1):
                for slot in slots:
                    value = pool.tensor[table[index], layer, plane, slot].contiguous()
                    chunks.append(value.view(torch.uint8).numpy().tobytes())
    return b"".join(chunks)


@st.composite
def segments(draw: st.DrawFn) -> tuple[list[int], Segment]:
    table = draw(st.permutations(range(1, NUM_BLOCKS)))[:6]
    token_start = draw(st.integers(0, 23))
    token_stop = draw(st.integers(token_start + 1, 24))
    layer_start = draw(st.integers(0, 2))
    layer_stop = draw(st.integers(layer_start + 1, 3))
    return list(table), Segment(layer_start, layer_stop, token_start, token_stop)


@given(segments(), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_views_are_the_segment_in_canonical_order(case: tuple[list[int], Segment], dtype: str) -> None:
    table, segment = case
    pool = filled_pool(dtype)
    joined = b"".join(pool.segment_views(table, segment))
    assert joined == canonical_bytes(pool, table, segment) == bytes(pool.read_segment(table, segment))
    assert len(joined) == segment.num_bytes(pool.layout)


@given(segments(), segments())
def test_writing_changes_the_segment_and_nothing_else(
    case: tuple[list[int], Segment], other: tuple[list[int], Segment]
) -> None:
    table, segment = case
    pool, before = filled_pool(), filled_pool()
    data = random.Random(2).randbytes(segment.num_bytes(LAYOUT))
    pool.write_segment(table, segment, data)
    assert b"".join(pool.segment_views(table, segment)) == data
    pool.write_segment(table, segment, before.read_segment(table, segment))
    assert torch.equal(pool.tensor, before.tensor)


def test_views_write_through_to_the_tensor() -> None:
    pool = KvPool(LAYOUT, NUM_BLOCKS)
    for view in pool.segment_views([5, 2], Segment(0, 3, 0, 8)):
        view[:] = b"\x00\x00\x80\x3f" * (len(view) // 4)  # 1.0 in float32
    assert bool((pool.tensor[[2, 5]] == 1.0).all())
    assert float(pool.tensor.sum()) == pool.tensor[[2, 5]].numel()


@pytest.mark.parametrize(
    ("table", "segment", "num_views"),
    [
        ([3], Segment(0, 3, 0, 4), 1),  # a whole block
        ([3, 4, 5], Segment(0, 3, 0, 12), 1),  # adjacent blocks
        ([3, 5, 4], Segment(0, 3, 0, 12), 3),
        ([3, 4], Segment(1, 2, 0, 8), 2),  # one layer of each block: keys and values together
        ([3], Segment(0, 1, 1, 3), 2),  # part of a block: keys, values
        ([3, 4], Segment(0, 3, 2, 8), 6),  # the last part of block 3's last plane joins block 4
    ],
)
def test_ranges_are_joined(table: list[int], segment: Segment, num_views: int) -> None:
    assert len(filled_pool().segment_views(table, segment)) == num_views


@pytest.mark.parametrize(
    ("table", "segment"),
    [
        ([1, 2], Segment(0, 4, 0, 8)),
        ([1, 2], Segment(-1, 2, 0, 8)),
        ([1, 2], Segment(2, 2, 0, 8)),
        ([1, 2], Segment(0, 3, 0, 9)),
        ([1, 2], Segment(0, 3, 5, 5)),
        ([1, 2], Segment(0, 3, -1, 5)),
        ([1, 0], Segment(0, 3, 0, 8)),
        ([1, NUM_BLOCKS], Segment(0, 3, 0, 8)),
    ],
)
def test_segments_outside_the_pool_are_refused(table: list[int], segment: Segment) -> None:
    pool = filled_pool()
    for access in (pool.segment_views, pool.read_segment):
        with pytest.raises(KvTransferError) as caught:
            access(table, segment)
        assert caught.value.code is ErrorCode.KV_TRANSFER_FAILED


def test_data_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(KvTransferError, match="bytes"):
        filled_pool().write_segment([1], Segment(0, 3, 0, 4), b"short")


def test_a_pool_needs_more_than_the_padding_block() -> None:
    with pytest.raises(AmpdError, match="at least 2 blocks"):
        KvPool(LAYOUT, 1)
