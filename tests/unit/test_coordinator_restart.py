"""What a coordinator that reads the records of the one before does with them."""

from __future__ import annotations

import pytest
from coordinator_driver import KEY, Driver, submit

from shared.core.commands import (
    PurgeRecord,
    Reply,
)
from shared.core.events import (
    CommandFailed,
    RecordsLoaded,
    SessionRecord,
)
from shared.core.types import SessionKey
from shared.errors import ErrorCode
from shared.messages import (
    Ack,
    CloseSession,
    DropSession,
    OpenSession,
    RunRound,
    unpack_token_ids,
)


@pytest.fixture
def driver() -> Driver:
    return Driver(policy="remote")


def restart(driver: Driver) -> Driver:
    fresh = Driver(policy="remote")
    fresh.now = driver.now + 1.0
    fresh.entries = list(driver.entries)
    fresh.feed(RecordsLoaded(records=(SessionRecord(KEY, tuple(driver.entries)),)))
    return fresh


def test_an_idle_session_goes_on_where_its_kv_is(driver: Driver) -> None:
    driver.open("d1", "d2")
    driver.play_round([1], [2])
    worker_id = driver.run.worker_id
    fresh = restart(driver)
    fresh.beat("d2" if worker_id == "d1" else "d1")
    request_id = fresh.ask(submit([3]))
    assert not fresh.take(Reply), "it waits for the worker that has its KV"
    fresh.beat(worker_id)
    (reply,) = fresh.take(Reply)
    assert (reply.request_id, reply.message.num_history_tokens) == (request_id, 2)
    (run,) = fresh.sent(RunRound)
    assert (run.worker_id, run.message.tokens_start) == (worker_id, 2)


def test_requests_wait_for_the_first_heartbeats_but_not_longer(driver: Driver) -> None:
    driver.open()
    driver.play_round([1], [2])
    fresh = restart(driver)
    fresh.ask(submit([3]))
    fresh.ask(OpenSession(), key=SessionKey("t", "new"))
    fresh.tick(2.5)
    assert not fresh.take(Reply)
    fresh.tick(1.0)
    assert [reply.message.code for reply in fresh.take(Reply)] == [ErrorCode.NO_DECODE_WORKER] * 2


@pytest.mark.parametrize("state", ["started", "running", "finished"])
def test_a_round_in_flight_is_asked_for_at_its_worker(driver: Driver, state: str) -> None:
    driver.open()
    driver.play_round([1], [2])
    driver.submit([3])
    driver.acknowledge_run()
    fresh = restart(driver)
    held = fresh.ask(submit([4]))
    fresh.beat("d")
    (fresh.run,) = fresh.sent(RunRound)
    assert (fresh.run.message.round, fresh.run.message.attempt) == (1, 1)
    assert unpack_token_ids(fresh.run.message.token_ids) == [3]
    fresh.acknowledge_run(state, output=[] if state == "started" else [8, 9])
    if state == "finished":
        assert not fresh.take(Reply)
        fresh.end([8, 9])
        (reply,) = fresh.take(Reply)
        assert (reply.request_id, reply.message.num_history_tokens) == (held, 5)
    else:
        assert fresh.one(Reply).message.code == ErrorCode.ROUND_IN_FLIGHT
        fresh.end([8, 9])
    assert fresh.core.state.sessions[KEY].num_tokens == 5


@pytest.mark.parametrize("gone", ["silent", "replaced"])
def test_a_round_whose_worker_is_gone_gets_the_next_attempt(driver: Driver, gone: str) -> None:
    driver.open("d1")
    driver.submit([3])
    fresh = restart(driver)
    fresh.beat("d2")
    if gone == "replaced":
        fresh.beat("d1", incarnation=2)
    else:
        fresh.tick(3.5, "d2")
    assert fresh.sent(RunRound)[0].message.attempt == 2


@pytest.mark.parametrize("worker_lives", [True, False])
def test_a_session_closed_just_before_is_dropped_and_purged(driver: Driver, worker_lives: bool) -> None:
    driver.open()
    driver.play_round([1], [2])
    driver.ask(CloseSession())
    fresh = restart(driver)
    assert not fresh.core.state.sessions
    if worker_lives:
        fresh.beat("d")
        (drop,) = fresh.sent(DropSession)
        fresh.reply(drop, Ack())
    else:
        fresh.tick(4.0)
        assert not fresh.take(PurgeRecord), "it may still come back"
        fresh.tick(fresh.core.state.config.worker_memory_s)
    assert fresh.one(PurgeRecord).key == KEY


@pytest.mark.parametrize("how", ["lost before", "lost while asked", "left before", "silent after the restart"])
def test_a_worker_that_comes_back_drops_a_session_closed_without_it(driver: Driver, how: str) -> None:
    driver.open("d1")
    driver.play_round([1], [2])
    workers = ["d2"] if how == "left before" else []
    if how in ("lost before", "left before"):
        driver.tick(4.0, *workers)
    if how == "left before":
        driver.play_round([3], [4])
        assert driver.run.worker_id == "d2"
    driver.ask(CloseSession())
    for drop in driver.sent(DropSession):
        if drop.worker_id == "d2":
            driver.reply(drop, Ack())
        elif how == "lost while asked":
            driver.feed(CommandFailed(command_id=drop.command_id, reason="no_responders"))
    assert not driver.take(PurgeRecord), "a coordinator that starts now must still find it"
    fresh = restart(driver)
    if how == "silent after the restart":
        fresh.tick(10.0)
    fresh.beat("d1")
    (drop,) = fresh.sent(DropSession)
    assert drop.worker_id == "d1"
    fresh.beat("d2", incarnation=2)  # another process: the one that had the session is gone for good
    fresh.reply(drop, Ack())
    fresh.tick(0.5)
    assert fresh.one(PurgeRecord).key == KEY
    assert not fresh.core.state.dropping


@pytest.mark.parametrize("gone", ["replaced", "forgotten"])
def test_a_worker_that_is_gone_for_good_owes_no_drop(driver: Driver, gone: str) -> None:
    driver.open()
    driver.play_round([1], [2])
    driver.tick(4.0)
    driver.ask(CloseSession())
    assert not driver.take(PurgeRecord)
    if gone == "replaced":
        driver.beat("d", incarnation=2)
        driver.tick(0.5)
    else:
        driver.tick(driver.core.state.config.worker_memory_s)
    assert driver.one(PurgeRecord).key == KEY
    assert not driver.core.state.owed_drops
    assert not driver.sent(DropSession)


def test_a_late_answer_does_not_settle_the_drop_of_a_later_life(driver: Driver) -> None:
    driver.open()
    driver.play_round([1], [2])
    driver.ask(CloseSession())
    (early,) = driver.sent(DropSession)
    driver.take(Reply)
    assert driver.answer(OpenSession()).session == "s"
    driver.play_round([1], [2])
    driver.tick(4.0)
    driver.ask(CloseSession())
    driver.reply(early, Ack())
    assert not driver.take(PurgeRecord)
    driver.beat("d")
    driver.reply(driver.sent(DropSession)[0], Ack())
    assert driver.one(PurgeRecord).key == KEY


def test_a_session_opened_again_keeps_the_record_from_being_purged(driver: Driver) -> None:
    driver.open()
    driver.play_round([1], [2])
    driver.ask(CloseSession())
    (drop,) = driver.sent(DropSession)
    assert driver.answer(OpenSession()).session == "s"
    driver.reply(drop, Ack())
    assert not driver.take(PurgeRecord)
    fresh = restart(driver)
    assert fresh.core.state.sessions[KEY].num_tokens == 0


def test_idempotency_keys_survive(driver: Driver) -> None:
    driver.open()
    driver.submit([1, 2], idempotency_key="k")
    driver.end([3])
    driver.submit([4], idempotency_key="l")
    fresh = restart(driver)
    assert fresh.answer(submit([1, 2], idempotency_key="k")).round == 0
    assert fresh.answer(submit([4], idempotency_key="l")).round == 1
    assert fresh.answer(submit([9], idempotency_key="k"), digest=b"y").code == ErrorCode.IDEMPOTENCY_CONFLICT
