"""Fault tests of the KV data plane share the modules that lie beside them; test folders are no packages."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def kv_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("kv-")}


def socket_descriptors() -> int:
    """Open sockets of this process. The event loop's own pair is there before and after."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            count += str(link.readlink()).startswith("socket:")
        except FileNotFoundError:
            continue  # the listing's own descriptor
    return count


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    """Every thread and socket of the data plane is gone when the test's pairs are closed."""
    gc.collect()  # what tests before this one left in cycles
    threads, sockets = kv_threads(), socket_descriptors()
    yield
    gc.collect()  # what a failure's traceback holds
    assert kv_threads() == threads
    assert socket_descriptors() == sockets


@pytest.fixture(params=["tcp", "unix", "shm", "nixl", "nixl-tcp"])
def family(request: pytest.FixtureRequest) -> str:
    """Every behaviour holds over both socket families, and by every lane."""
    return str(request.param)
