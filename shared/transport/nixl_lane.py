"""nixl: the receiver reads the sender's pool with NVIDIA's NIXL, over what its UCX finds best between the two.

That is CMA within a host, RDMA or TCP between hosts; on GPUs cuda_ipc and GPUDirect RDMA, but pools here are in host
memory: device pools are to come.

A NIXL read cannot be stopped: one that is given up may still write long afterwards. So reads go into slots of this
worker, and from there into the blocks; a slot whose read is given up is in quarantine until the read has ended. The
agent has no progress thread, which would spin: whoever waits for a read moves it on, and a sender, without whose help a
read over TCP does not go on, does so while it serves one.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np
import structlog

from shared.errors import AmpdError, ErrorCode, KvTransferError
from shared.transport.channel import Channel
from shared.transport.lanes import OneSidedMemory
from shared.transport.nixl_agent import Blocks, NixlAgent, NixlError, Read, read_ucx_lanes
from shared.transport.protocol import CHUNK_BYTES, Digest
from shared.transport.ranges import ByteRange
from shared.transport.region import allocate_region
from shared.transport.shm_lane import Copying

log = structlog.get_logger(__name__)

NUM_SLOTS = 16
POLL_S = 50e-6
SLOW_POLL_S = 500e-6  # when a read takes longer than SLOW_S
SLOW_S = 0.05
MAX_CLOSE_S = 2.0


class _PoolBody(msgspec.Struct, frozen=True):
    """What a receiver is told of a sender's pool. `agent`: NIXL's metadata."""

    agent: bytes
    address: int
    num_bytes: int


class NixlLane:
    """See Lane. Raises AmpdError INVALID_REQUEST if NIXL is not there, or the pool is not in host memory."""

    name = "nixl"

    def __init__(self, memory: OneSidedMemory, worker_id: str) -> None:
        if memory.region is None:
            raise AmpdError(ErrorCode.INVALID_REQUEST, "KV goes by nixl only from a pool in host memory yet")
        self.memory = memory
        layout = memory.layout
        self._region = memory.region
        self._block_bytes = layout.bytes_per_block
        # a frame has CHUNK_BYTES, or one block of one layer if that is more
        self.slot_bytes = max(CHUNK_BYTES, 2 * layout.slot_bytes * layout.block_size)
        self._slots_region = allocate_region(NUM_SLOTS * self.slot_bytes, shared=False)
        self._slots = np.frombuffer(self._slots_region.data, dtype=np.uint8).reshape(NUM_SLOTS, self.slot_bytes)
        self._slots.fill(0)
        self.agent = NixlAgent(f"{worker_id}:{secrets.token_hex(4)}")
        self._registered = [
            self.agent.register(region.address, region.data.nbytes) for region in (self._region, self._slots_region)
        ]
        self._body = msgspec.msgpack.encode(
            _PoolBody(self.agent.metadata, self._region.address, self._region.data.nbytes)
        )
        self._slot_blocks = self._prepare_slots()
        self._lock = threading.Condition()
        self._free = list(range(NUM_SLOTS))
        self._given_up: list[NixlReading] = []  # in quarantine
        self._pools: weakref.WeakValueDictionary[bytes, NixlPool] = weakref.WeakValueDictionary()
        self._num_serving = 0
        self._progress: threading.Thread | None = None
        self._closed = False

    def _prepare_slots(self) -> Blocks | None:
        """Those that begin at multiples of a block's bytes within each slot; None: no whole block fits into one."""
        step, base = self._block_bytes, self._slots_region.address
        starts = range(0, self.slot_bytes - step + 1, step)
        addresses = [base + slot * self.slot_bytes + start for slot in range(NUM_SLOTS) for start in starts]
        return self.agent.prepare("", addresses, step) if addresses else None

    # ----------------------------------------------------------------------------------- as sender

    def suits(self, channel: Channel) -> bool:
        return True

    def describe(self) -> bytes:
        return self._body

    def hand_over(self, channel: Channel) -> None:
        """All has been told."""

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        with self._lock:
            self._num_serving += 1
            if self._progress is None:
                name = f"kv-nixl:{self.agent.name}"
                self._progress = threading.Thread(target=self._make_progress, name=name, daemon=True)
                self._progress.start()
            self._lock.notify_all()
        try:
            yield
        finally:
            with self._lock:
                self._num_serving -= 1

    def _make_progress(self) -> None:
        """While a peer may read: a read over TCP is answered from here."""
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closed or self._num_serving > 0)
                if self._closed:
                    return
            with contextlib.suppress(NixlError):  # a peer that is gone: its connection here says so too
                self.agent.progress()
            time.sleep(POLL_S)

    # --------------------------------------------------------------------------------- as receiver

    def open(self, channel: Channel, peer: tuple[str, int], description: bytes) -> NixlPool:
        try:
            body = msgspec.msgpack.decode(description, type=_PoolBody)
        except msgspec.DecodeError as error:
            raise AmpdError(ErrorCode.MALFORMED_MESSAGE, f"bad description of a pool: {error}") from error
        with self._lock:
            pool = self._pools.get(body.agent)
            if pool is None:
                try:
                    name = self.agent.add_peer(body.agent)
                    addresses = range(body.address, body.address + body.num_bytes, self._block_bytes)
                    blocks = self.agent.prepare(name, addresses, self._block_bytes)
                except NixlError as error:
                    raise KvTransferError(
                        ErrorCode.KV_TRANSFER_FAILED, f"nixl cannot reach {peer[0]}: {error}"
                    ) from error
                pool = NixlPool(self, name, body, blocks)
                self._pools[body.agent] = pool
        return pool

    def take_slot(self, check: Callable[[], None], *, wait: bool) -> int | None:
        """None: all are in use, and `wait` is false."""
        while True:
            with self._lock:
                self._sweep()
                if self._free:
                    return self._free.pop()
                if not wait:
                    return None
                self._lock.wait(SLOW_POLL_S)
            check()

    def give_back(self, slot: int) -> None:
        with self._lock:
            self._free.append(slot)
            self._lock.notify_all()

    def quarantine(self, reading: NixlReading) -> None:
        with self._lock:
            self._given_up.append(reading)

    def _sweep(self) -> None:
        """Slots of given up reads that have ended since."""
        ended = [reading for reading in self._given_up if reading.has_ended()]
        for reading in ended:
            self._given_up.remove(reading)
            self._free.append(reading.slot)

    def view_slot(self, slot: int, num_bytes: int) -> Copying:
        return Copying([self._slots[slot, :num_bytes]])

    def post(self, pool: NixlPool, ranges: Sequence[ByteRange], slot: int) -> Read:
        """Begin to read into the slot. Raises NixlError."""
        step = self._block_bytes
        if self._slot_blocks is not None and all(start % step == stop % step == 0 for start, stop in ranges):
            which = [block for start, stop in ranges for block in range(start // step, stop // step)]
            first = slot * (self.slot_bytes // step)
            return self.agent.read_blocks(self._slot_blocks, range(first, first + len(which)), pool.blocks, which)
        sources = [(pool.address + start, stop - start) for start, stop in ranges]
        return self.agent.read_ranges(pool.agent_name, sources, self._slots_region.address + slot * self.slot_bytes)

    # ----------------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Waits for given up reads, at most MAX_CLOSE_S; what then still runs keeps its memory for good."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        if self._progress is not None:
            self._progress.join()
        until = time.monotonic() + MAX_CLOSE_S
        while time.monotonic() < until:
            with self._lock:
                self._sweep()
                if not self._given_up:
                    break
            time.sleep(SLOW_POLL_S)
        if self._given_up:
            log.warning("nixl_reads_never_ended", count=len(self._given_up))
            _KEPT.append(self)
            return
        for pool in list(self._pools.values()):
            pool.forget()
        if self._slot_blocks is not None:
            self.agent.release(self._slot_blocks)
            self._slot_blocks = None
        for registered in self._registered:
            self.agent.deregister(registered)
        self.agent.close()


_KEPT: list[NixlLane] = []  # closed while reads into their slots ran


def _forget_peer(agent: NixlAgent, name: str, blocks: Blocks) -> None:
    with contextlib.suppress(NixlError):
        agent.release(blocks)
        agent.remove_peer(name)


class NixlPool:
    """See RemotePool."""

    def __init__(self, lane: NixlLane, agent_name: str, body: _PoolBody, blocks: Blocks) -> None:
        self._lane = lane
        self.agent_name = agent_name
        self.address = body.address
        self.num_bytes = body.num_bytes
        self.description = "nixl"
        self._blocks: Blocks | None = blocks
        self._forget = weakref.finalize(self, _forget_peer, lane.agent, agent_name, blocks)

    @property
    def blocks(self) -> Blocks:
        assert self._blocks is not None, "the lane is closed last"
        return self._blocks

    def forget(self) -> None:
        """The peer, at NIXL; also done when nobody has this pool any more."""
        self._forget()
        self._blocks = None

    def begin(self, ranges: Sequence[ByteRange], check: Callable[[], None], *, wait: bool) -> NixlReading | None:
        slot = self._lane.take_slot(check, wait=wait)
        if slot is None:
            return None
        try:
            read = self._lane.post(self, ranges, slot)
        except NixlError as error:
            self._lane.give_back(slot)
            raise KvTransferError(ErrorCode.KV_TRANSFER_FAILED, f"nixl refused to read: {error}") from error
        return NixlReading(self._lane, self, read, slot, sum(stop - start for start, stop in ranges), check)

    def note_lanes(self) -> None:
        """After the first read: UCX has chosen by then."""
        if self.description == "nixl":
            self.description = f"nixl {read_ucx_lanes()}"
            log.info("nixl_lanes", peer=self.agent_name, lanes=self.description)


class NixlReading:
    """See Reading."""

    def __init__(
        self, lane: NixlLane, pool: NixlPool, read: Read, slot: int, num_bytes: int, check: Callable[[], None]
    ) -> None:
        self._lane = lane
        self._pool = pool  # kept: NIXL must know the peer while it reads
        self._read: Read | None = read  # None: ended
        self._failure = ""
        self.slot = slot
        self._num_bytes = num_bytes
        self._check = check

    def finish(self, views: Sequence[memoryview], digest: Digest) -> None:
        started_at = time.monotonic()
        try:
            while not self.has_ended():
                self._check()
                time.sleep(POLL_S if time.monotonic() - started_at < SLOW_S else SLOW_POLL_S)
        except BaseException:
            self._lane.quarantine(self)
            raise
        try:
            if self._failure:
                raise KvTransferError(ErrorCode.KV_TRANSFER_FAILED, f"nixl: {self._failure}")
            self._lane.view_slot(self.slot, self._num_bytes).finish(views, digest)
        finally:
            self._lane.give_back(self.slot)
        self._pool.note_lanes()

    def has_ended(self) -> bool:
        """Whether nothing writes into the slot any more."""
        if self._read is None:
            return True
        agent = self._lane.agent
        try:
            if not agent.has_ended(self._read):
                return False
        except NixlError as error:
            self._failure = str(error)
        read, self._read = self._read, None
        with contextlib.suppress(NixlError):
            agent.forget(read)
        return True

    def abandon(self) -> None:
        self._lane.quarantine(self)
