"""The coordinator's core: sessions that move to another decode worker, and what it believes of their KV."""

from __future__ import annotations

from typing import Any

import pytest
from coordinator_driver import KEY, Driver, error, source, submit, tokens_message
from moving_policy import MIXED, MOVING, configure

from shared.core.commands import AcknowledgeEvent, AppendRecord, SendToWorker
from shared.core.coordinator import Coordinator
from shared.core.events import CommandFailed, RecordAppended, RecordsLoaded, SessionRecord
from shared.core.policies import SchedulingPolicy
from shared.core.records import WorkerRef
from shared.core.routing import route_colocated
from shared.core.session import HeldKv, Session
from shared.errors import ErrorCode
from shared.messages import (
    Ack,
    CancelRound,
    CancelRun,
    CloseSession,
    DropSession,
    ExplainSession,
    GrantHistory,
    HistoryGranted,
    KvHeld,
    NeedTokens,
    PrefillTask,
    RunRound,
    RunRoundAck,
)


def drive(policy: SchedulingPolicy = MOVING) -> Driver:
    driver = Driver()
    driver.core = Coordinator(configure(policy))
    return driver


@pytest.fixture
def driver() -> Driver:
    """Two decode workers, the session at d1 with 12 tokens, of which the last has no KV; a second round goes to d2."""
    driver = drive()
    driver.open("d1", "d2")
    driver.play_round([1, 2, 3, 4], [5] * 8)
    assert driver.run.worker_id == "d1"
    driver.ask(submit([6, 7]))
    return driver


def session_of(driver: Driver) -> Session:
    return driver.core.state.sessions[KEY]


def bound_to(driver: Driver) -> str:
    binding = session_of(driver).binding
    assert binding is not None
    return binding.worker.worker_id


def counter(driver: Driver, name: str) -> int:
    return driver.core.state.counters[name]


def grant(driver: Driver, num_tokens: int = 11) -> SendToWorker:
    (command,) = driver.sent(GrantHistory)
    driver.reply(command, HistoryGranted(num_tokens=num_tokens, history=source("d1")))
    return command


def start(driver: Driver, cached: int = 11) -> RunRound:
    (driver.run,) = driver.sent(RunRound)
    driver.acknowledge_run(cached=cached)
    assert isinstance(driver.run.message, RunRound)
    return driver.run.message


# ------------------------------------------------------------------------------- the way of a move


def test_the_kv_is_asked_for_before_the_round_runs_and_dropped_after_its_first_token(driver: Driver) -> None:
    (command,) = driver.sent(GrantHistory)
    assert (command.worker_id, command.message.hold, command.message.num_tokens) == ("d1", True, 12)
    assert command.timeout_s == 1.0
    assert not driver.sent(RunRound)
    driver.reply(command, HistoryGranted(num_tokens=11, history=source("d1")))
    run = start(driver)
    assert (driver.run.worker_id, run.num_source_tokens, run.source, run.remote) == ("d2", 11, source("d1"), None)
    assert (run.tokens_start, len(run.token_ids)) == (0, 4 * 14), "it knows nothing of the session"
    assert not driver.sent(DropSession)
    driver.stream(tokens_message(0, 9, round=1))
    (drop,) = driver.sent(DropSession)
    assert drop.worker_id == "d1"
    explained = driver.core.explain_session(ExplainSession(tenant=KEY.tenant, session=KEY.session))
    assert [(one.worker_id, one.moves_session) for one in explained.rounds] == [("d1", False), ("d2", True)]
    driver.end([9, 9])
    assert not driver.sent(DropSession)
    assert (bound_to(driver), counter(driver, "moves"), session_of(driver).held) == ("d2", 1, HeldKv(15))


def test_a_move_is_recorded_before_anybody_is_told(driver: Driver) -> None:
    driver = drive()
    driver.open("d1", "d2")
    driver.play_round([1, 2, 3], [4])
    driver.appends = False
    driver.ask(submit([5]))
    assert not driver.sent(GrantHistory)
    append = driver.one(AppendRecord)
    assert append.entry.decode == WorkerRef("d2", 1)
    driver.appends = True
    driver.feed(RecordAppended(key=KEY, append_id=append.append_id))
    assert driver.sent(GrantHistory)


def test_the_end_of_the_round_drops_the_old_worker_when_no_token_was_seen(driver: Driver) -> None:
    grant(driver)
    start(driver)
    driver.end([9])
    assert [drop.worker_id for drop in driver.sent(DropSession)] == ["d1"]


def test_a_session_with_nothing_to_take_along_is_bound_anew(driver: Driver) -> None:
    driver = drive()
    driver.open("d1", "d2")
    driver.play_round([1, 2, 3], [4])
    driver.beat("d1", seq=1, kv_held=(KvHeld(tenant="t", session="s", num_device_tokens=0),))
    driver.submit([5])
    assert (driver.run.worker_id, driver.run.message.source) == ("d2", None)
    assert [drop.worker_id for drop in driver.sent(DropSession)] == ["d1"]


@pytest.mark.parametrize("what", ["refused", "silent", "gone", "lost before"])
def test_without_the_kv_the_round_runs_all_the_same(driver: Driver, what: str) -> None:
    (command,) = driver.sent(GrantHistory)
    match what:
        case "refused":
            driver.reply(command, error(ErrorCode.KV_LEASE_INVALID))
        case "silent":
            driver.feed(CommandFailed(command_id=command.command_id, reason="timeout"))
        case "gone":
            driver.feed(CommandFailed(command_id=command.command_id, reason="no_responders"))
        case _:
            driver.tick(4.0, "d2")
            driver.feed(CommandFailed(command_id=command.command_id, reason="timeout"))
    run = start(driver, cached=0)
    assert (driver.run.worker_id, run.source, run.num_source_tokens, run.attempt) == ("d2", None, 0, 1)
    assert counter(driver, "moves_without_kv") == 1
    driver.end([9])
    drops = [drop.worker_id for drop in driver.sent(DropSession)]
    assert drops == ([] if what in ("gone", "lost before") else ["d1"])
    owed = driver.core.state.owed_drops
    assert owed == ({WorkerRef("d1", 1): {KEY}} if what in ("gone", "lost before") else {})


def test_a_late_grant_changes_nothing(driver: Driver) -> None:
    (command,) = driver.sent(GrantHistory)
    driver.feed(CommandFailed(command_id=command.command_id, reason="timeout"))
    start(driver, cached=0)
    driver.reply(command, HistoryGranted(num_tokens=11, history=source("d1")))
    assert not driver.sent(RunRound)


def test_a_worker_that_asks_for_tokens_gets_the_same_source_again(driver: Driver) -> None:
    grant(driver)
    (driver.run,) = driver.sent(RunRound)
    driver.core.state.sessions[KEY].binding.num_known_tokens = 12  # as if it had been here before
    run = driver.run.message
    driver.core.state.pending[driver.run.command_id].message = type(run)(
        **{name: getattr(run, name) for name in run.__struct_fields__} | {"tokens_start": 12}
    )
    driver.reply(driver.run, NeedTokens(num_known_tokens=3))
    assert not driver.sent(GrantHistory)
    (driver.run,) = driver.sent(RunRound)
    assert (driver.run.message.tokens_start, driver.run.message.source) == (3, source("d1"))


# ------------------------------------------------------------------------------- moves that fail


def test_a_move_that_fails_before_its_first_token_is_undone(driver: Driver) -> None:
    grant(driver)
    start(driver)
    driver.end([], error=error(ErrorCode.OUT_OF_BLOCKS))
    assert [drop.worker_id for drop in driver.sent(DropSession)] == ["d2"]
    (driver.run,) = driver.sent(RunRound)
    assert (driver.run.worker_id, driver.run.message.attempt, driver.run.message.tokens_start) == ("d1", 2, 12)
    decision = session_of(driver).in_flight.decision
    assert decision.chosen.num_new_tokens == 3, "its KV is there"
    assert (bound_to(driver), counter(driver, "moves_undone")) == ("d1", 1)
    driver.acknowledge_run(cached=11)
    driver.end([9])
    assert not driver.sent(DropSession)


@pytest.mark.parametrize("when", ["asking", "starting", "prefilling"])
def test_when_the_new_worker_dies_the_session_is_back_where_its_kv_is(driver: Driver, when: str) -> None:
    if when == "asking":
        (command,) = driver.sent(GrantHistory)
    else:
        grant(driver)
        (driver.run,) = driver.sent(RunRound)
        if when == "prefilling":
            driver.acknowledge_run(cached=11)
    driver.tick(4.0, "d1")
    (driver.run,) = driver.sent(RunRound)
    assert (driver.run.worker_id, driver.run.message.attempt) == ("d1", 2)
    if when == "asking":
        driver.reply(command, HistoryGranted(num_tokens=11, history=source("d1")))
        assert not driver.sent(RunRound), "out of date"
    driver.beat("d2")
    assert [drop.worker_id for drop in driver.sent(DropSession)] == ["d2"], "if it comes back"


def test_when_both_die_the_round_runs_elsewhere(driver: Driver) -> None:
    grant(driver)
    start(driver)
    driver.beat("d3")
    driver.tick(4.0, "d3")
    (driver.run,) = driver.sent(RunRound)
    assert (driver.run.worker_id, driver.run.message.source) == ("d3", None)
    assert KEY in driver.core.state.owed_drops[WorkerRef("d1", 1)]


def test_after_the_first_token_there_is_no_way_back(driver: Driver) -> None:
    grant(driver)
    start(driver)
    driver.stream(tokens_message(0, 9, round=1))
    driver.sent(DropSession)
    driver.tick(4.0, "d1")
    (driver.run,) = driver.sent(RunRound)
    assert (driver.run.worker_id, driver.run.message.tokens_start) == ("d1", 0)
    assert counter(driver, "moves_undone") == 0


@pytest.mark.parametrize("when", ["asking", "running"])
def test_a_cancelled_round_leaves_the_session_where_its_kv_is(driver: Driver, when: str) -> None:
    if when == "asking":
        (command,) = driver.sent(GrantHistory)
    else:
        grant(driver)
        start(driver)
    driver.ask(CancelRound())
    (cancel,) = driver.sent(CancelRun)
    assert cancel.worker_id == "d2"
    driver.reply(cancel, Ack())
    assert (bound_to(driver), session_of(driver).held) == ("d1", HeldKv(11))
    assert [drop.worker_id for drop in driver.sent(DropSession)] == ["d2"]
    if when == "asking":
        driver.reply(command, HistoryGranted(num_tokens=11, history=source("d1")))
        assert not driver.sent(RunRound)


def test_closing_in_the_middle_of_a_move_drops_at_both(driver: Driver) -> None:
    grant(driver)
    start(driver)
    driver.ask(CloseSession())
    driver.reply(driver.sent(CancelRun)[0], Ack())
    assert sorted(drop.worker_id for drop in driver.sent(DropSession)) == ["d1", "d2"]


@pytest.mark.parametrize("had_it", [True, False])
def test_a_restart_in_the_middle_of_a_move(driver: Driver, had_it: bool) -> None:
    """The record knows the new worker: it is asked, runs the round with what it has, and the old one drops it."""
    grant(driver)
    driver.sent(RunRound)
    fresh = drive()
    fresh.feed(RecordsLoaded(records=(SessionRecord(KEY, tuple(driver.entries)),)))
    fresh.beat("d1")
    fresh.beat("d2")
    assert [drop.worker_id for drop in fresh.sent(DropSession)] == ["d1"]
    assert not fresh.sent(GrantHistory)
    (fresh.run,) = fresh.sent(RunRound)
    assert (fresh.run.worker_id, fresh.run.message.attempt, fresh.run.message.source) == ("d2", 1, None)
    if not had_it:
        fresh.reply(fresh.run, NeedTokens(num_known_tokens=0))
        (fresh.run,) = fresh.sent(RunRound)
        assert fresh.run.message.tokens_start == 0
    fresh.acknowledge_run(state="running" if had_it else "started", cached=11 if had_it else 0)
    ack_id = fresh.end([9])
    assert fresh.one(AcknowledgeEvent).ack_id == ack_id
    assert session_of(fresh).held == HeldKv(14)


# --------------------------------------------------------------------------- what is known of the KV


def view_of(driver: Driver, tokens: list[int], policy_seen: list[Any]) -> Any:
    driver.submit(tokens)
    return policy_seen[-1]


@pytest.fixture
def watched() -> tuple[Driver, list[Any]]:
    """A coordinator whose policy keeps every round where it is, and remembers the views that it was shown."""
    views: list[Any] = []

    def route(view: Any, parameters: Any) -> Any:
        views.append(view)
        return route_colocated(view, parameters)

    driver = drive(SchedulingPolicy(name="watched", route=route, moves_sessions=True, keeps_resident=True))
    driver.open("d1", "d2")
    driver.play_round([1, 2, 3, 4], [5] * 8)
    return driver, views


def test_routing_is_told_what_is_in_the_pool_and_what_in_host_memory(watched: Any) -> None:
    driver, views = watched
    driver.beat("d1", seq=1, kv_held=(KvHeld(tenant="t", session="s", num_device_tokens=4, num_host_tokens=5),))
    view = view_of(driver, [6], views)
    assert (view.num_cached_tokens, view.num_restorable_tokens, view.num_new_tokens) == (4, 9, 4)
    assert view.num_needed_tokens == 12 + 1 + 10
    assert [load.worker_id for load in view.movable] == ["d2"]
    driver.acknowledge_run(cached=9)
    driver.end([7])
    view = view_of(driver, [8], views)
    assert (view.num_cached_tokens, view.num_restorable_tokens) == (13, 13)


def test_a_worker_cannot_be_believed_to_hold_more_than_there_is(watched: Any) -> None:
    driver, views = watched
    driver.beat("d1", seq=1, kv_held=(KvHeld(tenant="t", session="s", num_device_tokens=10**9, num_host_tokens=-3),))
    assert session_of(driver).held == HeldKv(12)
    driver.beat("d2", seq=1, kv_held=(KvHeld(tenant="t", session="s", num_device_tokens=9),))
    assert session_of(driver).held == HeldKv(12), "another worker's word about its own"
    assert view_of(driver, [6], views).num_new_tokens == 1


def test_a_worker_without_room_or_with_another_layout_is_not_moved_to(watched: Any) -> None:
    driver, views = watched
    driver.beat("d2", seq=1, num_blocks=1)
    driver.beat("d3", layout_hash="other")
    driver.beat("d4", draining=True)
    driver.beat("p")
    assert view_of(driver, [6], views).movable == []


def test_a_session_that_must_leave_takes_its_kv_along(watched: Any) -> None:
    driver, _ = watched
    driver.beat("d1", seq=1, draining=True)
    driver.ask(submit([6]))
    assert [command.worker_id for command in driver.sent(GrantHistory)] == ["d1"]
    assert bound_to(driver) == "d2"


def test_what_a_new_worker_has_kept_of_a_prefill_counts(watched: Any) -> None:
    driver, views = watched
    driver.core.state.sessions[KEY].resident[WorkerRef("d2", 1)] = 8
    driver.tick(4.0, "d2")
    view = view_of(driver, [6], views)
    assert (driver.run.worker_id, view.num_cached_tokens) == ("d2", 8)
    assert session_of(driver).held == HeldKv(8)


def test_remote_prefills_and_moves_of_one_session() -> None:
    """A holder that the session moves to is a holder no more; the worker that it leaves is none either."""
    driver = drive(MIXED)
    driver.beat("d1")
    driver.beat("b", role="both", num_blocks=90)
    driver.open("d1")
    driver.play_round([1, 2], [3])
    driver.play_remote_round([4, 5, 6], [7], cached=2, resident=6)
    assert session_of(driver).resident == {WorkerRef("b", 1): 6}
    driver.sent(GrantHistory)
    driver.ask(submit([8]))
    (command,) = driver.sent(GrantHistory)
    driver.reply(command, HistoryGranted(num_tokens=6, history=source("d1")))
    start(driver, cached=6)
    assert (bound_to(driver), session_of(driver).resident) == ("b", {})
    driver.end([9])
    assert [drop.worker_id for drop in driver.sent(DropSession)] == ["d1"]
    assert not driver.sent(PrefillTask)


def test_acknowledgements_are_clipped_to_the_conversation(driver: Driver) -> None:
    grant(driver)
    (driver.run,) = driver.sent(RunRound)
    driver.reply(driver.run, RunRoundAck(state="started", num_cached_tokens=10**6, history=None))
    assert session_of(driver).held == HeldKv(14)
