"""The coordinator's core: loads, kept KV, staging, admission and explanations, one rule at a time."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
from coordinator_driver import KEY, USAGE, Driver, error, source, submit, tokens_message

from shared.core.commands import PublishStream, SendToWorker
from shared.core.coordinator_config import CoordinatorConfig
from shared.core.events import CommandFailed, RecordsLoaded, SessionRecord, WorkerReported
from shared.core.load import WorkerLoad
from shared.core.policies import POLICIES
from shared.core.profile import Curve, DegreeProfile, Grid, Links, Profile
from shared.core.records import WorkerRef
from shared.core.types import SessionKey
from shared.errors import AmpdError, ErrorCode
from shared.messages import (
    Ack,
    CancelRound,
    CloseSession,
    DropSession,
    ExplainSession,
    GrantHistory,
    HistoryGranted,
    KvHeld,
    KvStaged,
    OpenSession,
    PrefillTask,
    ResidentKv,
    RunRound,
    Slo,
    StageKv,
    pack_token_ids,
    unpack_token_ids,
)

PREFILL_AT_P = WorkerRef("p", 1)
EXPLAIN = ExplainSession(tenant="t", session="s")


def checksum(token_ids: list[int]) -> int:
    return zlib.crc32(pack_token_ids(token_ids))


def load_of(driver: Driver, worker_id: str) -> WorkerLoad:
    return driver.core.state.fleet.workers[worker_id].load


def resident(driver: Driver) -> dict[WorkerRef, int]:
    return driver.core.state.sessions[KEY].resident


def counter(driver: Driver, name: str) -> int:
    return driver.core.state.counters[name]


# ---------------------------------------------------------------------------------- the config


def test_a_policy_is_made_of_its_name_its_parts_and_its_options() -> None:
    config = CoordinatorConfig(
        policy="adaptive", disabled_parts=("staging", "residency"), policy_options={"routing.uncertainty": "0.3"}
    )
    assert (config.scheduling.name, config.scheduling.stages, config.scheduling.keeps_resident) == (
        "adaptive",
        False,
        False,
    )
    assert config.scheduling.routing.uncertainty == 0.3
    for wrong in (
        {"policy": "best"},
        {"disabled_parts": ("everything",)},
        {"policy_options": {"routing.gamma": 1}},
        {"cost_scale": 0.0},
        {"admission_factor": float("nan")},
        {"max_holders": 1},
    ):
        with pytest.raises(AmpdError) as refused:
            CoordinatorConfig(**wrong)
        assert refused.value.code == ErrorCode.INVALID_REQUEST


# ------------------------------------------------------------------------------- loads


def test_a_round_counts_at_its_workers_while_it_prefills_and_then_while_it_decodes() -> None:
    driver = Driver(policy="remote")
    driver.open("d", "p")
    driver.submit([1] * 20)
    assert load_of(driver, "p").num_backlog_tokens == 20
    assert load_of(driver, "p").by_deadline[0].deadline == driver.now + 5.0
    assert load_of(driver, "d").active == {KEY: 30}
    assert not load_of(driver, "d").decoding
    driver.acknowledge_run()
    driver.stream(tokens_message(0, 7))
    assert (load_of(driver, "p").backlog_s, load_of(driver, "d").decoding) == (0.0, {KEY: 20})
    driver.end([7, 8])
    assert not load_of(driver, "d").active
    assert not load_of(driver, "d").decoding
    assert (load_of(driver, "d").num_promised_tokens, load_of(driver, "d").num_sessions) == (22, 1)


def test_what_the_worker_has_lost_is_counted_when_it_says_so() -> None:
    driver = Driver(policy="colocated")
    driver.open("d")
    driver.play_round([1] * 30, [2] * 10)
    driver.submit([3] * 5)
    assert load_of(driver, "d").num_backlog_tokens == 6, "the last token of the history has no KV yet"
    driver.acknowledge_run(cached=0)
    assert load_of(driver, "d").num_backlog_tokens == 45


def test_windows_role_and_room_follow_the_heartbeats() -> None:
    driver = Driver()
    driver.beat("d", role="both", num_blocks=10, node="n1")
    driver.beat("p", role="prefill", node="n1")
    assert (load_of(driver, "d").num_kv_tokens, load_of(driver, "d").takes_prefill) == (160, True)
    assert load_of(driver, "d").node == load_of(driver, "p").node
    driver.beat("d", role="decode", num_blocks=20, seq=1)
    assert (load_of(driver, "d").num_kv_tokens, load_of(driver, "d").takes_prefill) == (320, False)
    assert load_of(driver, "d").node != load_of(driver, "p").node, "a worker that names no node is one of its own"


@pytest.mark.parametrize("corrects", [True, False])
def test_predictions_follow_how_long_steps_take_if_the_policy_says_so(corrects: bool) -> None:
    """Workers tell it as multiples of the profile's durations; the coordinator may have been told a scale already."""
    options = {"corrects": corrects}
    driver = Driver(policy="remote", policy_options=options, profile=profile(), cost_scale=2.0)
    driver.open("d", "p")
    load = load_of(driver, "p")
    assert (load.prefill_correction, load.decode_correction) == (1.0, 1.0), "nothing measured"
    alone_s, step_s = load.prefill_s(0, 100), load.decode_step_s(1)
    driver.beat("p", seq=1, role="prefill", prefill_scale=6.0, decode_scale=5.0)
    assert load.prefill_s(0, 100) == pytest.approx((3.0 if corrects else 1.0) * alone_s)
    assert load.decode_step_s(1) == pytest.approx((2.5 if corrects else 1.0) * step_s)


def test_costs_made_of_a_workers_own_rates_are_not_corrected_again() -> None:
    driver = Driver(policy="adaptive")
    driver.open("d")
    driver.beat("d", seq=1, prefill_scale=6.0, decode_scale=5.0)
    assert (load_of(driver, "d").prefill_correction, load_of(driver, "d").decode_correction) == (1.0, 1.0)


# ------------------------------------------------------------------------- where prefills may run


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_without_prefill_workers_every_policy_is_local(policy: str) -> None:
    driver = Driver(policy=policy)
    driver.open("d")
    assert driver.submit([1] * 100).remote is None
    reason = driver.core.state.sessions[KEY].in_flight.decision.reason
    assert reason == ("colocated" if policy in ("colocated", "continuum") else "no prefill worker")


@pytest.mark.parametrize("policy", ["colocated", "continuum"])
def test_colocated_policies_use_no_other_worker(policy: str) -> None:
    driver = Driver(policy=policy)
    driver.open("d", "p")
    driver.beat("b", role="both")
    assert driver.submit([1] * 100).remote is None


@pytest.mark.parametrize("policy", ["remote", "adaptive"])
def test_with_fluid_roles_workers_of_both_prefill_for_others_and_decode_workers_do_not(policy: str) -> None:
    driver = Driver(policy=policy)
    driver.beat("d1")
    driver.beat("d2")
    driver.beat("b", role="both", num_blocks=8)  # too small to be bound to
    driver.answer(OpenSession())
    driver.submit([1] * 100)
    decision = driver.core.state.sessions[KEY].in_flight.decision
    others = {option.worker_id for option in decision.options} - {driver.run.worker_id}
    assert others == ({"b"} - {driver.run.worker_id} if policy == "adaptive" else set())


def test_rounds_carry_how_long_they_have_waited_and_how_old_their_session_is() -> None:
    driver = Driver(policy="remote")
    driver.open("d1", "p")
    driver.tick(2.0, "d1", "p")
    driver.submit([1])
    driver.tick(1.0, "d1", "p")
    driver.beat("d2")
    driver.feed(CommandFailed(command_id=driver.run.command_id, reason="no_responders"))
    (driver.run,) = driver.sent(RunRound)
    assert (driver.run.message.waited_s, driver.run.message.session_age_s) == (1.0, 3.0)
    driver.acknowledge_run()
    (task,) = driver.sent(PrefillTask)
    assert (task.message.waited_s, task.message.session_age_s) == (1.0, 3.0)


# ---------------------------------------------------------------------------------- kept KV


@pytest.fixture
def keeping() -> Driver:
    """Remote prefills that read the history they lack and are kept."""
    driver = Driver(policy="remote", policy_options={"routing.reads_history": True})
    driver.open("d", "p")
    return driver


def test_what_a_prefill_worker_keeps_is_claimed_with_its_checksum(keeping: Driver) -> None:
    first = keeping.play_remote_round([1, 2, 3], [4, 5], cached=0, resident=3)
    assert (first.keep, first.resident, first.prefix_checksum) == (True, None, 0)
    assert resident(keeping) == {PREFILL_AT_P: 3}
    second = keeping.play_remote_round([6, 7], [8], cached=4, resident=7)
    assert second.resident == ResidentKv(num_tokens=3, checksum=checksum([1, 2, 3]))
    assert (second.num_cached_tokens, second.prefix_checksum) == (4, checksum([1, 2, 3, 4]))
    assert unpack_token_ids(second.token_ids) == [5, 6, 7]
    third = keeping.play_remote_round([9], [9], cached=0, resident=9)
    assert third.resident == ResidentKv(num_tokens=7, checksum=checksum([1, 2, 3, 4, 5, 6, 7]))
    assert (third.num_cached_tokens, third.history) == (0, None)


def test_routing_counts_only_what_has_to_be_computed(keeping: Driver) -> None:
    keeping.play_remote_round([1] * 50, [2] * 10, cached=0, resident=50)
    keeping.submit([3])
    assert keeping.core.state.sessions[KEY].in_flight.decision.chosen.num_new_tokens == 2
    keeping.acknowledge_run(cached=0)
    assert load_of(keeping, "p").num_backlog_tokens == 11, "the decode worker has nothing left to read"


def test_a_policy_that_reads_no_history_sends_every_token() -> None:
    driver = Driver(policy="threshold", policy_options={"routing.local_tokens": 0})
    driver.open("d", "p")
    driver.play_remote_round([1, 2, 3], [4], cached=0, resident=3)
    task = driver.play_remote_round([5], [6], cached=3, resident=5)
    assert (task.history, task.num_cached_tokens, task.prefix_checksum) == (None, 0, 0)
    assert unpack_token_ids(task.token_ids) == [1, 2, 3, 4, 5]
    assert task.resident == ResidentKv(num_tokens=3, checksum=checksum([1, 2, 3]))


def test_a_policy_that_keeps_nothing_says_so() -> None:
    driver = Driver(policy="remote", policy_options={"keeps_resident": False})
    driver.open("d", "p")
    task = driver.play_remote_round([1, 2, 3], [4], cached=0, resident=0)
    assert (task.keep, task.resident, resident(driver)) == (False, None, {})


def test_a_failed_round_is_cut_off_what_is_kept(keeping: Driver) -> None:
    keeping.play_remote_round([1, 2, 3], [4], cached=0, resident=3)
    keeping.submit([5, 6])
    keeping.acknowledge_run(cached=3)
    (task,) = keeping.sent(PrefillTask)
    keeping.end_prefill(task, 6)
    assert resident(keeping) == {PREFILL_AT_P: 6}
    keeping.end([], error=error(ErrorCode.CLIENT_GONE))
    assert keeping.one(PublishStream).message.error.code == ErrorCode.CLIENT_GONE
    assert resident(keeping) == {PREFILL_AT_P: 4}
    keeping.end_prefill(task, 6)  # repeated, late
    assert resident(keeping) == {PREFILL_AT_P: 4}
    claimed = keeping.play_remote_round([7], [8], cached=3, resident=5).resident
    assert claimed == ResidentKv(num_tokens=4, checksum=checksum([1, 2, 3, 4]))


def test_the_next_attempt_claims_what_the_one_before_left_but_never_the_last_token(keeping: Driver) -> None:
    keeping.submit([1, 2, 3])
    keeping.acknowledge_run()
    (task,) = keeping.sent(PrefillTask)
    keeping.end_prefill(task, 3)
    keeping.end([], error=error(ErrorCode.OUT_OF_BLOCKS))
    (keeping.run,) = keeping.sent(RunRound)
    keeping.acknowledge_run()
    (task,) = keeping.sent(PrefillTask)
    assert task.message.resident == ResidentKv(num_tokens=2, checksum=checksum([1, 2]))


def test_evictions_and_losses_are_believed(keeping: Driver) -> None:
    keeping.play_remote_round([1, 2, 3], [4], cached=0, resident=3)
    gone = KvHeld(tenant="t", session="gone", num_device_tokens=0)
    keeping.beat("p", seq=1, kv_held=(KvHeld(tenant="t", session="s", num_device_tokens=0), gone))
    assert resident(keeping) == {PREFILL_AT_P: 0}
    assert keeping.play_remote_round([5], [6], cached=3, resident=5).resident is None
    assert resident(keeping) == {PREFILL_AT_P: 5}
    keeping.tick(4.0, "d")
    assert resident(keeping) == {PREFILL_AT_P: 0}, "if it comes back, nobody knows what it holds"


def test_closing_drops_the_session_wherever_it_may_be_held(keeping: Driver) -> None:
    keeping.play_remote_round([1, 2, 3], [4], cached=0, resident=3)
    keeping.ask(CloseSession())
    drops = keeping.sent(DropSession)
    assert [drop.worker_id for drop in drops] == ["d", "p"]
    keeping.reply(drops[1], Ack())
    assert keeping.core.state.purging == {KEY}
    assert keeping.core.state.dropping == {KEY: {WorkerRef("d", 1)}}
    keeping.reply(drops[0], Ack())
    assert not keeping.core.state.purging


def test_a_session_closed_while_it_prefills_is_dropped_there_too(keeping: Driver) -> None:
    keeping.submit([1, 2, 3])
    keeping.acknowledge_run()
    keeping.ask(CloseSession())
    keeping.tick(2.0, "d", "p")
    assert {drop.worker_id for drop in keeping.sent(DropSession)} == {"d", "p"}


def test_after_a_restart_former_prefill_workers_are_remembered(keeping: Driver) -> None:
    keeping.play_remote_round([1, 2, 3], [4], cached=0, resident=3)
    fresh = Driver(policy="remote")
    fresh.feed(RecordsLoaded(records=(SessionRecord(KEY, tuple(keeping.entries)),)))
    assert resident(fresh) == {PREFILL_AT_P: 0}
    for worker_id in ("d", "p"):
        fresh.beat(worker_id)
    fresh.ask(CloseSession())
    assert {drop.worker_id for drop in fresh.sent(DropSession)} == {"d", "p"}


def test_holders_are_bounded_and_the_one_with_least_goes() -> None:
    driver = Driver(policy="remote", max_holders=2)
    driver.open("d", "p1")
    driver.play_remote_round([1, 2, 3], [4], cached=0, resident=3)
    for worker_id, tokens in (("p2", 5), ("p3", 7)):
        driver.beat(worker_id)
        for other in ("p1", "p2", "p3"):
            if other != worker_id and other in driver.core.state.fleet.workers:
                driver.beat(other, seq=1, draining=True)
        driver.play_remote_round([5], [6], cached=3, resident=tokens)
    assert resident(driver) == {WorkerRef("p2", 1): 5, WorkerRef("p3", 1): 7}
    assert [drop.worker_id for drop in driver.sent(DropSession)] == ["p1"]


# ---------------------------------------------------------------------------------- staging


def staging_driver(**config: Any) -> tuple[Driver, SendToWorker]:
    """A session that p holds 3 of 73 tokens of, and the grant that its decode worker is asked for."""
    options = {"routing.reads_history": True, "stages": True}
    driver = Driver(policy="remote", policy_options=options, **config)
    driver.open("d", "p")
    driver.play_remote_round([1, 2, 3], [4] * 70, cached=0, resident=3)
    (grant,) = driver.sent(GrantHistory)
    return driver, grant


def staged(num_tokens: int, **fields: Any) -> KvStaged:
    fields = {"worker_id": "p", "incarnation": 1, "kv_bytes_read": 9, **fields}
    return KvStaged(tenant="t", session="s", num_resident_tokens=num_tokens, **fields)


def test_after_a_round_its_new_kv_moves_to_the_worker_that_holds_the_most() -> None:
    driver, grant = staging_driver()
    assert (grant.worker_id, grant.message.num_tokens, grant.message.incarnation) == ("d", 73, 1)
    driver.reply(grant, HistoryGranted(num_tokens=72, history=source("d")))
    (stage,) = driver.sent(StageKv)
    message = stage.message
    assert (stage.worker_id, message.num_tokens, message.history) == ("p", 72, source("d"))
    assert message.resident == ResidentKv(num_tokens=3, checksum=checksum([1, 2, 3]))
    assert message.checksum == checksum([1, 2, 3] + [4] * 69)
    assert (message.decode_worker, message.decode_incarnation) == ("d", 1)
    driver.reply(stage, Ack())
    assert KEY in driver.core.state.staging
    driver.feed(WorkerReported(ack_id=1, report=staged(72)))
    assert (resident(driver), driver.core.state.staging) == ({PREFILL_AT_P: 72}, {})
    assert counter(driver, "stagings_done") == 1
    assert driver.play_remote_round([5], [6], cached=72, resident=74).resident.num_tokens == 72
    assert not driver.sent(GrantHistory), "one more token is not worth it"


def test_a_policy_that_does_not_stage_and_a_short_suffix_move_nothing() -> None:
    driver = Driver(policy="remote", policy_options={"stages": False})
    driver.open("d", "p")
    driver.play_remote_round([1, 2, 3], [4] * 70, cached=0, resident=3)
    assert not driver.sent(GrantHistory)
    driver = Driver(policy="remote", policy_options={"stages": True})
    driver.open("d", "p")
    driver.play_remote_round([1, 2, 3], [4] * 64, cached=0, resident=3)
    assert not driver.sent(GrantHistory), "63 tokens with KV are missing"


@pytest.mark.parametrize("how", ["refused", "silent", "gone", "reported", "late"])
def test_a_staging_that_fails_is_counted_and_harms_nothing(how: str) -> None:
    driver, grant = staging_driver()
    if how == "refused":
        driver.reply(grant, error(ErrorCode.KV_LEASE_INVALID))
    elif how == "silent":
        driver.feed(CommandFailed(command_id=grant.command_id, reason="timeout"))
    elif how == "gone":
        driver.tick(4.0, "d")
    elif how == "late":
        driver.tick(40.0, "d", "p")
    else:
        driver.reply(grant, HistoryGranted(num_tokens=72, history=source("d")))
        driver.sent(StageKv)
        driver.feed(WorkerReported(ack_id=1, report=staged(3, error=error(ErrorCode.KV_TRANSFER_FAILED))))
    assert (driver.core.state.staging, counter(driver, "stagings_failed")) == ({}, 1)
    driver.submit([5])


def test_the_next_round_does_not_wait_and_overtakes_the_staging() -> None:
    driver, grant = staging_driver()
    driver.submit([5])
    driver.reply(grant, HistoryGranted(num_tokens=72, history=source("d")))
    assert not driver.sent(StageKv)
    assert counter(driver, "stagings_failed") == 1


def test_stagings_under_way_are_bounded() -> None:
    driver, _ = staging_driver(max_staging_in_flight=1)
    other = SessionKey("t", "other")
    driver.answer(OpenSession(), key=other)
    driver.core.state.sessions[other].resident[PREFILL_AT_P] = 1
    driver.answer(submit([1]), key=other)
    (driver.run,) = driver.sent(RunRound)
    driver.end([2] * 80, session="other")
    assert not driver.sent(GrantHistory)
    assert counter(driver, "stagings_skipped") == 1


# -------------------------------------------------------------------------------- admission


def queued(driver: Driver, num_rounds: int, num_tokens: int) -> None:
    """Rounds of other sessions that wait on the decode worker."""
    for number in range(num_rounds):
        key = SessionKey("t", f"other{number}")
        driver.answer(OpenSession(slo=Slo(ttft_s=1000.0)), key=key)
        driver.answer(submit([1] * num_tokens), key=key)


def refused_after(driver: Driver, ttft_s: float, num_tokens: int) -> Any:
    driver.answer(OpenSession(slo=Slo(ttft_s=ttft_s)))
    return driver.answer(submit([1] * num_tokens))


def test_a_first_round_that_would_wait_far_past_its_objective_is_refused_with_a_hint() -> None:
    driver = Driver(policy="adaptive", kv_overcommit=100.0, admission_factor=3.0)
    driver.beat("d", prefill_tokens_per_s=100.0)
    queued(driver, 10, 100)  # ten seconds of work
    reply = refused_after(driver, 2.0, 250)  # late by itself: it would come last
    assert reply.code == ErrorCode.OVERLOADED
    assert 8.0 < reply.retry_after_s < 12.0
    assert counter(driver, "rounds_not_admitted") == 1
    assert driver.core.state.sessions[KEY].binding is None, "it may be bound elsewhere when it comes back"


@pytest.mark.parametrize("why", ["patient", "on time", "later round", "other policy", "long prompt"])
def test_other_rounds_are_let_in(why: str) -> None:
    options = {"admission": why != "other policy"}
    driver = Driver(policy="adaptive", kv_overcommit=100.0, policy_options=options, admission_factor=3.0)
    driver.beat("d", prefill_tokens_per_s=100.0)
    driver.answer(OpenSession(slo=Slo(ttft_s=8.0 if why == "patient" else 2.0)))
    if why == "later round":
        driver.submit([1])
        driver.end([2])
    queued(driver, 10, 100)
    driver.sent(RunRound)
    driver.submit([1] * {"long prompt": 900, "on time": 100}.get(why, 250))
    assert counter(driver, "rounds_not_admitted") == 0


# ------------------------------------------------------------------------------ explanations


def test_a_round_is_explained_as_predicted_and_as_measured() -> None:
    driver = Driver(policy="adaptive")
    driver.open("d", "p")
    driver.submit([1] * 40, slo=Slo(ttft_s=2.0, itl_s=0.1))
    running = driver.core.explain_session(EXPLAIN).rounds[0]
    assert (running.ttft_s, running.usage) == (None, None)
    driver.acknowledge_run()
    driver.now += 0.5
    driver.stream(tokens_message(0, 7))
    assert driver.core.explain_session(EXPLAIN).rounds[0].ttft_s == 0.5
    driver.now += 0.3
    driver.end([7, 8, 9, 9])
    explained = driver.core.explain_session(EXPLAIN)
    assert (explained.session, explained.policy) == ("s", "adaptive")
    (round_,) = explained.rounds
    assert (round_.round, round_.attempt, round_.usage) == (0, 1, USAGE)
    assert (round_.ttft_s, round_.tpot_s) == (0.5, pytest.approx(0.1))
    assert round_.slo == Slo(ttft_s=2.0, itl_s=0.1)
    assert "rounds on time" in round_.reason
    assert {option.worker_id for option in round_.options} == {"d", "p"}
    chosen = round_.options[round_.chosen_index]
    assert (chosen.worker_id, chosen.placement) == (round_.worker_id, round_.placement)
    assert chosen.prefill_s > 0
    assert 0.9 < chosen.on_time <= 1.0


def test_explanations_outlive_their_session_for_a_while_and_are_bounded() -> None:
    driver = Driver(closed_explained=2)
    driver.beat("d")
    for number in range(3):
        key = SessionKey("t", f"s{number}")
        driver.answer(OpenSession(), key=key)
        driver.answer(submit([1]), key=key)
        driver.ask(CancelRound(), key=key)
        driver.ask(CloseSession(), key=key)
        driver.tick(2.0, "d")
    with pytest.raises(AmpdError) as refused:
        driver.core.explain_session(ExplainSession(tenant="t", session="s0"))
    assert refused.value.code == ErrorCode.UNKNOWN_SESSION
    (round_,) = driver.core.explain_session(ExplainSession(tenant="t", session="s2")).rounds
    assert (round_.placement, round_.worker_id, round_.usage) == ("local", "d", None)


def test_old_rounds_give_up_their_decisions() -> None:
    driver = Driver(decisions_kept=2)
    driver.open("d")
    for _ in range(4):
        driver.play_round([1], [2])
    assert [one.round for one in driver.core.explain_session(EXPLAIN).rounds] == [2, 3]
    kept = [ended.decision is not None for ended in driver.core.state.sessions[KEY].rounds.values()]
    assert kept == [False, False, True, True]


def test_a_round_that_another_coordinator_placed_says_so() -> None:
    driver = Driver()
    driver.open("d")
    driver.play_round([1], [2])
    fresh = Driver()
    fresh.feed(RecordsLoaded(records=(SessionRecord(KEY, tuple(driver.entries)),)))
    (round_,) = fresh.core.explain_session(EXPLAIN).rounds
    assert (round_.options, round_.chosen_index, round_.ttft_s, round_.usage) == ((), -1, None, USAGE)
    assert "not known" in round_.reason


# ------------------------------------------------------------------------------- with a profile


def profile() -> Profile:
    """A device that prefills 1,000 tokens/s and decodes in 10 ms, links of 1 MB/s: degrees 1 and 2."""
    return Profile(
        name="test-device",
        model="m",
        device="test",
        provenance={},
        max_context_tokens=10_000,
        vocab_size=100,
        kv_bytes_per_token=64,
        host_kv_bytes=0,
        links=Links(
            devices_per_node=8,
            intra_node_bytes_per_s=1e7,
            inter_node_bytes_per_s=1e6,
            host_bytes_per_s=1e6,
            latency_s=0.001,
        ),
        degrees=tuple(
            DegreeProfile(
                parallel_degree=degree,
                num_kv_tokens=1_000,
                linear=Curve(at=(0, 1_000), s=(0.01, 0.01 + 1.0 / degree)),
                prefill_attention=Grid(rows=(0, 1), columns=(0, 1), s=((0.0, 0.0), (0.0, 0.0))),
                decode_attention=Grid(rows=(0, 1), columns=(0, 1), s=((0.0, 0.0), (0.0, 0.0))),
            )
            for degree in (1, 2)
        ),
    )


def test_a_profile_speaks_for_the_workers_that_run_it() -> None:
    driver = Driver(profile=profile(), cost_scale=10.0)
    driver.beat("a", parallel_degree=2, profile="test-device", prefill_tokens_per_s=7.0)
    assert load_of(driver, "a").costs.prefill_s(0, 1_000) == pytest.approx(10 * (0.01 + 0.5))
    assert load_of(driver, "a").costs.link_bytes_per_s == pytest.approx(2e5)
    driver.beat("a", parallel_degree=2, profile="test-device", prefill_tokens_per_s=700.0, seq=1)
    assert load_of(driver, "a").costs.prefill_s(0, 1_000) == pytest.approx(10 * (0.01 + 0.5))
    for other in ({"profile": "another"}, {"parallel_degree": 3}):
        driver.beat("b", prefill_tokens_per_s=500.0, incarnation=len(driver.core.state.fleet.workers) + 1, **other)
        assert load_of(driver, "b").costs.prefill_s(0, 1_000) == pytest.approx(2.0, rel=0.1), other
    assert driver.core.describe_cluster(driver.now).counters["workers_off_profile"] == 1
