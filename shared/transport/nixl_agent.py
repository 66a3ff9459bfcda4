"""NVIDIA's NIXL, which is optional, behind typed calls; and what its UCX says of the lanes that it has chosen."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NewType

from shared.errors import AmpdError, ErrorCode
from shared.transport.flat_memory import FlatMemory, Kind

PACKAGES = ("nixl_cu13", "nixl_cu12")
_LANES = re.compile(r"cfg#\d+\s+(.*\S)")
_LOG_PREFIX = "ampd-ucx-"

Blocks = NewType("Blocks", object)  # a prepared list of equal pieces of memory
Read = NewType("Read", object)


class Place(NamedTuple):
    """What memory an address is of."""

    kind: Kind
    device_index: int

    @classmethod
    def of(cls, memory: FlatMemory) -> Place:
        return cls(memory.kind, memory.device_index)


HOST = Place("DRAM", 0)


class NixlError(Exception):
    """What NIXL says went wrong."""


@contextlib.contextmanager
def _typed() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # NIXL's have no base class of their own
        if not type(error).__name__.startswith("nixl"):
            raise
        raise NixlError(str(error) or type(error).__name__) from error


class NixlAgent:
    """With UCX, for any number of threads; makes progress only when it is called. Every call may raise NixlError.

    Raises AmpdError INVALID_REQUEST if the package is not there.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        library = _load()
        config = library.nixl_agent_config(
            enable_prog_thread=False,
            backends=["UCX"],
            sync_mode=library.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        self._agent = library.nixl_agent(name, config)

    def register(self, memory: FlatMemory) -> Any:
        with _typed():
            return self._agent.register_memory(
                [(memory.address, memory.num_bytes, memory.device_index, "")], memory.kind
            )

    def deregister(self, registered: Any) -> None:
        with _typed():
            self._agent.deregister_memory(registered)

    @property
    def metadata(self) -> bytes:
        """Of everything registered: what a peer needs to read it."""
        with _typed():
            return bytes(self._agent.get_agent_metadata())

    def add_peer(self, metadata: bytes) -> str:
        with _typed():
            name = self._agent.add_remote_agent(metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def remove_peer(self, name: str) -> None:
        with _typed():
            self._agent.remove_remote_agent(name)

    def prepare(self, peer: str, place: Place, addresses: Sequence[int], num_bytes: int) -> Blocks:
        """Pieces of num_bytes each, of a peer's memory, or of our own ("")."""
        pieces = [(one, num_bytes, place.device_index) for one in addresses]
        with _typed():
            return Blocks(self._agent.prep_xfer_dlist(peer, pieces, place.kind))

    def release(self, blocks: Blocks) -> None:
        with _typed():
            self._agent.release_dlist_handle(blocks)

    def read_blocks(self, targets: Blocks, into: Sequence[int], sources: Blocks, which: Sequence[int]) -> Read:
        with _typed():
            read = self._agent.make_prepped_xfer("READ", targets, list(into), sources, list(which))
        return self._start(read)

    def read_ranges(
        self, peer: str, there: Place, sources: Sequence[tuple[int, int]], here: Place, address: int
    ) -> Read:
        """(address, num_bytes) of the peer's, one after another to `address`."""
        targets = []
        for _, num_bytes in sources:
            targets.append((address, num_bytes, here.device_index))
            address += num_bytes
        with _typed():
            read = self._agent.initialize_xfer(
                "READ",
                self._agent.get_xfer_descs(targets, here.kind),
                self._agent.get_xfer_descs([(*source, there.device_index) for source in sources], there.kind),
                peer,
            )
        return self._start(read)

    def _start(self, read: Any) -> Read:
        try:
            with _typed():
                self._agent.transfer(read)
        except NixlError:
            self.forget(read)
            raise
        return Read(read)

    def has_ended(self, read: Read) -> bool:
        """Makes progress. Raises NixlError once it has failed: it has ended then too."""
        with _typed():
            state = self._agent.check_xfer_state(read)
        if state == "ERR":
            raise NixlError("the read failed")
        return bool(state == "DONE")

    def forget(self, read: Read) -> None:
        """One that has ended."""
        with _typed():
            self._agent.release_xfer_handle(read)

    def progress(self) -> None:
        with _typed():
            self._agent.get_new_notifs()

    def close(self) -> None:
        """Its sockets and memory go when the lists and reads made here have gone."""
        del self._agent


def is_installed() -> bool:
    return any(importlib.util.find_spec(package) is not None for package in PACKAGES)


@functools.cache
def _load() -> Any:
    """What the user has set for UCX stays. Where it logs to UCX reads once, when it is loaded."""
    package = next((one for one in PACKAGES if importlib.util.find_spec(one) is not None), None)
    if package is None:
        raise AmpdError(ErrorCode.INVALID_REQUEST, "--kv-transport nixl needs NVIDIA's NIXL: pip install 'ampd[nixl]'")
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    if _LOG_PREFIX in os.environ.get("UCX_LOG_FILE", _LOG_PREFIX):  # not set, or by the process that started this one
        descriptor, path = tempfile.mkstemp(prefix=_LOG_PREFIX, suffix=".log")
        os.close(descriptor)
        atexit.register(Path(path).unlink, missing_ok=True)
        os.environ["UCX_LOG_FILE"] = path
        os.environ.setdefault("UCX_LOG_LEVEL", "info")
    return importlib.import_module(f"{package}._api")


def read_ucx_lanes() -> str:
    """What UCX has said last of the lanes of a connection, such as "rma_am(tcp/lo) am(tcp/lo cma/memory)"."""
    ctypes.CDLL(None).fflush(None)  # UCX writes through C's buffers
    path = Path(os.environ.get("UCX_LOG_FILE", ""))
    found = _LANES.findall(path.read_text()) if path.is_file() else []
    return " ".join(found[-1].split()) if found else "(UCX_LOG_LEVEL is not info: lanes unknown)"
