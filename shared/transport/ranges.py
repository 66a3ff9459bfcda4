"""Where a segment's bytes lie in a pool, as ranges of the pool's bytes in the order that Segment defines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from shared.core.types import KvLayout, Segment


class ByteRange(NamedTuple):
    start: int
    stop: int


def find_ranges(layout: KvLayout, block_table: Sequence[int], segment: Segment) -> list[ByteRange]:
    """As few ranges as possible: one that starts where the last one stops is joined to it.

    The pool is block-major, so whole blocks are one range each, or fewer; of a part of a block, or of some of its
    layers, the keys and the values of every layer lie apart. The caller has checked the segment.
    """
    ranges: list[ByteRange] = []
    for start, stop in _walk(layout, block_table, segment):
        if ranges and ranges[-1].stop == start:
            ranges[-1] = ByteRange(ranges[-1].start, stop)
        else:
            ranges.append(ByteRange(start, stop))
    return ranges


def _walk(layout: KvLayout, block_table: Sequence[int], segment: Segment) -> Iterator[tuple[int, int]]:
    plane_bytes = layout.block_size * layout.slot_bytes  # the keys, or the values, of one block in one layer
    position = segment.token_start
    while position < segment.token_stop:
        index, first_slot = divmod(position, layout.block_size)
        stop_slot = min(layout.block_size, segment.token_stop - index * layout.block_size)
        base = block_table[index] * layout.bytes_per_block
        if stop_slot - first_slot == layout.block_size:
            yield base + segment.layer_start * 2 * plane_bytes, base + segment.layer_stop * 2 * plane_bytes
        else:
            for plane in range(2 * segment.layer_start, 2 * segment.layer_stop):
                start = base + plane * plane_bytes
                yield start + first_slot * layout.slot_bytes, start + stop_slot * layout.slot_bytes
        position = index * layout.block_size + stop_slot


def slice_views(whole: memoryview, ranges: Sequence[ByteRange]) -> list[memoryview]:
    return [whole[start:stop] for start, stop in ranges]
