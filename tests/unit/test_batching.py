"""The scheduler and the allocator: every token is computed, no block is lost, and the oldest round always gets on."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.core.batching import PlannedItem, Scheduler, Sequence, SequenceState, SessionKv
from shared.core.kv_blocks import BlockAllocator
from shared.core.types import RoundKey, SessionKey
from shared.errors import AmpdError, ErrorCode
from shared.messages import SamplingParams


def make_scheduler(num_blocks: int = 17, block_size: int = 4, chunk: int = 8, prefill: int = 16) -> Scheduler:
    return Scheduler(BlockAllocator(num_blocks, block_size), chunk_tokens=chunk, max_prefill_tokens=prefill)


def add_session(scheduler: Scheduler, name: str, num_tokens: int, arrival: float = 0.0) -> Sequence:
    key = SessionKey("t", name)
    kv = scheduler.sessions.setdefault(key, SessionKv(key))
    kv.tokens.extend(range(num_tokens))
    sequence = Sequence(RoundKey("t", name, 0, 1), kv, SamplingParams(), output_start=kv.num_tokens, arrival=arrival)
    scheduler.add(sequence)
    return sequence


def run_step(scheduler: Scheduler) -> list[PlannedItem]:
    """Plan and carry out a step: what is computed is checked to be covered by blocks."""
    items = scheduler.plan_step()
    for item in items:
        kv = item.sequence.kv
        assert len(kv.block_table) * scheduler.allocator.block_size >= kv.num_kv + item.num_tokens
        samples = item.samples
        kv.num_kv += item.num_tokens
        if samples:
            kv.tokens.append(7)
    scheduler.check_integrity()
    return items


def test_allocator_never_hands_out_a_block_twice_and_says_when_it_is_empty() -> None:
    allocator = BlockAllocator(5, 4)
    first = allocator.allocate(3, "a")
    assert 0 not in first
    with pytest.raises(AmpdError) as caught:
        allocator.allocate(2, "b")
    assert caught.value.code is ErrorCode.OUT_OF_BLOCKS
    assert allocator.num_free == 1, "a refused allocation takes nothing"
    with pytest.raises(AssertionError):
        allocator.free(first[:1], "b")


def test_decodes_go_first_and_prefill_gets_the_chunk_budget() -> None:
    scheduler = make_scheduler()
    old = add_session(scheduler, "old", 3)
    run_step(scheduler)
    new = add_session(scheduler, "new", 20, arrival=1.0)
    items = scheduler.plan_step()
    assert [(i.sequence, i.num_tokens, i.samples) for i in items] == [(old, 1, True), (new, 8, False)]


def test_a_prefill_alone_gets_the_larger_budget() -> None:
    scheduler = make_scheduler()
    sequence = add_session(scheduler, "a", 20)
    assert [i.num_tokens for i in run_step(scheduler)] == [16]
    assert [(i.num_tokens, i.samples) for i in run_step(scheduler)] == [(4, True)]
    assert sequence.kv.num_missing == 1


def test_idle_sessions_lose_their_kv_least_recently_used_first() -> None:
    scheduler = make_scheduler(num_blocks=9)
    for number, name in enumerate(("a", "b")):
        sequence = add_session(scheduler, name, 12)
        run_step(scheduler)
        scheduler.remove(sequence, now=float(number))
    add_session(scheduler, "c", 16)
    run_step(scheduler)
    held = {key.session: len(kv.block_table) for key, kv in scheduler.sessions.items()}
    assert held == {"a": 0, "b": 3, "c": 4}
    assert scheduler.num_evictions == 1


def test_pinned_and_waiting_sessions_are_never_evicted_or_preempted() -> None:
    scheduler = make_scheduler(num_blocks=9)
    waiting = add_session(scheduler, "waiting", 12)
    run_step(scheduler)
    waiting.state = SequenceState.WAITING_KV
    idle = add_session(scheduler, "idle", 12)
    run_step(scheduler)
    scheduler.remove(idle, now=0.0)
    idle.kv.pinned = True
    blocked = add_session(scheduler, "blocked", 16, arrival=-1.0)
    assert run_step(scheduler) == []
    assert len(waiting.kv.block_table) == len(idle.kv.block_table) == 3
    idle.kv.pinned = False
    assert [i.sequence for i in run_step(scheduler)] == [blocked]


def test_the_youngest_is_preempted_and_later_computed_again() -> None:
    scheduler = make_scheduler(num_blocks=9)
    old, young = add_session(scheduler, "old", 15, 0.0), add_session(scheduler, "young", 15, 1.0)
    while young.num_preemptions == 0:
        run_step(scheduler)
    assert young.kv.num_kv == 0
    assert old.num_preemptions == 0
    scheduler.remove(old, 0.0)
    produced = young.kv.num_tokens
    while young.kv.num_tokens == produced:
        run_step(scheduler)
    assert young.kv.num_kv == produced


@settings(max_examples=200, deadline=None)
@given(
    rounds=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=8),
    num_blocks=st.integers(13, 40),
    chunk=st.integers(1, 16),
    staggered=st.booleans(),
)
def test_every_round_ends_and_every_block_comes_back(
    rounds: list[tuple[int, int]], num_blocks: int, chunk: int, staggered: bool
) -> None:
    scheduler = make_scheduler(num_blocks=num_blocks, chunk=chunk, prefill=2 * chunk)
    pending = [(add_session, str(i), prompt, float(i), outputs) for i, (prompt, outputs) in enumerate(rounds)]
    running: list[tuple[Sequence, int]] = []
    for _ in range(3000):
        if pending and (not staggered or len(running) < 2):
            _, name, prompt, arrival, outputs = pending.pop(0)
            running.append((add_session(scheduler, name, prompt, arrival), outputs))
        run_step(scheduler)
        for sequence, outputs in list(running):
            if sequence.kv.num_tokens - sequence.output_start >= outputs:
                scheduler.remove(sequence, 0.0)
                running.remove((sequence, outputs))
        if not running and not pending:
            break
    assert not running
    assert not pending
    for name in list(scheduler.sessions):
        scheduler.drop(name)
    scheduler.check_integrity()
    assert scheduler.allocator.num_free == num_blocks - 1


def test_truncate_keeps_the_block_of_the_last_kept_token() -> None:
    scheduler = make_scheduler()
    sequence = add_session(scheduler, "a", 10)
    run_step(scheduler)
    scheduler.remove(sequence, 0.0)
    kept = sequence.kv.block_table[:2]
    scheduler.truncate(sequence.kv, 5)
    assert (sequence.kv.num_kv, sequence.kv.block_table) == (5, kept)
    assert sequence.kv.tokens[:10] == array("i", range(10))
