"""How sessions are opened, bound and closed: events in, commands out."""

from __future__ import annotations

import pytest
from coordinator_driver import KEY, Driver, source, submit

from shared.core.commands import (
    PurgeRecord,
)
from shared.core.events import (
    CommandFailed,
)
from shared.core.types import SessionKey
from shared.errors import ErrorCode
from shared.messages import (
    Ack,
    CancelRound,
    ClientRequest,
    CloseSession,
    DropSession,
    InspectSession,
    NeedTokens,
    OpenSession,
    PrefillTask,
    ReadRound,
    RunRound,
    Slo,
    unpack_token_ids,
)


@pytest.fixture
def driver() -> Driver:
    return Driver(policy="remote")


# --------------------------------------------------------------------------------------- sessions


def test_open_needs_a_decode_worker(driver: Driver) -> None:
    driver.beat("p")
    refused = driver.answer(OpenSession())
    assert (refused.code, refused.retry_after_s) == (ErrorCode.NO_DECODE_WORKER, 3.0)
    driver.beat("d")
    opened = driver.answer(OpenSession())
    assert (opened.model, opened.max_context_tokens, opened.vocab_size) == ("m", 1000, 100)


def test_open_again_succeeds_only_with_equal_options(driver: Driver) -> None:
    driver.open()
    assert driver.answer(OpenSession()).session == "s"
    assert driver.answer(OpenSession(slo=Slo(ttft_s=1.0))).code == ErrorCode.SESSION_EXISTS


@pytest.mark.parametrize(
    "request_",
    [
        OpenSession(slo=Slo(ttft_s=0.0)),
        OpenSession(slo=Slo(itl_s=float("nan"))),
        OpenSession(idle_timeout_s=0.0),
        OpenSession(idle_timeout_s=float("inf")),
    ],
)
def test_open_checks_its_options(driver: Driver, request_: OpenSession) -> None:
    driver.beat("d")
    assert driver.answer(request_).code == ErrorCode.INVALID_REQUEST


def test_sessions_are_bounded_in_all_and_for_a_tenant() -> None:
    driver = Driver(max_sessions=2, max_sessions_per_tenant=1)
    driver.open()
    assert driver.answer(OpenSession(), key=SessionKey("t", "s2")).code == ErrorCode.OVERLOADED
    assert driver.answer(OpenSession(), key=SessionKey("t2", "s")).session == "s"
    refused = driver.answer(OpenSession(), key=SessionKey("t3", "s"))
    assert refused.code == ErrorCode.OVERLOADED
    assert refused.retry_after_s is not None


@pytest.mark.parametrize("request_", [submit([1]), CancelRound(), CloseSession(), InspectSession(), ReadRound(round=0)])
def test_an_unknown_session_is_named(driver: Driver, request_: ClientRequest) -> None:
    refused = driver.answer(request_)
    assert refused.code == ErrorCode.UNKNOWN_SESSION
    assert "'s'" in refused.message


def test_idle_sessions_are_closed(driver: Driver) -> None:
    driver.beat("d")
    driver.answer(OpenSession(idle_timeout_s=5.0))
    driver.play_round([1], [2])
    driver.tick(4.5, "d")
    assert KEY in driver.core.state.sessions
    driver.tick(1.0, "d")
    assert KEY not in driver.core.state.sessions
    assert len(driver.sent(DropSession)) == 1


def test_close_drops_the_session_at_its_worker_and_frees_its_memory(driver: Driver) -> None:
    driver.open()
    driver.play_round([1], [2])
    closed = driver.answer(CloseSession())
    assert closed.num_rounds == 1
    (drop,) = driver.sent(DropSession)
    assert not driver.take(PurgeRecord), "a coordinator that starts now must still find it"
    driver.reply(drop, Ack())
    assert driver.one(PurgeRecord).key == KEY
    state = driver.core.state
    assert not state.sessions
    assert not state.pending
    assert not state.sessions_of_tenant
    assert state.fleet.workers["d"].load.num_promised_tokens == 0
    assert driver.answer(CloseSession()).code == ErrorCode.UNKNOWN_SESSION


def test_an_unanswered_drop_is_repeated_and_then_owed_to_the_worker(driver: Driver) -> None:
    driver.open()
    driver.play_round([1], [2])
    driver.ask(CloseSession())
    for _ in range(3):
        (drop,) = driver.sent(DropSession)
        driver.feed(CommandFailed(command_id=drop.command_id, reason="timeout"))
    assert not driver.sent(DropSession)
    driver.beat("d")
    assert len(driver.sent(DropSession)) == 1


# ---------------------------------------------------------------------------- binding and routing


def test_sessions_are_bound_by_free_memory_counting_what_is_promised(driver: Driver) -> None:
    driver.beat("d1")
    driver.beat("d2", num_blocks=90, num_free_blocks=90)
    bound = []
    for number in range(4):
        key = SessionKey("t", f"s{number}")
        driver.answer(OpenSession(), key=key)
        driver.answer(submit([1] * 100, max_output=100), key=key)
        bound.append(driver.sent(RunRound)[0].worker_id)
    assert bound == ["d1", "d2", "d1", "d2"]


def test_a_binding_sticks_and_only_new_tokens_travel(driver: Driver) -> None:
    driver.open("d1")
    driver.play_round([1, 2], [3, 4])
    driver.beat("d2", num_blocks=1000)
    run = driver.submit([5])
    assert (driver.run.worker_id, run.tokens_start, run.num_history_tokens) == ("d1", 4, 4)
    assert unpack_token_ids(run.token_ids) == [5]


def test_a_worker_that_lacks_tokens_gets_them(driver: Driver) -> None:
    driver.open()
    driver.play_round([1, 2], [3, 4])
    driver.submit([5])
    driver.reply(driver.run, NeedTokens(num_known_tokens=1))
    (driver.run,) = driver.sent(RunRound)
    assert driver.run.message.tokens_start == 1
    assert unpack_token_ids(driver.run.message.token_ids) == [2, 3, 4, 5]
    assert driver.run.message.attempt == 1


def test_a_worker_that_asks_for_what_it_was_sent_costs_an_attempt(driver: Driver) -> None:
    driver.open()
    driver.submit([5])
    driver.reply(driver.run, NeedTokens(num_known_tokens=0))
    assert driver.sent(RunRound)[0].message.attempt == 2


READS_HISTORY = {"routing.reads_history": True, "keeps_resident": False}


def test_a_remote_prefill_gets_what_is_not_cached() -> None:
    driver = Driver(policy="remote", policy_options=READS_HISTORY)
    driver.open("d", "p")
    driver.submit([1, 2])
    driver.acknowledge_run()
    (task,) = driver.sent(PrefillTask)
    assert (task.worker_id, task.message.num_cached_tokens, task.message.history) == ("p", 0, None)
    assert unpack_token_ids(task.message.token_ids) == [1, 2]
    driver.end([3, 4])
    run = driver.submit([5, 6])
    assert run.remote.worker_id == "p"
    driver.acknowledge_run(cached=3)
    (task,) = driver.sent(PrefillTask)
    assert task.message.history == source("d")
    assert (task.message.num_cached_tokens, unpack_token_ids(task.message.token_ids)) == (3, [4, 5, 6])
    assert (task.message.decode_worker, task.message.decode_incarnation) == ("d", 1)


def test_at_least_one_token_is_computed() -> None:
    driver = Driver(policy="remote", policy_options=READS_HISTORY)
    driver.open("d", "p")
    driver.submit([1, 2])
    driver.acknowledge_run(cached=2)
    (task,) = driver.sent(PrefillTask)
    assert (task.message.num_cached_tokens, unpack_token_ids(task.message.token_ids)) == (1, [2])


def test_a_local_prefill_needs_nothing_else(driver: Driver) -> None:
    driver.open("d")
    assert driver.submit().remote is None
    driver.acknowledge_run()
    assert not driver.sent(PrefillTask)


def test_prefill_workers_with_another_kv_layout_are_not_used(driver: Driver) -> None:
    driver.open("d")
    driver.beat("p", layout_hash="other")
    assert driver.submit().remote is None


def test_draining_workers_get_nothing_new(driver: Driver) -> None:
    driver.open("d1", "d2", "p")
    driver.play_round([1], [2])
    first = driver.run.worker_id
    driver.beat(first, draining=True, seq=1)
    driver.beat("p", draining=True, seq=1)
    run = driver.submit([3])
    assert driver.run.worker_id != first
    assert run.remote is None
    assert (run.tokens_start, unpack_token_ids(run.token_ids)) == (0, [1, 2, 3])
    assert [drop.worker_id for drop in driver.sent(DropSession)] == [first]


def test_prefills_routed_since_the_heartbeat_count(driver: Driver) -> None:
    driver.open("d", "p1", "p2")
    targets = []
    for number in range(4):
        key = SessionKey("t", f"s{number}")
        driver.answer(OpenSession(), key=key)
        driver.answer(submit([1] * 10), key=key)
        targets.append(driver.sent(RunRound)[0].message.remote.worker_id)
    assert targets == ["p1", "p2", "p1", "p2"]
