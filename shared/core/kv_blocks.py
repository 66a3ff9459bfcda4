"""Who owns which KV block. Invariant: every block but block 0 (padding) is free or has exactly one owner."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from shared.errors import AmpdError, ErrorCode


class BlockAllocator:
    """Hands out block ids 1 .. num_blocks-1. Not thread-safe: the engine loop is its only user."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2 or block_size < 1:
            raise AmpdError(
                ErrorCode.INVALID_REQUEST,
                f"the KV pool needs at least 2 blocks of at least 1 token, got {num_blocks} of {block_size}: "
                "give the worker more KV memory",
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, 0, -1))
        self._owner: dict[int, Hashable] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Blocks there are in all, the padding block aside."""
        return self.num_blocks - 1

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int, owner: Hashable) -> list[int]:
        """`count` blocks for `owner`. Raises OUT_OF_BLOCKS, taking none, when fewer are free."""
        if count > len(self._free):
            raise AmpdError(
                ErrorCode.OUT_OF_BLOCKS,
                f"{count} KV blocks wanted, {len(self._free)} free",
                retry_after_s=1.0,
            )
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._owner[block] = owner
        return blocks

    def free(self, blocks: Iterable[int], owner: Hashable) -> None:
        """Give blocks back. Freeing what `owner` does not hold is a programming error."""
        for block in blocks:
            if self._owner.pop(block) != owner:
                raise AssertionError(f"block {block} is not held by {owner!r}")
            self._free.append(block)

    def check_integrity(self) -> None:
        """Assert the invariant of this module; for tests and for idle moments."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & self._owner.keys(), "a block is free and owned"
        assert len(free) + len(self._owner) == self.num_usable, "a block is lost"
