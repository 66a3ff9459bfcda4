"""The simulator keeps its books: rounds end once, no token or KV is lost, nothing hangs, times are the model's.

The random clusters, sessions and failures of a case depend on its seed alone; a failure names it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from loadgen.plan import PlannedRound, PlannedSession
from planner.simulator.cluster import Cluster, WorkerGroup
from planner.simulator.decode_batch import DecodeBatch
from planner.simulator.event_heap import EventHeap, Handler
from planner.simulator.failures import Failure
from planner.simulator.placement import LOCAL_CONTROL_S, REMOTE_CONTROL_S
from planner.simulator.rounds import SimRound
from planner.simulator.simulation import Result, Simulation
from planner.simulator.worker import SimWorker
from shared.core.batch_limit import BATCH_SHARE
from shared.core.chunking import ChunkParameters
from shared.core.decoding_rounds import DecodingRounds
from shared.core.policies import POLICIES, SchedulingPolicy, find_policy, switch_off, with_options
from shared.core.profile import Profile
from shared.core.reordering import WaitingPrefill
from shared.core.step_costs import StepCosts
from shared.messages import Role, Slo
from shared.profile_files import load_profile

PROFILE = load_profile("h100-qwen3-32b")
COSTS = StepCosts.from_profile(PROFILE, 2)
SLO = Slo(ttft_s=2.0, itl_s=0.05)
WITHOUT_ADMISSION = {"admission": False}


PlannedTokens = tuple[int, int] | tuple[int, int, float]


def session(index: int, arrival_s: float, *rounds: PlannedTokens) -> PlannedSession:
    """Rounds of (input tokens, output tokens, delay in seconds)."""
    planned = tuple(PlannedRound(one[0], one[1], one[2] if len(one) > 2 else 0.0) for one in rounds)
    return PlannedSession(index, f"s{index}", arrival_s, planned)


def cluster(
    *, prefill: int = 0, decode: int = 0, both: int = 0, degree: int = 2, profile: Profile = PROFILE, **fields: Any
) -> Cluster:
    counts: dict[Role, int] = {"prefill": prefill, "decode": decode, "both": both}
    groups = tuple(WorkerGroup(role=role, count=n, parallel_degree=degree) for role, n in counts.items() if n)
    return Cluster(profile=profile, groups=groups, **fields)


class WatchedEvents(EventHeap):
    """Fails when an event lies in the past or when there are more than `max_events`; checks the memory of `workers`
    after each `check_every`-th event."""

    def __init__(self, max_events: int, check_every: int = 0) -> None:
        super().__init__()
        self.workers: Sequence[SimWorker] = ()
        self._max_events, self._check_every = max_events, check_every

    def at(self, time: float, handler: Handler, argument: Any) -> None:
        assert time >= self.now, f"{handler} planned at {time}, now is {self.now}"
        assert self.num_planned < self._max_events, f"{self._max_events} events, now is {self.now}: it hangs"
        if self._check_every and self.num_planned % self._check_every == 0:
            super().at(time, self._handle_and_check, (handler, argument))
        else:
            super().at(time, handler, argument)

    def _handle_and_check(self, wrapped: tuple[Handler, Any], now: float) -> None:
        handler, argument = wrapped
        handler(argument, now)
        for worker in self.workers:
            check_memory(worker)


def check_memory(worker: SimWorker) -> None:
    """KvMemory.check_integrity, with what the batch has grown by since its sequences joined: that is counted as used
    when a segment is planned and goes to the entries when a sequence leaves."""
    memory, batch, segment = worker.memory, worker.batch, worker.segments.running
    grown = sum(batch.tick - r.joined_tick for r in batch.rounds if r.entry)
    if segment is not None and segment.decodes:
        grown += batch.size * segment.num_steps
    assert memory.num_used == sum(kv.num_tokens for kv in memory.entries.values()) + grown
    assert memory.num_host_used == sum(kv.num_host_tokens for kv in memory.entries.values())
    assert 0 <= memory.num_used <= memory.capacity
    assert 0 <= memory.num_host_used <= memory.host_capacity
    assert all(min(kv.num_tokens, kv.num_host_tokens, kv.busy) >= 0 for kv in memory.entries.values())
    assert all(kv.busy == 0 and memory.entries[key] is kv for key, kv in memory.idle.items())
    assert batch.size == sum(1 for r in batch.rounds if r.entry)


def simulate(
    where: Cluster,
    policy: SchedulingPolicy | str,
    sessions: Sequence[PlannedSession],
    slo: Slo = SLO,
    *,
    check_every: int = 1,
    **options: Any,
) -> tuple[Result, Simulation]:
    chosen = find_policy(policy) if isinstance(policy, str) else policy
    events = WatchedEvents(50_000 + sum(1_000 + one.output_tokens for s in sessions for one in s.rounds), check_every)
    sim = Simulation(where, chosen, sessions, slo, events=events, **options)
    events.workers = sim.workers
    result = sim.run()
    check_books(result, sim, sessions)
    return result, sim


def check_books(result: Result, sim: Simulation, sessions: Sequence[PlannedSession]) -> None:
    """Every round ends once, or follows one that failed; tokens, gaps and times add up; nothing stays behind."""
    ended = Counter((r.session.index, r.index) for r in result.rounds)
    assert not result.unfinished
    assert set(ended.values()) <= {1}, "a round ended twice"
    failed = {r.session.index: r.index for r in result.rounds if r.error}
    for planned in sessions:
        last = failed.get(planned.index, len(planned.rounds) - 1)
        assert [index for one, index in ended if one == planned.index] == list(range(last + 1))
    for round_ in result.rounds:
        if not round_.error:
            check_round(round_)
    for worker in sim.workers:
        check_memory(worker)
        load = worker.load
        assert worker.batch.size == 0
        assert not worker.queue.waiting
        assert not worker.remote.unstaged
        assert not load.prefills
        assert not load.decoding
        assert not load.active
        assert (load.backlog_s, load.num_backlog_tokens, load.num_context_tokens, load.num_active_tokens) == (
            0,
            0,
            0,
            0,
        )
        assert (load.num_promised_tokens, load.num_sessions) == (0, 0)


def check_round(round_: SimRound) -> None:
    planned = round_.planned
    assert round_.num_produced == planned.output_tokens
    assert round_.num_gaps == planned.output_tokens - 1
    assert all(count > 0 and gap_s > -1e-9 for count, gap_s in round_.gaps)
    assert round_.sent_at < round_.first_token_at <= round_.finished_at
    took_s = round_.finished_at - round_.first_token_at
    assert sum(count * gap_s for count, gap_s in round_.gaps) == pytest.approx(took_s, abs=1e-6)


# ----------------------------------------------------------------------------------- random cases


def draw_sessions(draws: random.Random, num_sessions: int, max_tokens: int, rate: float) -> list[PlannedSession]:
    sessions: list[PlannedSession] = []
    arrival_s = 0.0
    for index in range(num_sessions):
        arrival_s += draws.expovariate(rate)
        left = max_tokens
        rounds: list[PlannedTokens] = []
        for _ in range(draws.randint(1, 5)):
            num_input = draws.randint(1, int(max_tokens * draws.choice((0.05, 0.2, 0.6))))
            num_output = draws.randint(1, int(max_tokens * draws.choice((0.02, 0.05, 0.2))))
            left -= num_input + num_output
            if left < 0:
                break
            rounds.append((num_input, num_output, draws.choice((0.0, 0.05, draws.uniform(0.0, 5.0)))))
        sessions.append(session(index, arrival_s, *(rounds or [(1, 1)])))
    return sessions


def draw_cluster(draws: random.Random) -> Cluster:
    """Little memory, with and without a host tier, pauses, small batches; at least one worker decodes."""
    decode, both = draws.choice(((1, 0), (2, 0), (0, 1), (0, 2), (1, 1), (2, 2)))
    host_kv_bytes = draws.choice((0, 2_000 * PROFILE.kv_bytes_per_token, PROFILE.host_kv_bytes))
    return cluster(
        prefill=draws.randint(0, 2),
        decode=decode,
        both=both,
        degree=draws.choice((1, 2)),
        profile=msgspec.structs.replace(PROFILE, host_kv_bytes=host_kv_bytes),
        kv_tokens=draws.choice((200, 1_000, 5_000, 30_000)),
        pauses=draws.random() < 0.2,
        max_batch=draws.choice((4, 256)),
    )


def draw_policy(draws: random.Random, name: str) -> SchedulingPolicy:
    """As it is, or with some of its parts exchanged."""
    if draws.random() < 0.6:
        return find_policy(name)
    options = {part: draws.random() < 0.5 for part in ("host_tier", "keeps_resident", "fluid_roles", "moves_sessions")}
    return with_options(
        find_policy(name),
        {
            **options,
            "routing.chunk.chunk": draws.choice(("fixed", "slack")),
            "order.order": draws.choice(("fcfs", "program_fcfs", "window", "moore_hodgson")),
        },
    )


def run_random_case(name: str, seed: int, *, with_failures: bool) -> Result:
    draws = random.Random(f"{name}/{seed}/{with_failures}")
    where, policy = draw_cluster(draws), draw_policy(draws, name)
    assert where.kv_tokens is not None
    num_workers = sum(group.count for group in where.groups)
    max_tokens = int(where.kv_tokens * draws.choice((0.3, 0.6, 1.0)))
    sessions = draw_sessions(draws, draws.randint(1, 30), max_tokens, draws.choice((0.5, 5.0, 50.0, 1_000.0)))
    span_s = 1.5 * sessions[-1].arrival_s
    failures = [
        Failure(draws.randrange(num_workers), draws.uniform(0.001, span_s), draws.choice((None, 0.5, 5.0)))
        for _ in range(draws.randint(1, 3) if with_failures else 0)
    ]
    slo = Slo(ttft_s=draws.choice((0.2, 2.0)), itl_s=draws.choice((0.02, 0.1)))
    result, _ = simulate(where, policy, sessions, slo, check_every=5, failures=failures)
    if not with_failures and not policy.admission:
        assert all(not r.error for r in result.rounds), "only failures and admission make a round fail here"
    return result


@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_seed_hangs_or_loses_anything_in_tiny_memory(policy: str, block: int) -> None:
    for seed in range(block * 25, block * 25 + 25):
        print(f"policy {policy} seed {seed}")
        run_random_case(policy, seed, with_failures=False)


@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_workers_that_die_at_any_time_lose_no_round_and_repeat_none(policy: str, block: int) -> None:
    for seed in range(block * 25, block * 25 + 25):
        print(f"policy {policy} seed {seed}")
        run_random_case(policy, seed, with_failures=True)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_same_input_gives_the_same_run(policy: str) -> None:
    def tell(result: Result) -> list[object]:
        return [(r.session.index, r.index, r.sent_at, r.first_token_at, r.gaps, r.error) for r in result.rounds]

    first, again = (run_random_case(policy, 1, with_failures=True) for _ in range(2))
    assert tell(first) == tell(again)
    assert first.counters.events == again.counters.events
    assert tell(first) != tell(run_random_case(policy, 2, with_failures=True))


@pytest.mark.parametrize("at", [0.0005, 0.003, 0.0065, 0.01, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("policy", ["remote", "ampd", "adaptive"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_prefill_or_decode_worker_that_dies_for_good_is_replaced(policy: str, index: int, at: float) -> None:
    """Whatever the round was doing: on its way, queued, pulling history, computing, handed over, decoding."""
    sessions = [session(i, 0.001 * i, (4_000, 60), (300, 20, 0.05)) for i in range(6)]
    where = cluster(prefill=2, decode=2)
    failures = [Failure(2 * index, at), Failure(2 * index, at + 0.001, 1.0)]
    result, sim = simulate(where, with_options(find_policy(policy), WITHOUT_ADMISSION), sessions, failures=failures)
    assert sim.counters.failures == 1, "the second finds it dead"
    assert all(not r.error for r in result.rounds)


def test_without_any_worker_left_every_session_counts_as_failed() -> None:
    sessions = [session(0, 0.0, (100, 500), (10, 10)), session(1, 1.0, (100, 5))]
    result, _ = simulate(cluster(both=1), "colocated", sessions, failures=[Failure(0, 0.5)])
    assert [(r.session.index, r.error) for r in result.rounds] == [(0, "no_worker"), (1, "no_worker")]


# ------------------------------------------------------------------------------- exact durations


def test_one_session_alone_takes_what_the_cost_model_says() -> None:
    result, _ = simulate(cluster(both=1), "colocated", [session(0, 1.0, (3_000, 101), (200, 11, 2.0))])
    first, second = result.rounds
    assert first.ttft_s == pytest.approx(COSTS.prefill_s(0, 3_000) + LOCAL_CONTROL_S, abs=1e-9)
    assert first.tpot_s == pytest.approx(COSTS.decode_step_s(1, 3_000 + 51), rel=0.001)
    assert second.sent_at == pytest.approx(first.finished_at + 2.0)
    # the last token of a round has no KV: it is computed with the next round's input
    assert second.ttft_s == pytest.approx(COSTS.prefill_s(3_100, 201) + LOCAL_CONTROL_S, abs=1e-9)


def test_a_remote_round_adds_control_and_what_its_transfer_could_not_hide() -> None:
    result, sim = simulate(cluster(prefill=1, decode=1), "remote", [session(0, 0.0, (3_000, 101))])
    (round_,) = result.rounds
    alone_s = COSTS.prefill_s(0, 3_000) + LOCAL_CONTROL_S + REMOTE_CONTROL_S
    assert round_.is_remote
    assert alone_s < round_.ttft_s < alone_s + 0.01
    assert round_.tpot_s == pytest.approx(COSTS.decode_step_s(1, 3_051), rel=0.001)
    assert result.kv_bytes_moved == 3_000 * PROFILE.kv_bytes_per_token == round_.kv_bytes_written
    assert sim.counters.remote == 1


def test_control_can_be_scaled_as_on_an_emulated_cluster_whose_time_is_stretched() -> None:
    ttfts = [
        simulate(cluster(prefill=1, decode=1, control_scale=scale), "remote", [session(0, 0.0, (3_000, 2))])[0]
        .rounds[0]
        .ttft_s
        for scale in (1.0, 0.125)
    ]
    assert ttfts[0] - ttfts[1] == pytest.approx(0.875 * (LOCAL_CONTROL_S + REMOTE_CONTROL_S))


def test_prefills_share_a_step_only_while_nobody_is_late_for_it() -> None:
    """Ten at once, the first due before a step of all ten would end: it is on time all the same."""
    sessions = [session(index, 0.0, (1_000, 1)) for index in range(10)]
    all_s = COSTS.step_s(0, 0.0, [(0, 1_000)] * 10)
    slo = Slo(ttft_s=0.5 * all_s, itl_s=0.05)
    policy = with_options(find_policy("adaptive"), WITHOUT_ADMISSION)

    def count_on_time(chosen: SchedulingPolicy) -> int:
        result, _ = simulate(cluster(both=1), chosen, sessions, slo)
        return sum(round_.ttft_s <= slo.ttft_s for round_ in result.rounds)

    assert count_on_time(switch_off(policy, "on_time_steps")) == 1, "the first is alone when it begins"
    assert count_on_time(policy) >= 4


@pytest.mark.parametrize("predicted_scale", [0.5, 2.0])
def test_a_wrong_profile_is_corrected_from_the_steps_that_are_taken(predicted_scale: float) -> None:
    """Also when prefills share their steps: what one takes is not compared with what it would take alone."""
    sessions = [session(index, 0.01 * index, (1_500, 60), (500, 60)) for index in range(40)]
    where = cluster(both=1, predicted_scale=predicted_scale)
    _, sim = simulate(where, with_options(find_policy("adaptive"), WITHOUT_ADMISSION), sessions)
    (worker,) = sim.workers
    assert worker.load.prefill_correction == pytest.approx(1.0 / predicted_scale, rel=0.05)
    assert worker.load.decode_correction == pytest.approx(1.0 / predicted_scale, rel=0.05)
    _, sim = simulate(cluster(both=1), "adaptive", sessions)
    assert sim.workers[0].load.prefill_correction == 1.0


def test_a_batch_decodes_no_more_than_its_objective_allows() -> None:
    """150 rounds at once, of which 8 can decode in time: some wait some steps. With an objective that all can
    meet nothing changes."""
    sessions = [session(index, 0.0, (50, 60)) for index in range(150)]
    policy = with_options(find_policy("adaptive"), WITHOUT_ADMISSION)
    limit_s = COSTS.decode_step_s(8, 100)

    def list_gaps(chosen: SchedulingPolicy, itl_slo_s: float) -> list[list[tuple[int, float]]]:
        result, _ = simulate(cluster(both=1), chosen, sessions, Slo(ttft_s=1_000.0, itl_s=itl_slo_s))
        return [round_.gaps for round_ in sorted(result.rounds, key=lambda one: one.session.index)]

    without = switch_off(policy, "batch_limit")
    assert list_gaps(policy, 1.0) == list_gaps(without, 1.0)
    limited, free = (list_gaps(one, limit_s / BATCH_SHARE) for one in (policy, without))
    longest_limited, longest_free = (max(gap_s for gaps in one for _, gap_s in gaps) for one in (limited, free))
    assert longest_limited > 1.5 * longest_free, "some wait for a step or more, which nobody does without the limit"


@pytest.mark.parametrize("policy", ["colocated", "adaptive"])
def test_experts_near_the_objective_of_their_batch_attain(policy: str) -> None:
    """Small chunks cost a step of experts what large ones do, and steps of all take 93 % of the objective: who fills
    each step to its slack, or has some wait for so little, is late."""
    sessions = [session(index, 5.0 * index, (8_000, 200), *[(600, 300, 1.0)] * 8) for index in range(40)]
    slo = Slo(ttft_s=2.1, itl_s=0.022)
    experts = cluster(both=1, profile=load_profile("h100-mixtral-8x7b"))
    result, _ = simulate(experts, policy, sessions, slo, check_every=0)
    assert all(one.ttft_s <= slo.ttft_s and (one.tpot_s or 0.0) <= slo.itl_s for one in result.rounds)
    assert len(result.rounds) == 360


@pytest.mark.parametrize(("ttft_s", "least", "most"), [(60.0, 0.5, 0.65), (2.0, 0.8, 1.0)], ids=["calm", "hurried"])
def test_a_prefill_takes_less_of_each_step_while_it_has_time(ttft_s: float, least: float, most: float) -> None:
    sessions = [session(0, 0.0, (1_000, 300)), session(1, 2.0, (16_000, 10))]
    result, _ = simulate(cluster(both=1), "adaptive", sessions, Slo(ttft_s=ttft_s, itl_s=0.05))
    decoding, prefilled = sorted(result.rounds, key=lambda one: one.session.index)
    assert prefilled.ttft_s <= ttft_s
    assert least * 0.05 < max(gap_s for _, gap_s in decoding.gaps) < most * 0.05


def test_the_pace_counts_prefills_that_are_not_staged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 for one prefill worker, which stages a few at a time."""
    most = 0

    def watch(
        parameters: ChunkParameters,
        costs: StepCosts,
        beside: DecodingRounds,
        waiting: Sequence[WaitingPrefill],
        now: float,
        **_: Any,
    ) -> ChunkParameters:
        nonlocal most
        most = max(most, len(waiting))
        return parameters

    monkeypatch.setattr("planner.simulator.prefill_planner.choose_pace", watch)
    simulate(cluster(prefill=1, decode=1), "remote", [session(index, 0.0, (8_000, 2)) for index in range(40)])
    assert most > 30


@pytest.mark.parametrize("policy", ["colocated", "adaptive"])
def test_no_more_decode_in_a_step_than_a_worker_has_places(policy: str) -> None:
    """60 rounds at once on a worker of 20 places: nobody is lost, and a step never has more."""
    sessions = [session(index, 0.0, (50, 60)) for index in range(60)]
    chosen = with_options(find_policy(policy), WITHOUT_ADMISSION) if policy == "adaptive" else policy
    largest = 0
    begin = DecodeBatch.begin

    def watch(batch: DecodeBatch, round_: SimRound, now: float) -> None:
        nonlocal largest
        begin(batch, round_, now)
        largest = max(largest, batch.size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeBatch, "begin", watch)
        result, _ = simulate(replace(cluster(both=1), max_batch=20), chosen, sessions, Slo(ttft_s=1_000.0, itl_s=1.0))
    assert largest == 20
    assert all(not one.error and one.finished_at > 0.0 for one in result.rounds)
    assert len(result.rounds) == 60


def test_two_sequences_decode_in_one_batch() -> None:
    """The second arrives while the first decodes, and joins it."""
    result, _ = simulate(cluster(both=1), "colocated", [session(0, 0.0, (1_000, 1_001)), session(1, 1.0, (1_000, 101))])
    second = next(r for r in result.rounds if r.session.index == 1)
    assert second.tpot_s == pytest.approx(COSTS.decode_step_s(2, 1_000), rel=0.02)
    assert second.tpot_s != pytest.approx(COSTS.decode_step_s(1, 1_000), rel=0.001)


def find_gap_during(result: Result, tpot_s: float) -> list[tuple[int, float]]:
    """Gaps of session 0 longer than its steps alone."""
    first = next(r for r in result.rounds if r.session.index == 0)
    return [(count, gap_s) for count, gap_s in first.gaps if gap_s > 1.2 * tpot_s]


def test_chunks_beside_a_batch_make_its_gaps_the_mixed_steps() -> None:
    """4,096 tokens in chunks of 512, the batch decoding in each of these steps."""
    sessions = [session(0, 0.0, (1_000, 200)), session(1, 0.5, (4_096, 1))]
    result, _ = simulate(cluster(both=1), "colocated", sessions)
    gaps = find_gap_during(result, COSTS.decode_step_s(1, 1_050))
    assert sum(count for count, _ in gaps) == 8
    expected_s = sum(COSTS.step_s(1, 1_050, [(history, 512)]) for history in range(0, 4_096, 512))
    assert sum(count * gap_s for count, gap_s in gaps) == pytest.approx(expected_s, rel=0.01)


def test_with_pauses_one_gap_is_the_whole_prefill() -> None:
    sessions = [session(0, 0.0, (1_000, 200)), session(1, 0.5, (4_096, 1))]
    result, _ = simulate(cluster(both=1, pauses=True), "colocated", sessions)
    ((count, gap_s),) = find_gap_during(result, COSTS.decode_step_s(1, 1_050))
    assert count == 1
    assert gap_s == pytest.approx(COSTS.prefill_s(0, 4_096) + COSTS.decode_step_s(1, 1_050), rel=0.01)


@pytest.mark.parametrize("pauses", [False, True])
def test_a_first_gap_does_not_count_the_prefill_before_it(pauses: bool) -> None:
    result, _ = simulate(cluster(both=1, pauses=pauses), "colocated", [session(0, 0.0, (8_000, 2))])
    assert result.rounds[0].tpot_s == pytest.approx(COSTS.decode_step_s(1, 8_001), rel=0.01)


# --------------------------------------------------------------------------- links and memory


def test_transfers_over_one_link_follow_one_another() -> None:
    _, sim = simulate(cluster(prefill=2, decode=2), "remote", [session(0, 0.0, (1, 1))])
    prefill, other_prefill, decode, other_decode = sim.workers
    assert prefill.node == decode.node
    take_s = 10_000 * PROFILE.kv_bytes_per_token / COSTS.node_bytes_per_s
    latency_s, now = COSTS.latency_s, 1_000.0
    transfer = sim.links.transfer
    assert transfer(prefill, decode, 10_000, now, 0.0) == pytest.approx(now + take_s + latency_s)
    assert transfer(prefill, other_decode, 10_000, now, 0.0) == pytest.approx(now + 2 * (take_s + latency_s)), "way out"
    assert transfer(other_prefill, decode, 10_000, now, 0.0) == pytest.approx(now + 2 * (take_s + latency_s)), "way in"
    assert transfer(decode, other_prefill, 10_000, now, 0.0) == pytest.approx(now + take_s + latency_s), "both free"
    late = now + 100.0
    assert transfer(prefill, decode, 10_000, late, take_s / 2) == pytest.approx(late + take_s / 2 + latency_s)
    assert transfer(prefill, other_decode, 10_000, late + 50.0, 10.0) == pytest.approx(late + 50.0 + latency_s), (
        "hidden"
    )


@pytest.mark.parametrize("has_host_tier", [True, False])
def test_evicted_kv_comes_back_from_host_memory_or_is_computed_again(has_host_tier: bool) -> None:
    """Two sessions of 20,000 tokens take turns on a worker that holds one."""
    policy = with_options(find_policy("colocated"), {"host_tier": has_host_tier})
    sessions = [session(i, 5.0 * i, (20_000, 10), (100, 10, 20.0)) for i in range(2)]
    result, sim = simulate(cluster(both=1, kv_tokens=25_000), policy, sessions)
    assert result.num_evicted_tokens > 10_000
    second = next(r for r in result.rounds if (r.session.index, r.index) == (0, 1))
    swap_s = (
        2 * 20_000 * PROFILE.kv_bytes_per_token / COSTS.host_bytes_per_s
    )  # the other one's goes, its own comes back
    restored_s = swap_s + COSTS.prefill_s(20_009, 101) + 0.01
    if has_host_tier:
        assert second.ttft_s < restored_s
    else:
        assert second.ttft_s > COSTS.prefill_s(5_000, 15_000)
    assert restored_s < COSTS.prefill_s(5_000, 15_000), "so that the two differ"
    assert sim.workers[0].memory.num_host_used == 0


@pytest.mark.parametrize("has_host_tier", [True, False])
def test_a_preempted_round_keeps_its_tokens(has_host_tier: bool) -> None:
    """Four sequences grow to 800 tokens each in room for 2,000."""
    policy = with_options(find_policy("colocated"), {"host_tier": has_host_tier})
    result, _ = simulate(cluster(both=1, kv_tokens=2_000), policy, [session(i, 0.01 * i, (200, 600)) for i in range(4)])
    assert result.num_preemptions > 0
    assert sum(r.num_preemptions for r in result.rounds) == result.num_preemptions
    oldest = next(r for r in result.rounds if r.session.index == 0)
    assert oldest.num_preemptions == 0, "the youngest is preempted first"


def test_a_context_too_long_for_the_worker_fails_alone() -> None:
    sessions = [session(0, 0.0, (900, 200)), session(1, 0.0, (500, 20))]
    result, _ = simulate(cluster(both=1, kv_tokens=1_000), "colocated", sessions)
    assert {r.session.index: r.error for r in result.rounds} == {0: "context_too_long", 1: ""}


def test_an_overloaded_cluster_refuses_at_the_door_and_answers_the_others() -> None:
    sessions = [session(i, 0.001 * i, (8_000, 4)) for i in range(60)]
    result, sim = simulate(cluster(both=1), "adaptive", sessions, Slo(ttft_s=1.5, itl_s=0.05))
    errors = Counter(r.error for r in result.rounds)
    assert set(errors) == {"", "overloaded"}
    assert errors["overloaded"] == sim.counters.rejected > 10
    assert errors[""] > 0


# --------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_events_grow_with_the_rounds_and_not_with_the_tokens(policy: str) -> None:
    """At one load a worker, ten times the sessions: no more than ten times the events, and a little."""

    def count(num_sessions: int, num_output: int) -> int:
        draws = random.Random(7)
        arrival_s, sessions = 0.0, []
        for index in range(num_sessions):
            arrival_s += draws.expovariate(2.0)
            sessions.append(session(index, arrival_s, (1_500, num_output), (100, num_output, draws.uniform(0.0, 4.0))))
        chosen = replace(find_policy(policy), admission=False)
        return simulate(cluster(prefill=1, both=2), chosen, sessions, check_every=0)[0].counters.events

    few, many = count(40, 30), count(400, 30)
    assert many < 12 * few
    assert count(40, 300) < 4 * few, "ten times the tokens"
