"""Leases: one end each, told once; names that never come back; a producer that keeps to its range."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shared.core.types import RoundKey, Segment
from shared.errors import AmpdError, ErrorCode
from shared.transport.leases import Lease, LeaseEnd, LeaseTable, Publication

KEY = RoundKey("t", "s", 0, 1)
TTL_S = 10.0


class Owner:
    def __init__(self) -> None:
        self.now = 0.0
        self.table = LeaseTable(lambda: self.now, max_leases=4)
        self.ends: Counter[tuple[int, int]] = Counter()
        self.last_end: LeaseEnd | None = None

    def grant(self, *, complete: bool = True) -> Lease:
        return self.table.grant(KEY, [0, 1], 2, 8, ttl_s=TTL_S, on_end=self.on_end, complete=complete, num_layers=2)

    def on_end(self, lease: Lease, end: LeaseEnd) -> None:
        self.ends[lease.lease_id, lease.generation] += 1
        self.last_end = end


class LeaseMachine(RuleBasedStateMachine):
    """Any order of grants, renewals, ends and passing time, against a model that is a dict of expiry times."""

    def __init__(self) -> None:
        super().__init__()
        self.owner = Owner()
        self.granted: list[Lease] = []
        self.expiry: dict[Lease, float] = {}

    def alive(self, lease: Lease) -> bool:
        return self.expiry.get(lease, 0.0) > self.owner.now

    @rule(complete=st.booleans())
    def grant(self, complete: bool) -> None:
        if len(self.expiry) == 4:
            with pytest.raises(AmpdError) as caught:
                self.owner.grant()
            assert caught.value.code is ErrorCode.OVERLOADED
            return
        lease = self.owner.grant(complete=complete)
        assert lease not in self.expiry
        self.granted.append(lease)
        self.expiry[lease] = self.owner.now + TTL_S

    @rule(seconds=st.sampled_from([0.0, 3.0, TTL_S]))
    def let_time_pass(self, seconds: float) -> None:
        self.owner.now += seconds

    @rule()
    def expire(self) -> None:
        late = [lease for lease in self.expiry if not self.alive(lease)]
        assert self.owner.table.expire() == len(late)
        for lease in late:
            del self.expiry[lease]

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        if not self.granted:
            return
        lease = data.draw(st.sampled_from(self.granted))
        if self.alive(lease):
            self.owner.table.renew(lease.lease_id, lease.generation)
            self.expiry[lease] = self.owner.now + TTL_S
        else:
            with pytest.raises(AmpdError) as caught:
                self.owner.table.renew(lease.lease_id, lease.generation)
            assert caught.value.code is ErrorCode.KV_LEASE_INVALID
            self.expiry.pop(lease, None)  # asked for too late: that ends it

    @rule(data=st.data(), fail=st.booleans())
    def end(self, data: st.DataObject, fail: bool) -> None:
        if not self.granted:
            return
        lease = data.draw(st.sampled_from(self.granted))
        if fail:
            lease.fail("because")
        else:
            assert self.owner.table.release(lease.lease_id, lease.generation) is (lease in self.expiry)
        self.expiry.pop(lease, None)

    @invariant()
    def each_ends_once(self) -> None:
        assert len(self.owner.table) == len(self.expiry)
        for lease in self.granted:
            ended = self.owner.ends[lease.lease_id, lease.generation]
            assert ended == (0 if lease in self.expiry else 1)
        names = {(lease.lease_id, lease.generation) for lease in self.granted}
        assert len(names) == len(self.granted)
        assert all(lease.lease_id < 4 for lease in self.granted)


LeaseMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLeases = LeaseMachine.TestCase


def test_a_history_is_published_whole() -> None:
    lease = Owner().grant()
    assert lease.next_segment(0, 0) == Segment(0, 2, 2, 8)
    assert lease.next_segment(1, 0) is Publication.COMPLETE


def test_segments_are_read_in_the_order_published() -> None:
    lease = Owner().grant(complete=False)
    assert lease.next_segment(0, 0) is Publication.PENDING
    published = [Segment(0, 1, 2, 5), Segment(1, 2, 2, 5), Segment(0, 2, 5, 8)]
    for segment in published:
        assert lease.publish(segment)
    assert [lease.next_segment(index, 0) for index in range(3)] == published
    assert lease.next_segment(3, 0) is Publication.PENDING
    lease.finish()
    assert lease.next_segment(3, 0) is Publication.COMPLETE


def test_a_producer_that_leaves_its_range_is_a_bug() -> None:
    lease = Owner().grant(complete=False)
    for segment in (Segment(0, 1, 0, 4), Segment(0, 3, 2, 4), Segment(0, 1, 4, 8), Segment(0, 1, 2, 9)):
        with pytest.raises(ValueError, match=r"layer|tokens"):
            lease.publish(segment)
    with pytest.raises(ValueError, match="before the whole range"):
        lease.finish()
    lease.publish(Segment(0, 2, 2, 8))
    lease.finish()
    with pytest.raises(ValueError, match="finished"):
        lease.publish(Segment(0, 2, 2, 8))


def test_a_producer_whose_lease_has_ended_may_go_on_in_vain() -> None:
    owner = Owner()
    lease = owner.grant(complete=False)
    assert owner.table.release(lease.lease_id, lease.generation)
    assert not lease.publish(Segment(0, 1, 2, 5))
    lease.finish()
    lease.fail("too late")
    assert owner.last_end is LeaseEnd.RELEASED


def test_an_end_wakes_whoever_waits_for_a_segment() -> None:
    owner = Owner()
    lease = owner.grant(complete=False)
    failures: list[AmpdError] = []

    def wait() -> None:
        try:
            lease.next_segment(0, 60)
        except AmpdError as error:
            failures.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    lease.fail("out of blocks")
    waiter.join(30)
    assert failures[0].code is ErrorCode.KV_LEASE_INVALID
    assert "out of blocks" in failures[0].message


def end_from_four_threads(owner: Owner, lease: Lease) -> None:
    start = threading.Barrier(4)

    def run(end: Callable[[], object]) -> None:
        start.wait()
        end()

    enders: list[Callable[[], object]] = [
        lambda: owner.table.release(lease.lease_id, lease.generation),
        lambda: lease.fail("x"),
        lambda: owner.table.end(lease, LeaseEnd.DELIVERED),
        owner.table.expire,
    ]
    threads = [threading.Thread(target=run, args=(end,)) for end in enders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_many_threads_end_one_lease_once() -> None:
    owner = Owner()
    for _ in range(50):
        lease = owner.grant()
        end_from_four_threads(owner, lease)
        assert owner.ends[lease.lease_id, lease.generation] == 1
        assert len(owner.table) == 0


@pytest.mark.parametrize("arguments", [(8, 8, TTL_S), (-1, 4, TTL_S), (0, 4, 0.0)])
def test_an_empty_lease_is_a_bug(arguments: tuple[int, int, float]) -> None:
    start, stop, ttl_s = arguments
    with pytest.raises(ValueError, match="empty lease"):
        Owner().table.grant(KEY, [0], start, stop, ttl_s=ttl_s, on_end=print, complete=True, num_layers=1)
