"""Promises that hold across parts: what live workers and the simulator do alike, and queues that share one pool."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from test_batching import add_session, follow, make_scheduler, run_step, with_deadline

from loadgen.plan import PlannedRound, PlannedSession
from planner.simulator.cluster import Cluster, WorkerGroup
from planner.simulator.remote_prefills import RemotePrefills
from planner.simulator.segments import Segments
from planner.simulator.simulation import Simulation
from services.worker.context import WorkerLimits
from services.worker.prefill import PrefillRole
from services.worker.prefill_job import PrefillJob
from shared.core.batching import Scheduler
from shared.core.chunking import ChunkParameters
from shared.core.kv_blocks import BlockAllocator
from shared.core.load import WorkerLoad
from shared.core.policies import find_policy, with_options
from shared.core.reordering import OrderParameters, PrefillOrder, WaitingPrefill, has_aged
from shared.core.resident_key import resident_key
from shared.core.sequences import Sequence, SequenceState, SessionKv
from shared.core.step_costs import StepCosts
from shared.core.step_prediction import StepPredictor
from shared.core.types import RoundKey, SessionKey
from shared.messages import Slo
from shared.profile_files import load_profile

PROFILE = load_profile("h100-qwen3-32b")
COSTS = StepCosts.from_profile(PROFILE, 2)


def simulate(options: dict[str, Any], *planned: tuple[float, int], **counts: int) -> Any:
    """Sessions of one round of one output token: (arrival, input tokens)."""
    policy = with_options(find_policy("adaptive"), {"admission": False, **options})
    sessions = [
        PlannedSession(index, str(index), arrival, (PlannedRound(num_tokens, 1, 0.0),))
        for index, (arrival, num_tokens) in enumerate(planned)
    ]
    groups = tuple(WorkerGroup(role=role, count=n, parallel_degree=2) for role, n in counts.items())  # type: ignore[arg-type]
    return Simulation(Cluster(profile=PROFILE, groups=groups), policy, sessions, Slo(ttft_s=6.0, itl_s=0.05))


def test_simulator_a_turn_is_one_step_as_on_the_live_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of four turns goes to the aged one, while others are in time: it should have a quarter of the steps."""
    steps: list[tuple[int, int, float]] = []  # (session, steps, end)
    end = Segments._end

    def watch(self: Segments, number: int, now: float) -> None:
        segment = self.running
        if number == self._num_ends and segment is not None and segment.chunks:
            steps.append((segment.chunks[0][0].round.session.index, segment.num_steps, now))
        end(self, number, now)

    monkeypatch.setattr(Segments, "_end", watch)
    options = {"order.ageing": 0.0, "order.aged_every": 4, "routing.chunk.max_prefill_tokens": 2048}
    simulate(options, (0.0, 100_000), *((0.001 * n, 1_500) for n in range(1, 60)), both=1).run()
    early = [one for one in steps if one[2] < 6.0]  # until then others are in time
    share = sum(n for index, n, _ in early if index == 0) / sum(n for _, n, _ in early)
    assert share < 0.35


def test_simulator_stages_no_more_long_prefills_than_the_live_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    staged: list[int] = []
    read = RemotePrefills._read_history

    def watch(self: RemotePrefills, *args: Any) -> None:
        read(self, *args)
        staged.append(len(self._staged))

    monkeypatch.setattr(RemotePrefills, "_read_history", watch)
    simulate({}, *((0.0, 20_000) for _ in range(8)), prefill=1, decode=1).run()
    role: Any = SimpleNamespace(
        _staged=[SimpleNamespace(num_missing_tokens=20_000)] * 2,
        _context=SimpleNamespace(limits=WorkerLimits()),
        _engine=SimpleNamespace(scheduler=SimpleNamespace(chunk=ChunkParameters())),
    )
    assert not PrefillRole._has_room(role), "two fill the next step"
    assert max(staged) == 2


def test_the_queue_believes_of_short_prefills_what_they_take_together() -> None:
    """40 prefills of 100 tokens, due in 0.5 s, beside 32 decodes: they take 0.31 s. The queue counts for each the fixed
    part of a step of its own, and gives half of them up; the simulator does not."""
    scheduler = Scheduler(BlockAllocator(20_000, 16), chunk_tokens=512, max_prefill_tokens=8192, max_batch=256)
    order = OrderParameters(order="moore_hodgson")
    scheduler.follow(ChunkParameters(chunk="slack"), order, "expected_return", StepPredictor(COSTS))
    for number in range(32):
        one = add_session(scheduler, f"d{number}", 4_001)
        assert scheduler.reserve(one.kv, 4_000)
        one.kv.num_kv, one.itl_slo_s = 4_000, 0.05
    prefills: list[Sequence] = []
    for number in range(40):
        one = with_deadline(add_session(scheduler, f"p{number}", 3_100), 0.5)
        assert scheduler.reserve(one.kv, 3_000)
        one.kv.num_kv = 3_000
        prefills.append(one)
    scheduler._order_prefills(prefills, 0.0)
    believed = scheduler.measure_stretch() * sum(one.as_waiting().work_s for one in prefills)
    simulated = scheduler.measure_stretch() * 40 * WorkerLoad("w", 1, "both", COSTS, num_kv_tokens=1).work_s(3_000, 100)
    assert simulated < 0.31
    assert believed < 0.5


def test_a_round_that_is_preempted_in_its_stream_ages_by_its_objective() -> None:
    """Its stream of 60 s stops. Ageing is 8 times its TTFT objective of 0.5 s, not 8 times the life of the round."""
    scheduler = make_scheduler(num_blocks=400)
    follow(scheduler, order="moore_hodgson", ageing=8.0)
    one = with_deadline(add_session(scheduler, "a", 16), 0.5)
    while not one.has_produced:
        run_step(scheduler)
    scheduler.preemption.preempt(one, 60.0)
    assert has_aged(one.as_waiting(), 60.0 + 8 * 0.5 + 1.0, 8.0)


def test_an_aged_remote_prefill_gets_its_room_from_local_ones() -> None:
    """Role both: as test_a_large_prefill_that_has_aged_gets_room, but the large one is a task of the prefill role."""
    scheduler = make_scheduler(num_blocks=17, prefill=100)  # 64 tokens
    follow(scheduler, order="moore_hodgson", ageing=1.0, aged_every=4, aged_room=5)
    order = PrefillOrder(scheduler.order.parameters, scheduler.room)
    large = WaitingPrefill(RoundKey("t", "remote", 0, 1), 9.0, 9.0, 9.001, 0.1)
    kv = SessionKv(SessionKey("t", "remote"), resident=True)
    small: list[Sequence] = []
    num_taken = 0
    for number in range(1, 1_000):
        now = float(number)
        small.append(with_deadline(add_session(scheduler, f"small{number}", 8, now), now + 50.0))
        scheduler.plan_step(now)
        if number >= 9:  # PrefillRole._take_next
            order.order([large], now)
            if scheduler.reserve(kv, 40, num_aside=order.count_aside(large)):
                break
            order.may_be_passed(large, 40)
        running = [one for one in small if one.admitted and one.state is not SequenceState.ENDED]
        for one in running:
            one.kv.num_kv = one.kv.num_tokens - 1
        if len(running) > 6 or (running and number > 9):
            num_taken += 8
            scheduler.remove(running[0], now)
            scheduler.drop(running[0].kv.key)
            small.remove(running[0])
    assert num_taken <= 5 * 40 + 64


def test_a_remote_prefill_leaves_the_room_that_a_local_one_was_promised() -> None:
    """docs/scheduling.md: a prefill begins only if there is KV room to its end beside those that have begun."""
    scheduler = make_scheduler(num_blocks=17, prefill=16)  # 64 tokens
    follow(scheduler, order="moore_hodgson")
    local = with_deadline(add_session(scheduler, "local", 60), 100.0)
    run_step(scheduler)
    assert local.admitted
    remote, num_promised = SessionKv(SessionKey("t", "remote"), resident=True), scheduler.count_promised_tokens()
    assert num_promised == 60 - 16
    assert not scheduler.reserve(remote, 40, num_aside=num_promised)
    assert scheduler.reserve(remote, 4, num_aside=num_promised)


def test_an_aged_prefill_begins_when_the_batch_is_full_but_for_one_place() -> None:
    """Rounds of 5 tokens in a batch of one: the turn of the aged one always falls into a step without a place."""
    scheduler = Scheduler(BlockAllocator(2_000, 4), chunk_tokens=16, max_prefill_tokens=16, max_batch=1)
    follow(scheduler, order="moore_hodgson", ageing=1.0, aged_every=20)
    with_deadline(add_session(scheduler, "first", 16, 9.0), 1e6)
    aged: Sequence | None = None
    num_left: dict[Sequence, int] = {}
    for number in range(2_000):
        now = 10.0 + number
        with_deadline(add_session(scheduler, f"n{number}", 16, now), now + 1e6)
        if number == 0:
            aged = with_deadline(add_session(scheduler, "aged", 16, 0.0), 0.001)
        for item in scheduler.plan_step(now):
            one = item.sequence
            if one is aged:
                return
            one.kv.num_kv += item.num_tokens
            num_left[one] = num_left.get(one, 5) - 1
            if num_left[one] == 0:
                scheduler.remove(one, now)
                scheduler.drop(one.kv.key)
            else:
                one.kv.tokens.append(1)
    raise AssertionError("400 others have begun and ended, 100 turns were counted as the aged one's")


def test_an_aged_prefill_waits_for_the_turns_of_the_older_ones_and_one() -> None:
    scheduler = make_scheduler(num_blocks=400, prefill=16)
    follow(scheduler, order="moore_hodgson", ageing=1.0, aged_every=20)
    older = with_deadline(add_session(scheduler, "older", 16 * 10, 0.0), 0.001)
    ours = with_deadline(add_session(scheduler, "ours", 16, 0.5), 0.501)
    num_turns = num_needed = 0
    while ours.first_step_at is None:
        now = 10.0 + num_turns
        num_turns += 1
        with_deadline(add_session(scheduler, f"n{num_turns}", 16, now), now + 0.05)
        for item in scheduler.plan_step(now):
            num_needed += item.sequence is older
            item.sequence.kv.num_kv += item.num_tokens
            if item.samples:
                scheduler.remove(item.sequence, now)
                scheduler.drop(item.sequence.kv.key)
    assert num_needed == 10
    assert num_turns <= 20 * (num_needed + 1)


def make_role(scheduler: Scheduler, clock: Callable[[], float]) -> PrefillRole:
    engine = SimpleNamespace(
        scheduler=scheduler,
        clock=clock,
        wake=lambda: None,
        count_restorable=lambda kv: 0,
        reserve_idle=lambda kv, num_tokens, num_aside=0: scheduler.reserve(kv, num_tokens, num_aside=num_aside),
    )
    context: Any = SimpleNamespace(
        engine=engine,
        policy=find_policy("adaptive"),
        limits=WorkerLimits(),
        clock=clock,
        kv_changes=SimpleNamespace(note_gone=lambda session: None),
    )
    return PrefillRole(context)


def queue_job(role: PrefillRole, name: str, num_tokens: int, arrival: float, deadline_at: float = 1e6) -> None:
    key = RoundKey("t", name, 1, 1)
    waiting = WaitingPrefill(key, arrival, arrival, arrival + 1.0, 0.01)
    message: Any = SimpleNamespace(num_cached_tokens=num_tokens - 1, resident=None)
    job = PrefillJob(message, key, array("i", [1]), 0.0, deadline_at, waiting)
    assert (job.session, job.num_tokens) == (SessionKey("t", name), num_tokens)
    role._queue.append(job)
    role._jobs[key] = job


def fill_pool(scheduler: Scheduler, num_tokens: int) -> None:
    busy = SessionKv(SessionKey("t", "busy"), pinned=True)
    scheduler.sessions[busy.key] = busy
    assert scheduler.reserve(busy, num_tokens)


@pytest.mark.parametrize("num_kept", [1_000, 20_000])
async def test_a_resident_longer_than_the_prompt_puts_nothing_aside(num_kept: int) -> None:
    """A long prompt was cancelled, its KV is kept; the session's next prompt is short. With 20,000 tokens `_take_next`
    raises, and the worker ends."""
    scheduler = Scheduler(BlockAllocator(2_001, 16), max_prefill_tokens=8192)
    follow(scheduler, order="moore_hodgson")
    role = make_role(scheduler, lambda: 1_000.0)
    kept = SessionKv(SessionKey("t", "again"), resident=True)
    assert scheduler.reserve(kept, num_kept)
    kept.num_kv = num_kept
    role.residents._entries[kept.key] = scheduler.sessions[resident_key(kept.key)] = kept
    fill_pool(scheduler, (2_000 - 10) * 16 - num_kept)  # 10 blocks are free
    queue_job(role, "aged", 30_000, 0.0)
    queue_job(role, "again", 500, 999.9)
    queue_job(role, "other", 300, 999.95)  # needs 19 blocks
    assert role._take_next() is not None
    assert role._take_next() is None, "there is no room for it"
    unstaged = [waiting.key.session for waiting in scheduler.list_unstaged()]
    assert unstaged == ["aged", "other"], "the pace of steps counts them"


async def test_a_prefill_given_up_in_the_queue_leaves_no_room_put_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(BlockAllocator(2_001, 16), max_prefill_tokens=8192)
    follow(scheduler, order="moore_hodgson")
    now = 1_000.0
    role = make_role(scheduler, lambda: now)
    given_up: list[str] = []
    monkeypatch.setattr(role, "_report", lambda job, error: given_up.append(job.key.session))
    fill_pool(scheduler, (2_000 - 400) * 16)
    queue_job(role, "aged", 30_000, 0.0, deadline_at=1_001.0)
    queue_job(role, "other", 6_000, 999.9)
    assert role._take_next() is not None
    assert role._order.count_claimed() > 0
    now = 1_002.0
    role.expire_deadlines()
    assert given_up == ["aged"]
    assert role._order.count_claimed() == 0
