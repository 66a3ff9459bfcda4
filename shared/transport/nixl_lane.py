"""nixl: the receiver reads the sender's pool with NVIDIA's NIXL, over what its UCX finds best between the two.

That is CMA within a host, RDMA or TCP between hosts; on GPUs cuda_ipc and GPUDirect RDMA, from device memory to device
memory (not run on a GPU yet).

A NIXL read cannot be stopped: one that is given up may still write long afterwards. So reads go into slots of this
worker, and from there into the blocks; a slot whose read is given up is in quarantine until the read has ended. NIXL's
own progress thread would spin. Ours sleeps when there is nothing to read or to serve (a read over TCP does not go on
without its sender's help), and while a pull's thread copies one frame out of its slot it reads the next.

The digest is of a sample, as with shm: RDMA, CMA and TCP check what they carry, and a sample can be had on a device.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import msgspec
import structlog

from shared.errors import AmpdError, ErrorCode, KvTransferError
from shared.transport.channel import Channel
from shared.transport.copier import Copier
from shared.transport.flat_memory import Kind, add_sample, pair_ranges
from shared.transport.lanes import LaneUnusable, OneSidedMemory, count_frame_bytes
from shared.transport.nixl_agent import Blocks, NixlAgent, NixlError, Place, Read, read_ucx_lanes
from shared.transport.protocol import Digest
from shared.transport.ranges import ByteRange

log = structlog.get_logger(__name__)

NUM_SLOTS = 8
POLL_S = 50e-6
WAKE_S = 0.02  # how often who waits for a read looks whether it has to stop
LINGER_S = 1.0  # of progress after a pull that failed
MAX_CLOSE_S = 2.0
MAX_PEERS_READ = 256  # that are remembered


class _PoolBody(msgspec.Struct, frozen=True):
    """What a receiver is told of a sender's pool. `agent`: NIXL's metadata."""

    agent: bytes
    address: int
    num_bytes: int
    kind: Kind
    device_index: int


class NixlLane:
    """See Lane. Raises AmpdError INVALID_REQUEST if NIXL is not there, or the pool is in several pieces; NixlError if
    it will not have this memory."""

    name = "nixl"

    def __init__(self, memory: OneSidedMemory, worker_id: str, *, chunk_bytes: int = 16 << 20) -> None:
        if memory.flat is None:
            raise AmpdError(ErrorCode.INVALID_REQUEST, "KV goes by nixl only from a pool that is in one piece")
        self.memory = memory
        self.chunk_bytes = chunk_bytes
        self.flat = memory.flat
        self._block_bytes = memory.layout.bytes_per_block
        self.slot_bytes = count_frame_bytes(memory.layout, chunk_bytes)
        self.slots = self.flat.allocate(NUM_SLOTS * self.slot_bytes)
        self._place = Place.of(self.flat)
        self.agent = NixlAgent(f"{worker_id}:{secrets.token_hex(4)}")
        self._registered = [self.agent.register(one) for one in (self.flat, self.slots)]
        flat = self.flat
        self._body = msgspec.msgpack.encode(
            _PoolBody(self.agent.metadata, flat.address, flat.num_bytes, flat.kind, flat.device_index)
        )
        self._slot_blocks = self._prepare_slots()
        self.copier = Copier(f"kv-nixl-copy:{worker_id}")
        self._changed = threading.Condition()
        self._free = list(range(NUM_SLOTS))
        self._to_begin: deque[NixlReading] = deque()
        self._begun: list[NixlReading] = []
        self._pools: weakref.WeakValueDictionary[bytes, NixlPool] = weakref.WeakValueDictionary()
        self._peers_read: dict[bytes, None] = {}  # agents of which a read has succeeded; oldest first
        self._num_serving = 0
        self._linger_until = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"kv-nixl:{worker_id}", daemon=True)
        self._thread.start()

    def _prepare_slots(self) -> Blocks | None:
        """Those that begin at multiples of a block's bytes within each slot; None: no whole block fits into one."""
        step, base = self._block_bytes, self.slots.address
        starts = range(0, self.slot_bytes - step + 1, step)
        addresses = [base + slot * self.slot_bytes + start for slot in range(NUM_SLOTS) for start in starts]
        return self.agent.prepare("", self._place, addresses, step) if addresses else None

    # ----------------------------------------------------------------------------------- as sender

    def suits(self, channel: Channel) -> bool:
        return True

    def describe(self) -> bytes:
        return self._body

    def hand_over(self, channel: Channel) -> None:
        """All has been told."""

    def add_to_digest(self, digest: Digest, ranges: Sequence[ByteRange]) -> None:
        add_sample(digest, self.flat, ranges)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        with self._changed:
            self._num_serving += 1
            self._changed.notify_all()
        try:
            yield
        except BaseException:
            with self._changed:  # reads that its receiver has given up are to end there
                self._linger_until = time.monotonic() + LINGER_S
            raise
        finally:
            with self._changed:
                self._num_serving -= 1

    # --------------------------------------------------------------------------------- as receiver

    def open(self, channel: Channel, peer: tuple[str, int], description: bytes) -> NixlPool:
        try:
            body = msgspec.msgpack.decode(description, type=_PoolBody)
        except msgspec.DecodeError as error:
            raise AmpdError(ErrorCode.MALFORMED_MESSAGE, f"bad description of a pool: {error}") from error
        with self._changed:
            pool = self._pools.get(body.agent)
            if pool is None:
                name = ""
                try:
                    name = self.agent.add_peer(body.agent)
                    addresses = range(body.address, body.address + body.num_bytes, self._block_bytes)
                    place = Place(body.kind, body.device_index)
                    blocks = self.agent.prepare(name, place, addresses, self._block_bytes)
                except NixlError as error:
                    if name:
                        with contextlib.suppress(NixlError):
                            self.agent.remove_peer(name)
                    raise KvTransferError(
                        ErrorCode.KV_TRANSFER_FAILED, f"nixl cannot reach {peer[0]}: {error}"
                    ) from error
                pool = NixlPool(self, name, body, blocks)
                self._pools[body.agent] = pool
        return pool

    def submit(
        self, pool: NixlPool, ranges: Sequence[ByteRange], check: Callable[[], None], *, wait: bool
    ) -> NixlReading | None:
        """A read that the lane's thread begins. None: all slots are in use, and `wait` is false."""
        while True:
            with self._changed:
                if self._free and not self._closed:
                    reading = NixlReading(self, pool, ranges, self._free.pop(), check)
                    self._to_begin.append(reading)
                    self._changed.notify_all()
                    return reading
                if not wait:
                    return None
                self._changed.wait(WAKE_S)
            check()

    def note_read(self, agent: bytes) -> None:
        with self._changed:
            self._peers_read[agent] = None
            while len(self._peers_read) > MAX_PEERS_READ:
                del self._peers_read[next(iter(self._peers_read))]

    def has_read(self, agent: bytes) -> bool:
        """Whether a read of that peer's pool has ever succeeded."""
        with self._changed:
            return agent in self._peers_read

    def give_back(self, slot: int) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def begin(self, pool: NixlPool, ranges: Sequence[ByteRange], slot: int) -> Read:
        """Raises NixlError."""
        step = self._block_bytes
        if self._slot_blocks is not None and all(start % step == stop % step == 0 for start, stop in ranges):
            which = [block for start, stop in ranges for block in range(start // step, stop // step)]
            first = slot * (self.slot_bytes // step)
            return self.agent.read_blocks(self._slot_blocks, range(first, first + len(which)), pool.blocks, which)
        sources = [(pool.address + start, stop - start) for start, stop in ranges]
        address = self.slots.address + slot * self.slot_bytes
        return self.agent.read_ranges(pool.agent_name, pool.place, sources, self._place, address)

    # ------------------------------------------------------------------------------ the lane's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._is_serving() or self._to_begin or self._begun)
                if self._closed and not self._begun:
                    return
            if not self._advance():
                time.sleep(POLL_S)

    def _advance(self) -> bool:
        """Begin what is to be begun, look at what runs; whether any has ended."""
        with self._changed:
            beginning = list(self._to_begin)
            self._to_begin.clear()
        for reading in beginning:
            if reading.start():
                self._begun.append(reading)
        ended = [reading for reading in self._begun if reading.has_ended()]
        self._begun = [reading for reading in self._begun if reading not in ended]
        if not self._begun and self._is_serving():
            with contextlib.suppress(NixlError):  # a peer that is gone: its connection here says so too
                self.agent.progress()
        return bool(ended)

    def _is_serving(self) -> bool:
        return self._num_serving > 0 or time.monotonic() < self._linger_until

    @property
    def num_free_slots(self) -> int:
        with self._changed:
            return len(self._free)

    # ----------------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Waits for given up reads, at most MAX_CLOSE_S; what then still runs keeps its memory for good."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.copier.close()
        self._thread.join(MAX_CLOSE_S)
        if self._thread.is_alive():
            log.warning("nixl_reads_never_ended", count=len(self._begun))
            return  # the thread keeps everything that they write to
        for pool in list(self._pools.values()):
            pool.forget()
        if self._slot_blocks is not None:
            self.agent.release(self._slot_blocks)
            self._slot_blocks = None
        for registered in self._registered:
            self.agent.deregister(registered)
        self.agent.close()


def _forget_peer(agent: NixlAgent, name: str, blocks: Blocks) -> None:
    with contextlib.suppress(NixlError):
        agent.release(blocks)
        agent.remove_peer(name)


class NixlPool:
    """See RemotePool."""

    def __init__(self, lane: NixlLane, agent_name: str, body: _PoolBody, blocks: Blocks) -> None:
        self._lane = lane
        self.agent_name = agent_name
        self.memory = lane.memory
        self.address = body.address
        self.place = Place(body.kind, body.device_index)
        self.num_bytes = body.num_bytes
        self.max_frame_bytes = lane.slot_bytes
        self.agent = body.agent
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
        return self._lane.submit(self, ranges, check, wait=wait)

    def note_read(self) -> None:
        """One has succeeded. After the first UCX has chosen its lanes."""
        self._lane.note_read(self.agent)
        if self.description == "nixl":
            self.description = f"nixl {read_ucx_lanes()}"
            log.info("nixl_lanes", peer=self.agent_name, lanes=self.description)


class NixlReading:
    """See Reading. Begun and watched by the lane's thread, waited for by its pull's."""

    def __init__(
        self, lane: NixlLane, pool: NixlPool, ranges: Sequence[ByteRange], slot: int, check: Callable[[], None]
    ) -> None:
        self._lane = lane
        self._pool = pool  # kept: NIXL must know the peer while it reads
        self._ranges = ranges
        self._slot = slot
        self._check = check
        self._read: Read | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._failure = ""
        self._is_wanted = True

    # the lane's thread

    def start(self) -> bool:
        """Whether it runs."""
        try:
            self._read = self._lane.begin(self._pool, self._ranges, self._slot)
        except NixlError as error:
            self._end(str(error))
            return False
        return True

    def has_ended(self) -> bool:
        """Whether nothing writes into the slot any more."""
        assert self._read is not None
        failure = ""
        try:
            if not self._lane.agent.has_ended(self._read):
                return False
        except NixlError as error:
            failure = str(error)
        with contextlib.suppress(NixlError):
            self._lane.agent.forget(self._read)
        self._read = None
        self._end(failure)
        return True

    def _end(self, failure: str) -> None:
        with self._lock:
            self._failure = failure
            self._ended.set()
            if self._is_wanted:
                return
        self._lane.give_back(self._slot)  # out of quarantine

    # the pull's thread

    def finish(self, targets: Sequence[ByteRange], digest: Digest) -> None:
        try:
            while not self._ended.wait(WAKE_S):
                self._check()
            if self._failure:
                kind = KvTransferError if self._lane.has_read(self._pool.agent) else LaneUnusable
                raise kind(ErrorCode.KV_TRANSFER_FAILED, f"nixl: {self._failure}")
            lane, start = self._lane, self._slot * self._lane.slot_bytes
            source = [ByteRange(start, start + sum(one.stop - one.start for one in targets))]
            lane.copier.copy(lane.flat, lane.slots, pair_ranges(targets, source))
            add_sample(digest, lane.flat, targets)
        finally:
            self.abandon()
        self._pool.note_read()

    def abandon(self) -> None:
        """The slot is free again once nothing writes into it."""
        with self._lock:
            self._is_wanted = False
            if not self._ended.is_set():
                return
        self._lane.give_back(self._slot)
