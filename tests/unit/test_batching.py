"""The scheduler and the allocator: every token is computed, no block is lost, and the oldest round always gets on."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.core.batching import Scheduler
from shared.core.chunking import ChunkParameters
from shared.core.kv_blocks import BlockAllocator
from shared.core.profile import Curve, DegreeProfile, Grid, Links
from shared.core.reordering import OrderName, OrderParameters, WaitingPrefill
from shared.core.retention import RetentionName
from shared.core.sequences import PlannedItem, Sequence, SequenceState, SessionKv
from shared.core.step_costs import StepCosts
from shared.core.step_prediction import StepPredictor, correct
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
    assert scheduler.memory.num_evictions == 1


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


STEPS = Curve(at=(0, 1000), s=(0.01, 1.01))


def make_costs(linear: Curve = STEPS) -> StepCosts:
    """10 ms a step and 1 ms a token, attention for nothing; 100 tokens a second over the link, 1,000 from the host."""
    nothing = Grid(rows=(0, 1), columns=(0, 1), s=((0.0, 0.0), (0.0, 0.0)))
    degree = DegreeProfile(
        parallel_degree=1,
        num_kv_tokens=1000,
        linear=linear,
        prefill_attention=nothing,
        decode_attention=nothing,
    )
    links = Links(
        devices_per_node=1,
        intra_node_bytes_per_s=100.0,
        inter_node_bytes_per_s=100.0,
        host_bytes_per_s=1000.0,
        latency_s=0.0,
    )
    return StepCosts(degree, links, 1)


def follow(
    scheduler: Scheduler,
    *,
    chunk: ChunkParameters | None = None,
    order: OrderName = "fcfs",
    retention: RetentionName = "lru",
    predictor: StepPredictor | None = None,
    **order_fields: float,
) -> None:
    parameters = OrderParameters(order=order, **order_fields)  # type: ignore[arg-type]
    scheduler.follow(chunk or ChunkParameters(), parameters, retention, predictor or StepPredictor(make_costs()))


def with_deadline(sequence: Sequence, deadline: float) -> Sequence:
    sequence.waiting = WaitingPrefill(sequence.key, sequence.arrival, sequence.arrival, deadline, 0.0)
    return sequence


def test_prefills_go_in_the_order_of_the_policy() -> None:
    """The first cannot be in time whatever is done, the second can if it goes first."""
    for order, first in (("fcfs", "long"), ("window", "short"), ("moore_hodgson", "short")):
        scheduler = make_scheduler(num_blocks=100)
        follow(scheduler, order=order)  # type: ignore[arg-type]
        with_deadline(add_session(scheduler, "long", 40), 0.01)
        with_deadline(add_session(scheduler, "short", 14), 0.05)
        items = scheduler.plan_step(0.0)
        assert items[0].sequence.key.session == first
        assert sum(item.num_tokens for item in items) == 16, "the budget is shared by all that are ready"


@pytest.mark.parametrize(("due_s", "expected"), [(0.061, ["first"]), (0.111, ["first", "second"]), (0.04, None)])
def test_prefills_share_a_step_while_that_makes_none_late(due_s: float, expected: list[str] | None) -> None:
    """Three of 50 tokens: steps of 60, 110 and 160 ms. The first is late in any step when it is due in 40."""
    scheduler = make_scheduler(num_blocks=200, prefill=512)
    follow(scheduler, order="moore_hodgson", chunk=ChunkParameters(chunk="slack", keeps_on_time=True))
    for number, name in enumerate(("first", "second", "third")):
        with_deadline(add_session(scheduler, name, 50, arrival=float(number)), due_s if name == "first" else 9.0)
    planned = [item.sequence.key.session for item in scheduler.plan_step(0.0)]
    assert sorted(planned) == (expected or ["first", "second", "third"])
    follow(scheduler, order="moore_hodgson", chunk=ChunkParameters(chunk="slack"))
    assert len(scheduler.plan_step(0.0)) == 3, "switched off"


def test_no_more_decode_than_their_objective_allows_and_each_gets_its_turn() -> None:
    """Steps of n take 10 + n ms: 9 of 12 keep to 0.9 of 21.2 ms. Who has waited has less slack than who decoded."""
    scheduler = make_scheduler(num_blocks=400, prefill=512)
    follow(scheduler, chunk=ChunkParameters(limits_batch=True))
    for number in range(12):
        add_session(scheduler, f"s{number}", 2).itl_slo_s = 0.0212
    run_step(scheduler)
    counts = Counter[str]()
    for step in range(12):
        items = scheduler.plan_step(0.015 * step)  # three quarters of them in 15 ms: nobody falls behind
        assert len(items) == 9
        for item in items:
            item.sequence.kv.num_kv += 1
            item.sequence.kv.tokens.append(1)
            counts[item.sequence.key.session] += 1
    assert set(counts.values()) == {9}, "each waits a quarter of the steps"
    follow(scheduler, chunk=ChunkParameters())
    assert len(scheduler.plan_step(1.0)) == 12, "switched off"


def test_all_decode_while_a_step_of_all_is_just_fast_enough() -> None:
    """A step of ten takes 20 ms."""
    scheduler = make_scheduler(num_blocks=400, prefill=512)
    follow(scheduler, chunk=ChunkParameters(limits_batch=True))
    sequences = [add_session(scheduler, f"s{number}", 2) for number in range(10)]
    for itl_slo_s, num_decoding in ((0.0212, 10), (0.0209, 8)):
        for sequence in sequences:
            sequence.itl_slo_s = itl_slo_s
        run_step(scheduler)
        assert len(scheduler.plan_step(0.0)) == num_decoding


def test_a_slack_chunk_that_would_waste_its_step_is_saved_up_for() -> None:
    """64 tokens take 5 ms of a step, 256 take 10, and the batch leaves 2.5 of its 25: 256 in every second step."""
    scheduler = make_scheduler(num_blocks=1_000, prefill=512)
    steps = Curve(at=(0, 2, 3, 66, 258, 1_000), s=(0.0, 0.02, 0.024, 0.025, 0.03, 0.1))
    costs = make_costs(linear=steps)
    follow(scheduler, chunk=ChunkParameters(chunk="slack"), predictor=StepPredictor(costs))
    decoding = [add_session(scheduler, f"d{number}", 3) for number in range(2)]
    for sequence in decoding:
        sequence.itl_slo_s = 0.025
    run_step(scheduler)
    add_session(scheduler, "long", 1_500, arrival=1.0)
    sizes = []
    for _ in range(10):
        items = scheduler.plan_step(0.0)
        assert [item.num_tokens for item in items[:2]] == [1, 1]
        sizes.append(sum(item.num_tokens for item in items[2:]))
        for item in items:
            item.sequence.kv.num_kv += item.num_tokens
            if item.num_tokens == 1:
                item.sequence.kv.tokens.append(1)
    assert sizes == [256, 0] * 5


def test_who_has_aged_gets_a_turn_among_those_in_time() -> None:
    """Newcomers that are always in time would keep a late prefill waiting for ever: it gets every third step."""
    scheduler = make_scheduler(num_blocks=200)
    follow(scheduler, order="moore_hodgson", ageing=1.0, aged_every=3)
    aged = with_deadline(add_session(scheduler, "aged", 40), 0.001)
    num_steps = 0
    while aged.state is not SequenceState.ENDED:
        num_steps += 1
        assert num_steps <= 3 * 3, "three chunks, each at the latest in the third step"
        now = 1.0 + num_steps
        with_deadline(add_session(scheduler, f"s{num_steps}", 16, arrival=now), now + 0.05)
        for item in scheduler.plan_step(now):
            item.sequence.kv.num_kv += item.num_tokens
            if item.samples:
                scheduler.remove(item.sequence, now)


def test_no_prefill_begins_that_could_not_be_held_to_its_end() -> None:
    """Two prefills that fit one after the other, not together: the second waits, and no work is thrown away."""
    scheduler = make_scheduler(num_blocks=17, prefill=16)
    first, second = add_session(scheduler, "first", 40, 0.0), add_session(scheduler, "second", 40, 1.0)
    while first.kv.num_missing > 1:
        run_step(scheduler)
        assert second.kv.num_kv == 0
    scheduler.remove(first, 0.0)
    while second.kv.num_missing > 1:
        assert run_step(scheduler)
    assert scheduler.preemption.num_preemptions == 0


@pytest.mark.parametrize(("order", "num_items"), [("fcfs", 1), ("window", 1), ("moore_hodgson", 2)])
def test_a_smaller_prefill_passes_only_by_deadline(order: OrderName, num_items: int) -> None:
    scheduler = make_scheduler(num_blocks=17, prefill=100)
    follow(scheduler, order=order)
    with_deadline(add_session(scheduler, "running", 40, 0.0), 30.0)
    with_deadline(add_session(scheduler, "large", 40, 1.0), 40.0)
    with_deadline(add_session(scheduler, "small", 8, 2.0), 50.0)
    assert len(scheduler.plan_step(2.0)) == num_items


@pytest.mark.parametrize("aged_room", [2, 5])
def test_a_large_prefill_that_has_aged_gets_room_however_many_small_ones_come(aged_room: int) -> None:
    """A stream of small ones, always in time, takes the blocks as they come free; one in aged_room is put aside."""
    assert _count_tokens_before_large(aged_room) <= aged_room * 40 + 64
    assert _count_tokens_before_large(1_000) == math.inf, "without it the large one starves"


def _count_tokens_before_large(aged_room: int) -> float:
    """KV room that small prefills took before a large one began; inf if they took 4,000 tokens."""
    scheduler = make_scheduler(num_blocks=17, prefill=100)  # 64 tokens
    follow(scheduler, order="moore_hodgson", ageing=1.0, aged_every=4, aged_room=aged_room)
    small: list[Sequence] = []
    large: Sequence | None = None
    for number in range(1, 501):
        now = float(number)
        if number == 9:  # the memory is full
            large = with_deadline(add_session(scheduler, "large", 40, now), now + 0.001)
        small.append(with_deadline(add_session(scheduler, f"small{number}", 8, now), now + 50.0))
        scheduler.plan_step(now)
        if large is not None and large.admitted:
            return 8 * sum(one.admitted for one in small[8:])
        running = [one for one in small if one.admitted and one.state is not SequenceState.ENDED]
        for one in running:
            one.kv.num_kv = one.kv.num_tokens - 1
        if len(running) > 6 or (running and number > 9):  # the oldest ends, and its session with it
            scheduler.remove(running[0], now)
            scheduler.drop(running[0].kv.key)
    return math.inf


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=2, max_size=6))
def test_a_prefill_is_passed_over_a_bounded_number_of_times(lengths: list[int]) -> None:
    """Newcomers that are always in time never keep an older prefill from starting for ever (window order)."""
    scheduler = make_scheduler(num_blocks=400)
    follow(scheduler, order="window", max_postponements=3)
    old = [with_deadline(add_session(scheduler, f"old{i}", length), 0.0) for i, length in enumerate(lengths)]
    num_new = 0
    while any(sequence.first_step_at is None for sequence in old):
        num_new += 1
        assert num_new <= 60, "starved"
        with_deadline(add_session(scheduler, f"new{num_new}", 16, arrival=float(num_new)), num_new + 100.0)
        for item in scheduler.plan_step(float(num_new)):
            item.sequence.kv.num_kv += item.num_tokens
            if item.samples:
                scheduler.remove(item.sequence, 0.0)


def test_slack_chunks_fill_the_tightest_objective_of_the_batch() -> None:
    scheduler = make_scheduler(num_blocks=1000, chunk=8, prefill=512)
    chunk = ChunkParameters(chunk="slack", min_chunk_tokens=16, itl_share=0.5)
    follow(scheduler, chunk=chunk)
    loose, tight = add_session(scheduler, "loose", 3), add_session(scheduler, "tight", 3)
    loose.itl_slo_s, tight.itl_slo_s = math.inf, 0.2
    run_step(scheduler)
    add_session(scheduler, "new", 2000, arrival=1.0)
    assert [item.num_tokens for item in scheduler.plan_step()] == [1, 1, 80], "0.1 s: 10 ms, 2 decodes, 80 of 88 tokens"
    tight.itl_slo_s = 0.001
    assert [item.num_tokens for item in scheduler.plan_step()] == [1, 1, 16], "a prefill always goes on"
    scheduler.remove(tight, 0.0)
    assert [item.num_tokens for item in scheduler.plan_step()] == [1, 512]
    follow(scheduler, chunk=chunk, predictor=StepPredictor())
    assert [item.num_tokens for item in scheduler.plan_step()] == [1, 8], "without costs: the fixed size"


def test_steps_are_shorter_while_the_prefills_have_time() -> None:
    """0.1 s leaves room for 10 ms, 2 decodes and 80 tokens at the full pace, 48 of 58 at the calm one."""
    scheduler = make_scheduler(num_blocks=1000, prefill=512)
    follow(scheduler, chunk=ChunkParameters(chunk="slack", min_chunk_tokens=16, itl_share=0.5, calm_itl_share=0.35))
    for name in ("first", "second"):
        add_session(scheduler, name, 3).itl_slo_s = 0.2
    run_step(scheduler)
    new = with_deadline(add_session(scheduler, "new", 400, arrival=1.0), 30.0)
    sizes = {now: [item.num_tokens for item in scheduler.plan_step(now)] for now in (0.0, 29.0, 40.0)}
    assert sizes == {0.0: [1, 1, 48], 29.0: [1, 1, 80], 40.0: [1, 1, 80]}
    scheduler.list_unstaged = lambda: [replace(new.waiting, work_s=29.0)]
    assert [item.num_tokens for item in scheduler.plan_step(0.0)] == [1, 1, 80], "more waits than there is time for"
    scheduler.list_unstaged = tuple
    with_deadline(new, math.inf)
    assert [item.num_tokens for item in scheduler.plan_step(0.0)] == [1, 1, 80], "nobody has said that it may wait"


@pytest.mark.parametrize("corrects", [True, False])
def test_measured_steps_correct_the_costs_within_bounds(corrects: bool) -> None:
    costs = make_costs()
    predictor = StepPredictor(costs, corrects=corrects)
    for _ in range(100):
        predictor.observe(0, 0.0, [(0, 90)], 0.2)  # predicted: 0.1
    assert predictor.correction == pytest.approx(2.0, rel=0.01)
    assert predictor.prefill_s(0, 90) == pytest.approx(0.2 if corrects else 0.1, rel=0.01)
    assert (predictor.prefill_scale, predictor.decode_scale) == (pytest.approx(2.0, rel=0.01), 1.0)
    for _ in range(100):
        predictor.observe(1, 10.0, [], 1e9)
    assert predictor.correction == pytest.approx(5.0, rel=0.01)
    assert predictor.decode_scale == pytest.approx(5.0, rel=0.01)
    assert costs.scale == 1.0, "the caller's costs are left alone"
    times = predictor.times
    assert times.prefill_s == pytest.approx(20.0)
    assert times.prefill_profile_s == pytest.approx(10.0), "by the profile, however far it is corrected"
    assert times.decode_s / times.decode_profile_s == pytest.approx(1e9 / costs.decode_step_s(1, 10.0))


def test_a_prefill_that_shared_its_steps_corrects_nothing() -> None:
    """It took longer than it would have alone; its steps took what they should."""
    predictor = StepPredictor(make_costs(), corrects=True)
    chunks = [(0, 90), (1_000, 50), (3_000, 20)]
    for _ in range(100):
        predictor.observe(4, 100.0, chunks, predictor.costs.step_s(4, 100.0, chunks))
    assert predictor.prefill_scale == pytest.approx(1.0)


def test_scales_are_of_the_profile_even_if_the_worker_was_told_one() -> None:
    costs = make_costs()
    costs.scale = 4.0  # an emulated worker of that time scale
    predictor = StepPredictor(costs, corrects=True)
    for _ in range(100):
        predictor.observe(0, 0.0, [(0, 90)], 2 * 0.4)
    assert predictor.prefill_scale == pytest.approx(8.0, rel=0.01)
    assert StepPredictor().prefill_scale == 0.0, "without a profile there is nothing to compare with"


def test_nothing_is_learnt_of_steps_that_took_no_time() -> None:
    assert correct(1.5, 0.0, 1.0) == correct(1.5, 1.0, 0.0) == 1.5
    assert correct(1.0, 1.0, 2.0, 3) == pytest.approx(correct(correct(correct(1.0, 1.0, 2.0), 1.0, 2.0), 1.0, 2.0))


def test_an_eviction_takes_a_piece_of_the_tail() -> None:
    scheduler = make_scheduler(num_blocks=41, prefill=200)
    sequence = add_session(scheduler, "idle", 120)
    run_step(scheduler)
    scheduler.remove(sequence, 0.0)
    kept = sequence.kv.block_table[:]
    add_session(scheduler, "new", 48, arrival=1.0)  # two blocks more than are free
    run_step(scheduler)
    assert sequence.kv.num_kv == (len(kept) - 8) * 4
    assert sequence.kv.block_table == kept[:-8], "what is left is the prefix"
    assert sequence.kv.num_tokens == 121, "the tokens are still known"


def test_nothing_is_evicted_in_vain() -> None:
    scheduler = make_scheduler(num_blocks=9)
    idle = add_session(scheduler, "idle", 12)
    run_step(scheduler)
    scheduler.remove(idle, 0.0)
    asking = SessionKv(SessionKey("t", "asking"))
    assert not scheduler.reserve(asking, 4 * 9)
    assert not scheduler.reserve(asking, 4 * 6, evict=False)
    assert len(idle.kv.block_table) == 3
    assert scheduler.memory.num_evictions == 0


@pytest.mark.parametrize(("retention", "victim"), [("lru", "old"), ("ttl", "overdue"), ("expected_return", "resident")])
def test_retention_chooses_whose_kv_goes(retention: RetentionName, victim: str) -> None:
    scheduler = make_scheduler(num_blocks=100, prefill=200)
    follow(scheduler, retention=retention)
    for name, last_used, gap_s in (("old", 10.0, 60.0), ("overdue", 30.0, 1.0), ("resident", 40.0, 60.0)):
        sequence = add_session(scheduler, name, 40)
        run_step(scheduler)
        scheduler.remove(sequence, last_used)
        sequence.kv.gaps.add(gap_s)
        sequence.kv.resident = name == "resident"
    follow(scheduler, retention=retention, predictor=StepPredictor(_with_fast_link()))
    chosen = scheduler.memory.choose_victim(scheduler.sessions.values(), 45.0)
    assert chosen is not None
    assert chosen.key.session == victim


def _with_fast_link() -> StepCosts:
    costs = make_costs()
    costs.link_bytes_per_s = 1e6
    return costs


def test_idle_times_between_rounds_are_learnt() -> None:
    scheduler = make_scheduler()
    for round_index in range(5):
        kv = scheduler.sessions.setdefault(SessionKey("t", "a"), SessionKv(SessionKey("t", "a")))
        kv.tokens.extend([1, 2])
        sequence = Sequence(RoundKey("t", "a", round_index, 1), kv, SamplingParams(), 2, arrival=20.0 * round_index)
        scheduler.add(sequence)
        scheduler.remove(sequence, 20.0 * round_index + 5.0)
    assert kv.gaps.mean_s == pytest.approx((4 * 15.0 + 5.0) / 5), "four gaps, and the prior"


def test_a_lease_is_revoked_before_what_it_covers_is_freed() -> None:
    scheduler = make_scheduler()
    sequence = add_session(scheduler, "a", 12)
    run_step(scheduler)
    scheduler.remove(sequence, 0.0)
    kv, revoked = sequence.kv, []
    kv.num_leased, kv.revoke_lease = 10, lambda: revoked.append(len(kv.block_table))
    scheduler.truncate(kv, 10)
    assert revoked == []
    scheduler.truncate(kv, 9)
    scheduler.truncate(kv, 0)
    assert revoked == [3], "once, while the blocks were still there"


@settings(max_examples=200, deadline=None)
@given(
    rounds=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=8),
    num_blocks=st.integers(13, 40),
    chunk=st.integers(1, 16),
    staggered=st.booleans(),
    order=st.sampled_from(["fcfs", "program_fcfs", "window", "moore_hodgson"]),
    slack=st.booleans(),
)
def test_every_round_ends_and_every_block_comes_back(
    rounds: list[tuple[int, int]], num_blocks: int, chunk: int, staggered: bool, order: OrderName, slack: bool
) -> None:
    scheduler = make_scheduler(num_blocks=num_blocks, chunk=chunk, prefill=2 * chunk)
    follow(scheduler, order=order, chunk=ChunkParameters(chunk="slack" if slack else "fixed", min_chunk_tokens=1))
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


# ------------------------------------------------------------------------- pressure on the memory


class FakeTier:
    """A lower tier that remembers how much of each session was saved; `restore` puts it back."""

    def __init__(self) -> None:
        self.saved: dict[SessionKv, int] = {}

    def save(self, kv: SessionKv, num_kept: int, now: float) -> None:
        assert kv.num_kv > num_kept
        assert len(kv.block_table) * 4 >= kv.num_kv, "the blocks are still there"
        self.saved[kv] = kv.num_kv

    def drop(self, kv: SessionKv) -> None:
        self.saved.pop(kv, None)

    def holds(self, kv: SessionKv) -> bool:
        return kv in self.saved

    def count_restorable(self, kv: SessionKv) -> int:
        return max(0, self.saved.get(kv, 0) - kv.num_kv)

    def check_integrity(self, sessions: object) -> None:
        pass

    def restore_all(self, scheduler: Scheduler) -> list[Sequence]:
        restored = scheduler.take_restores()
        for sequence in restored:
            assert sequence.state is SequenceState.RESTORING
            target = min(self.saved.pop(sequence.kv), sequence.kv.num_tokens - 1)
            assert len(sequence.kv.block_table) * 4 >= target, "the blocks are there before the KV"
            sequence.kv.num_kv = target
            sequence.state = SequenceState.READY
        return restored


def test_a_preempted_round_comes_back_from_the_lower_tier_and_is_due_at_once() -> None:
    scheduler, tier = make_scheduler(num_blocks=9, prefill=40), FakeTier()
    follow(scheduler, order="moore_hodgson")
    scheduler.memory.lower_tier = tier
    old, young = add_session(scheduler, "old", 15, 0.0), add_session(scheduler, "young", 15, 1.0)
    while young.num_preemptions == 0:
        run_step(scheduler)
    saved = tier.saved[young.kv]
    assert (young.kv.num_kv, young.kv.block_table) == (0, [])
    assert saved == young.kv.num_tokens - 1, "nothing of it was computed in vain"
    assert 0.2 < young.as_waiting().ttft_deadline < 1.0, "its client waits for the next token"
    assert not young.admitted
    scheduler.remove(old, 0.0)
    assert run_step(scheduler) == [], "its KV is on its way"
    assert tier.restore_all(scheduler) == [young]
    assert [(item.sequence, item.num_tokens) for item in run_step(scheduler)] == [(young, 1)]


def test_without_a_lower_tier_no_prefill_is_thrown_away_for_a_more_urgent_one() -> None:
    scheduler = make_scheduler(num_blocks=17, prefill=16)
    follow(scheduler, order="moore_hodgson")
    first = with_deadline(add_session(scheduler, "first", 40, 0.0), 50.0)
    run_step(scheduler)
    urgent = with_deadline(add_session(scheduler, "urgent", 40, 1.0), 10.0)
    run_step(scheduler)
    assert (first.num_preemptions, urgent.kv.num_kv) == (0, 0)


def test_one_further_behind_in_the_order_yields_its_room_and_keeps_its_kv_below() -> None:
    """`first` has begun and is the oldest, but due last: `urgent` takes its place, and its work is not lost."""
    scheduler, tier = make_scheduler(num_blocks=17, prefill=16), FakeTier()
    follow(scheduler, order="moore_hodgson")
    scheduler.memory.lower_tier = tier
    first = with_deadline(add_session(scheduler, "first", 40, 0.0), 50.0)
    run_step(scheduler)
    urgent = with_deadline(add_session(scheduler, "urgent", 40, 1.0), 10.0)
    assert [item.sequence for item in run_step(scheduler)] == [urgent]
    assert (first.num_preemptions, tier.saved[first.kv], first.admitted) == (1, 16, False)
    while urgent.kv.num_missing > 1:
        assert run_step(scheduler), "one of them always goes on"
    scheduler.remove(urgent, 0.0)
    while not scheduler._restores:
        run_step(scheduler)
    assert tier.restore_all(scheduler) == [first]
    assert [item.num_tokens for item in run_step(scheduler)] == [16], "only what was not computed before"


def test_who_has_aged_keeps_its_room() -> None:
    scheduler, tier = make_scheduler(num_blocks=17, prefill=16), FakeTier()
    follow(scheduler, order="moore_hodgson", ageing=1.0)
    scheduler.memory.lower_tier = tier
    aged = with_deadline(add_session(scheduler, "aged", 40, 0.0), 0.001)
    run_step(scheduler)
    with_deadline(add_session(scheduler, "urgent", 40, 1.0), 10.0)
    items = scheduler.plan_step(1.0)
    assert [item.sequence for item in items] == [aged]
    assert aged.num_preemptions == 0


def test_nobody_yields_in_vain() -> None:
    scheduler, tier = make_scheduler(num_blocks=17, prefill=16), FakeTier()
    follow(scheduler, order="moore_hodgson")
    scheduler.memory.lower_tier = tier
    blocker = add_session(scheduler, "blocker", 28, -1.0)
    run_step(scheduler)
    blocker.state = SequenceState.WAITING_KV  # its blocks are a transfer's
    small = with_deadline(add_session(scheduler, "small", 24, 0.0), 50.0)
    run_step(scheduler)
    with_deadline(add_session(scheduler, "large", 60, 1.0), 10.0)
    run_step(scheduler)
    assert small.num_preemptions == 0, "its room would not have been enough"


def test_when_nothing_else_goes_on_the_oldest_prefill_gets_its_room() -> None:
    """Two that were admitted and have lost room to decodes: neither fits, and both would wait for ever."""
    scheduler = make_scheduler(num_blocks=17, prefill=16)
    follow(scheduler, order="moore_hodgson")
    old = with_deadline(add_session(scheduler, "old", 60, 0.0), -1.0)
    young = with_deadline(add_session(scheduler, "young", 60, 1.0), 50.0)
    scheduler.reserve(young.kv, 16)
    young.kv.num_kv, old.admitted, young.admitted = 16, False, False
    for _ in range(20):
        run_step(scheduler)
        if old.kv.num_missing == 1 or young.kv.num_missing == 1:
            return
    raise AssertionError("neither has got on")


@settings(max_examples=100, deadline=None)
@given(
    rounds=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=2, max_size=8),
    num_blocks=st.integers(13, 30),
    chunk=st.integers(1, 16),
    order=st.sampled_from(["fcfs", "moore_hodgson"]),
    deadlines=st.lists(st.floats(0.0, 100.0), min_size=8, max_size=8),
)
def test_with_a_lower_tier_every_round_ends_and_no_token_is_computed_twice(
    rounds: list[tuple[int, int]], num_blocks: int, chunk: int, order: OrderName, deadlines: list[float]
) -> None:
    scheduler, tier = make_scheduler(num_blocks=num_blocks, chunk=chunk, prefill=2 * chunk), FakeTier()
    follow(scheduler, order=order)
    scheduler.memory.lower_tier = tier
    running = []
    for index, (prompt, outputs) in enumerate(rounds):
        sequence = with_deadline(add_session(scheduler, str(index), prompt, float(index)), deadlines[index])
        running.append((sequence, outputs))
    num_computed = 0
    for _ in range(3000):
        num_computed += sum(item.num_tokens for item in run_step(scheduler))
        tier.restore_all(scheduler)
        scheduler.check_integrity()
        for sequence, outputs in list(running):
            if sequence.kv.num_tokens - sequence.output_start >= outputs:
                scheduler.remove(sequence, 0.0)
                running.remove((sequence, outputs))
        if not running:
            break
    assert not running
    assert num_computed == sum(prompt + outputs - 1 for prompt, outputs in rounds)
