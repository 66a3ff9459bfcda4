"""Leases: a worker's promise that the KV of a range of one round stays in its blocks until the lease ends.

A lease ends exactly once, and its owner hears of it exactly once; from then on the owner may reuse the blocks. A sender
that is reading them at that moment finds out before its next frame, and at the latest before its trailer: it then ends
the transfer as failed, so bytes of a reused block are never accepted by a receiver.

lease_id is a slot, used again and again; `generation` never repeats within a table, so an old name finds nothing.
All methods may be called from any thread; on_end is called without any lock held, by whichever thread ends the lease.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from enum import Enum, StrEnum

from shared.core.types import RoundKey, Segment
from shared.errors import AmpdError, ErrorCode
from shared.transport.protocol import Coverage


class LeaseEnd(StrEnum):
    DELIVERED = "delivered"  # the receiver has verified every byte
    RELEASED = "released"  # the owner or the receiver gave it up
    EXPIRED = "expired"  # not renewed within its ttl
    FAILED = "failed"  # the producer failed, or the one pull of it broke off


class Publication(Enum):
    """What `next_segment` finds when there is no segment."""

    PENDING = "pending"
    COMPLETE = "complete"


class Lease:
    """Made by LeaseTable.grant. The producer publishes; one connection of the server reads."""

    def __init__(
        self,
        table: LeaseTable,
        lease_id: int,
        generation: int,
        key: RoundKey,
        block_table: tuple[int, ...],
        coverage: Coverage,
        token_range: tuple[int, int],
        ttl_s: float,
        on_end: Callable[[Lease, LeaseEnd], None],
    ) -> None:
        self.lease_id = lease_id
        self.generation = generation
        self.key = key
        self.block_table = block_table
        self.token_start, self.token_stop = token_range
        self.ttl_s = ttl_s
        self.granted_at = table.clock()
        self.end: LeaseEnd | None = None
        self.reason = ""
        self._table = table
        self._on_end = on_end
        self._expires_at = self.granted_at + ttl_s
        self._coverage = coverage
        self._changed = threading.Condition()
        self._segments: list[Segment] = []  # bounded: `_coverage` accepts each (layer, token) once
        self._finished = False
        self._pulled = False

    # ------------------------------------------------------------------------------ for the producer

    def publish(self, segment: Segment) -> bool:
        """The KV of this segment is in the blocks and will not change while the lease lives.

        Costs microseconds. Returns False if the lease has ended: nobody will read what else is published.
        Raises ValueError if it leaves the range, repeats, or skips positions of a layer.
        """
        with self._changed:
            if self.end is not None:
                return False
            if self._finished:
                raise ValueError("the lease is finished: nothing can be published any more")
            self._coverage.add(segment)
            self._segments.append(segment)
            self._changed.notify_all()
            return True

    def finish(self) -> None:
        """Everything is published. Raises ValueError if something is missing; does nothing if the lease has ended."""
        with self._changed:
            if self.end is None and not self._coverage.complete:
                raise ValueError("finish() before the whole range was published")
            self._finished = True
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """The producer cannot go on: ends the lease; a pull in progress ends as failed, with this reason."""
        self._table.end(self, LeaseEnd.FAILED, reason)

    # ------------------------------------------------------------------------------- for the sender

    def next_segment(self, index: int, timeout_s: float) -> Segment | Publication:
        """The index-th published segment; waits up to timeout_s for it. Raises KV_LEASE_INVALID once ended."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.end is not None or self._finished or index < len(self._segments), timeout_s
            )
            published = self._segments[index] if index < len(self._segments) else None
            finished = self._finished
        self.check()  # not under the lock: it may end the lease, and on_end is called without locks
        if published is not None:
            return published
        return Publication.COMPLETE if finished else Publication.PENDING

    def check(self) -> None:
        """Raises AmpdError KV_LEASE_INVALID if the lease has ended; ends it first if its ttl has passed."""
        if self.end is None and self._table.clock() >= self.expires_at:
            self._table.end(self, LeaseEnd.EXPIRED)
        if self.end is not None:
            because = f": {self.reason}" if self.reason else ""
            raise AmpdError(ErrorCode.KV_LEASE_INVALID, f"the lease has ended ({self.end.value}){because}")

    def begin_pull(self) -> None:
        """Raises AmpdError KV_LEASE_INVALID if a pull of this lease has begun before: a lease serves one receiver."""
        with self._changed:
            if self._pulled:
                raise AmpdError(ErrorCode.KV_LEASE_INVALID, "the lease is being pulled already")
            self._pulled = True

    # ------------------------------------------------------------------------------ for the table

    @property
    def expires_at(self) -> float:
        return self._expires_at

    def _renew(self, now: float) -> None:
        self._expires_at = now + self.ttl_s

    def _mark_ended(self, end: LeaseEnd, reason: str) -> bool:
        with self._changed:
            if self.end is not None:
                return False
            self.reason = reason
            self.end = end
            self._changed.notify_all()
            return True


class LeaseTable:
    """Every live lease of this worker. `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float], *, max_leases: int = 4096) -> None:
        self.clock = clock
        self._max_leases = max_leases
        self._lock = threading.Lock()
        self._leases: dict[int, Lease] = {}
        self._free_ids: list[int] = []
        self._last_generation = 0

    def grant(
        self,
        key: RoundKey,
        block_table: Sequence[int],
        token_start: int,
        token_stop: int,
        *,
        ttl_s: float,
        on_end: Callable[[Lease, LeaseEnd], None],
        complete: bool,
        num_layers: int,
    ) -> Lease:
        """Lease positions [token_start, token_stop) of `key`, in blocks `block_table` (position p in p // block_size).

        complete: the KV of the whole range is there already. Otherwise the producer publishes it as it is computed.
        Raises AmpdError OVERLOADED if max_leases are held, ValueError for an empty range.
        """
        if not (0 <= token_start < token_stop and num_layers > 0 and ttl_s > 0):
            raise ValueError(f"an empty lease: tokens [{token_start}, {token_stop}), {num_layers} layers, {ttl_s} s")
        with self._lock:
            if len(self._leases) >= self._max_leases:
                raise AmpdError(ErrorCode.OVERLOADED, f"{self._max_leases} KV leases are held", retry_after_s=1.0)
            lease_id = self._free_ids.pop() if self._free_ids else len(self._leases)
            self._last_generation += 1
            lease = Lease(
                self,
                lease_id,
                self._last_generation,
                key,
                tuple(block_table),
                Coverage(num_layers, token_start, token_stop),
                (token_start, token_stop),
                ttl_s,
                on_end,
            )
            self._leases[lease_id] = lease
        if complete:
            lease.publish(Segment(0, num_layers, token_start, token_stop))
            lease.finish()
        return lease

    def renew(self, lease_id: int, generation: int) -> None:
        """Another ttl from now. Raises AmpdError KV_LEASE_INVALID if it is unknown, ended or expired."""
        lease = self.find(lease_id, generation)
        with self._lock:
            if lease.end is None:
                lease._renew(self.clock())

    def release(self, lease_id: int, generation: int) -> bool:
        """Give the lease up; an unknown or ended one is left as it is. Returns whether this call ended it."""
        with self._lock:
            lease = self._leases.get(lease_id)
        if lease is None or lease.generation != generation:
            return False
        return self.end(lease, LeaseEnd.RELEASED)

    def expire(self) -> int:
        """End the leases whose ttl has passed, and return how many those were. To be called about once a second."""
        now = self.clock()
        with self._lock:
            late = [lease for lease in self._leases.values() if now >= lease.expires_at]
        return sum(self.end(lease, LeaseEnd.EXPIRED, only_at=now) for lease in late)

    def find(self, lease_id: int, generation: int) -> Lease:
        """The live lease of this name. Raises AmpdError KV_LEASE_INVALID."""
        with self._lock:
            lease = self._leases.get(lease_id)
        if lease is None or lease.generation != generation:
            raise AmpdError(ErrorCode.KV_LEASE_INVALID, f"there is no lease {lease_id}, generation {generation}")
        lease.check()
        return lease

    def end(self, lease: Lease, end: LeaseEnd, reason: str = "", *, only_at: float | None = None) -> bool:
        """End a lease, whoever asks first; the owner's on_end runs before this returns. False if it had ended.

        only_at: only if the lease has (still) expired at this time.
        """
        with self._lock:
            if only_at is not None and lease.expires_at > only_at:
                return False
            if not lease._mark_ended(end, reason):
                return False
            del self._leases[lease.lease_id]
            self._free_ids.append(lease.lease_id)
        lease._on_end(lease, end)
        return True

    def __len__(self) -> int:
        with self._lock:
            return len(self._leases)
