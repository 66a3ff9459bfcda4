"""Copies by two threads: every byte, nobody waits for a busy helper, a failure is whose copy it was."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.transport.copier import MIN_BYTES, PART_BYTES, Copier
from shared.transport.flat_memory import FlatMemory, HostBytes

SIZE = 3 * MIN_BYTES + 12_345
DATA = np.random.default_rng(3).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture(scope="module")
def copier() -> Iterator[Copier]:
    copier = Copier("kv-copy-test")
    yield copier
    copier.close()
    assert not any(thread.name.startswith("kv-copy-test") for thread in threading.enumerate())


def host(num_bytes: int = SIZE) -> HostBytes:
    return HostBytes(memoryview(bytearray(num_bytes)))


SOURCE = HostBytes(memoryview(bytearray(DATA.tobytes())))


@given(st.lists(st.integers(1, SIZE - 1), max_size=5, unique=True))
def test_every_byte_goes_where_it_belongs(copier: Copier, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), SIZE]
    target = host()
    copier.copy(target, SOURCE, [(start, start, stop - start) for start, stop in itertools.pairwise(edges)])
    assert target.gather(np.arange(SIZE)) == DATA.tobytes()


class Watched(HostBytes):
    """Says which threads copy; the helper waits for `holds`."""

    def __init__(self, *, holds: threading.Event | None = None) -> None:
        super().__init__(memoryview(bytearray(SIZE)))
        self.threads: list[str] = []
        self.helper_is_busy = threading.Event()
        self._holds = holds

    def copy_from(self, source: FlatMemory, pieces: Sequence[tuple[int, int, int]]) -> None:
        name = threading.current_thread().name
        self.threads.append(name)
        if self._holds is not None:
            if name.startswith("kv-copy-test"):
                self.helper_is_busy.set()
                self._holds.wait(30)
            else:  # not done before the helper has begun
                self.helper_is_busy.wait(30)
        super().copy_from(source, pieces)


def test_nobody_waits_for_a_helper_that_is_busy_with_another_copy(copier: Copier) -> None:
    release = threading.Event()
    held, other = Watched(holds=release), Watched()
    first = threading.Thread(target=copier.copy, args=(held, SOURCE, [(0, 0, SIZE)]))
    first.start()
    assert held.helper_is_busy.wait(30)
    copier.copy(other, SOURCE, [(0, 0, SIZE)])
    assert set(other.threads) == {threading.current_thread().name}
    assert other.gather(np.arange(SIZE)) == DATA.tobytes()
    release.set()
    first.join(30)
    assert held.gather(np.arange(SIZE)) == DATA.tobytes(), "its own copy is not over before its helper is"


def test_a_little_is_copied_alone(copier: Copier) -> None:
    target = Watched()
    copier.copy(target, SOURCE, [(0, 0, MIN_BYTES - 1)])
    assert target.threads == [threading.current_thread().name]


def test_a_failure_is_raised_and_no_further_part_begun(copier: Copier) -> None:
    class Failing(HostBytes):
        begun = 0

        def copy_from(self, source: FlatMemory, pieces: Sequence[tuple[int, int, int]]) -> None:
            self.begun += 1
            raise ValueError("no memory")

    target = Failing(memoryview(bytearray(SIZE)))
    with pytest.raises(ValueError, match="no memory"):
        copier.copy(target, SOURCE, [(0, 0, SIZE)])
    assert target.begun <= 2 < SIZE // PART_BYTES


def test_a_copier_needs_no_further_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that failed to wake its helper could be gone on with after it has failed."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    fresh = Copier("kv-copy-fresh")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        target = host()
        fresh.copy(target, SOURCE, [(0, 0, SIZE)])
    assert target.gather(np.arange(SIZE)) == DATA.tobytes()
    fresh.close()
