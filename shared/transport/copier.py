"""Copies between pools in host memory by two threads: one alone does not use what memory can do."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor

from shared.transport.flat_memory import FlatMemory

Piece = tuple[int, int, int]  # (here, there, num_bytes)

NUM_HELPERS = 1
PART_BYTES = 2 << 20  # taken at once
MIN_BYTES = 4 << 20  # less is not worth waking a helper


class Copier:
    """Whoever asks for a copy works on it, and a helper if one is free: nobody waits for one that is busy with another
    copy. For any number of threads."""

    def __init__(self, name: str) -> None:
        self._helpers = ThreadPoolExecutor(NUM_HELPERS, thread_name_prefix=name)
        self._helpers.submit(int).result()  # the thread is there from now on: no copy can fail for want of one

    def copy(self, target: FlatMemory, source: FlatMemory, pieces: Iterable[Piece]) -> None:
        """As FlatMemory.copy_from."""
        pieces = list(pieces)
        if target.kind != "DRAM" or sum(num_bytes for _, _, num_bytes in pieces) < MIN_BYTES:
            target.copy_from(source, pieces)
            return
        parts = deque(_cut(pieces))

        def work() -> None:
            with contextlib.suppress(IndexError):
                while True:
                    target.copy_from(source, parts.popleft())

        helping = [self._helpers.submit(work) for _ in range(NUM_HELPERS)]
        try:
            work()
        finally:
            parts.clear()  # after a failure nobody begins another part
            for one in helping:
                one.cancel()
                with contextlib.suppress(CancelledError):
                    one.result()

    def close(self) -> None:
        self._helpers.shutdown()


def _cut(pieces: Iterable[Piece]) -> Iterable[list[Piece]]:
    """The same bytes in parts of PART_BYTES, but for the last."""
    part: list[Piece] = []
    room = PART_BYTES
    for here, there, num_bytes in pieces:
        while num_bytes:
            taken = min(num_bytes, room)
            part.append((here, there, taken))
            here, there, num_bytes, room = here + taken, there + taken, num_bytes - taken, room - taken
            if not room:
                yield part
                part, room = [], PART_BYTES
    if part:
        yield part
