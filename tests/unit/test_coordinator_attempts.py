"""What the coordinator does when an attempt or the record fails: events in, commands out."""

from __future__ import annotations

import pytest
from coordinator_driver import KEY, Driver, error, finished_message, submit, tokens_message

from shared.core.commands import (
    AcknowledgeEvent,
    AppendRecord,
    PublishStream,
    Reply,
)
from shared.core.events import (
    AppendFailed,
    CommandFailed,
    RecordAppended,
    Ticked,
    WorkerReported,
)
from shared.core.records import AttemptStartedEntry
from shared.errors import ErrorCode
from shared.messages import (
    DropSession,
    PrefillEnded,
    PrefillTask,
    RunRound,
    RunRoundAck,
    WorkerLeaving,
    unpack_token_ids,
)


@pytest.fixture
def driver() -> Driver:
    return Driver(policy="remote")


# --------------------------------------------------------------------------------------- attempts


def test_a_lost_decode_worker_is_replaced_and_what_was_seen_is_forced(driver: Driver) -> None:
    """But for its last token: the new worker draws it again, and ends the round if it is the end."""
    driver.open("d1")
    driver.play_round([1], [2])
    driver.beat("d2")
    driver.submit([3])
    driver.acknowledge_run()
    driver.stream(tokens_message(0, 8, 9, 10, round=1))
    driver.tick(4.0, "d2")
    (driver.run,) = driver.sent(RunRound)
    run = driver.run.message
    assert (driver.run.worker_id, run.attempt, run.tokens_start) == ("d2", 2, 0)
    assert (run.num_history_tokens, run.num_input_tokens, run.num_forced_tokens) == (2, 1, 2)
    assert unpack_token_ids(run.token_ids) == [1, 2, 3, 8, 9]
    started = driver.entries[-1]
    assert isinstance(started, AttemptStartedEntry)
    assert unpack_token_ids(started.forced_token_ids) == [8, 9]
    driver.beat("d1", seq=9)  # it was only slow: it must not keep the session
    assert [drop.worker_id for drop in driver.sent(DropSession)] == ["d1"]


def test_messages_of_an_older_attempt_are_ignored(driver: Driver) -> None:
    driver.open("d1", "d2")
    driver.submit([1])
    driver.acknowledge_run()
    old = driver.run
    driver.feed(CommandFailed(command_id=0, reason="timeout"))  # unknown: nothing
    driver.feed(WorkerReported(ack_id=900, report=WorkerLeaving(worker_id=old.worker_id, incarnation=1)))
    (driver.run,) = driver.sent(RunRound)
    driver.stream(tokens_message(0, 66, attempt=1))
    driver.end([66], attempt=1, worker_id=old.worker_id)
    assert driver.core.state.sessions[KEY].in_flight.output.token_ids == b""
    driver.reply(old, RunRoundAck(state="finished", num_cached_tokens=0, history=None, output_token_ids=b"1234"))
    assert driver.core.state.sessions[KEY].in_flight.output.token_ids == b""
    assert len(driver.take(AcknowledgeEvent)) == 2


def test_no_responders_means_lost_at_once(driver: Driver) -> None:
    driver.open("d1", "d2")
    driver.submit([1])
    driver.feed(CommandFailed(command_id=driver.run.command_id, reason="no_responders"))
    (run,) = driver.sent(RunRound)
    assert (run.worker_id, run.message.attempt) != (driver.run.worker_id, 1)
    assert run.message.attempt == 2


def test_time_outs_repeat_the_command_and_then_the_worker_is_suspect(driver: Driver) -> None:
    driver.open("d1", "d2")
    driver.submit([1])
    first = driver.run
    for _ in range(2):
        driver.feed(CommandFailed(command_id=driver.run.command_id, reason="timeout"))
        (driver.run,) = driver.sent(RunRound)
        assert (driver.run.worker_id, driver.run.message) == (first.worker_id, first.message)
    driver.feed(CommandFailed(command_id=driver.run.command_id, reason="timeout"))
    (driver.run,) = driver.sent(RunRound)
    assert driver.run.worker_id != first.worker_id
    assert driver.run.message.attempt == 2


def test_a_new_incarnation_under_the_same_id_means_the_old_one_is_lost(driver: Driver) -> None:
    driver.open("d")
    driver.submit([1])
    driver.acknowledge_run()
    driver.beat("d", incarnation=2)
    (run,) = driver.sent(RunRound)
    assert (run.message.incarnation, run.message.attempt, run.message.tokens_start) == (2, 2, 0)
    driver.beat("d", incarnation=1)  # late: of the dead process
    assert driver.core.state.fleet.workers["d"].incarnation == 2


@pytest.mark.parametrize("how", ["refused", "ended", "lost", "silent"])
def test_a_failed_remote_prefill_goes_elsewhere_and_then_local(driver: Driver, how: str) -> None:
    driver.open("d", "p1", "p2")
    driver.submit([1, 2])

    def fail_prefill() -> str:
        driver.acknowledge_run()
        (task,) = driver.sent(PrefillTask)
        if how == "refused":
            driver.reply(task, error(ErrorCode.OVERLOADED))
        elif how == "ended":
            ended = PrefillEnded(
                tenant="t",
                session="s",
                round=0,
                attempt=task.message.attempt,
                worker_id=task.worker_id,
                incarnation=1,
                error=error(ErrorCode.KV_TRANSFER_FAILED),
                num_new_tokens=2,
                queued_s=0,
                transfer_s=0,
                prefill_s=0,
                kv_bytes_read=0,
            )
            driver.feed(WorkerReported(ack_id=500, report=ended))
        elif how == "lost":
            driver.feed(CommandFailed(command_id=task.command_id, reason="no_responders"))
        else:
            for _ in range(3):
                driver.feed(CommandFailed(command_id=task.command_id, reason="timeout"))
                task = (driver.sent(PrefillTask) or [task])[0]
        driver.tick(0.5, "d")
        (driver.run,) = driver.sent(RunRound)
        return task.worker_id

    first = fail_prefill()
    assert driver.run.message.remote.worker_id != first
    second = fail_prefill()
    assert {first, second} == {"p1", "p2"}
    assert driver.run.message.remote is None
    assert driver.run.message.attempt == 3


def test_a_prefill_worker_lost_after_the_first_token_costs_nothing(driver: Driver) -> None:
    driver.open("d", "p")
    driver.submit([1])
    driver.acknowledge_run()
    driver.sent(PrefillTask)
    driver.stream(tokens_message(0, 5))
    driver.tick(4.0, "d")
    assert not driver.core.state.fleet.workers["p"].alive
    assert not driver.sent(RunRound)


def test_attempts_are_bounded(driver: Driver) -> None:
    driver.open()
    driver.submit([1])
    attempts = 1
    while driver.core.state.num_rounds_in_flight:
        driver.acknowledge_run()
        driver.end([], error=error(ErrorCode.OUT_OF_BLOCKS))
        driver.tick(3.0, "d")
        for run in driver.sent(RunRound):
            driver.run, attempts = run, attempts + 1
    assert attempts == 5
    assert driver.one(PublishStream).message.error.code == ErrorCode.OUT_OF_BLOCKS


def test_without_any_decode_worker_the_round_waits_for_one() -> None:
    driver = Driver(no_worker_patience_s=10.0)
    driver.open("d1")
    driver.submit([1])
    driver.acknowledge_run()
    driver.tick(5.0)
    assert not driver.sent(RunRound)
    driver.beat("d2")
    driver.tick(0.5, "d2")
    assert driver.sent(RunRound)[0].worker_id == "d2"
    driver.tick(20.0)
    assert driver.one(PublishStream).message.error.code == ErrorCode.NO_DECODE_WORKER


def test_a_finished_round_whose_worker_dies_is_not_run_again(driver: Driver) -> None:
    driver.open("d1", "d2")
    driver.submit([1])
    driver.acknowledge_run()
    driver.stream(tokens_message(0, 5), finished_message(1))
    driver.tick(4.0)
    assert not driver.sent(RunRound)
    assert driver.core.state.sessions[KEY].num_tokens == 2


def test_a_coordinator_that_stood_still_does_not_blame_the_workers(driver: Driver) -> None:
    driver.open()
    driver.feed(Ticked())
    driver.now += 20.0
    driver.feed(Ticked())
    assert driver.core.state.fleet.workers["d"].alive
    driver.tick(3.5)
    assert not driver.core.state.fleet.workers["d"].alive


def test_an_earlier_session_of_the_same_name_is_dropped_at_the_worker(driver: Driver) -> None:
    driver.open()
    driver.submit([1])
    driver.reply(driver.run, error(ErrorCode.STALE_ATTEMPT))
    (drop,) = driver.sent(DropSession)
    (run,) = driver.sent(RunRound)
    assert (drop.worker_id, run.message.attempt, run.message.tokens_start) == ("d", 2, 0)


# ------------------------------------------------------------------------------------- the record


def test_a_record_that_is_not_ours_takes_the_session_away(driver: Driver) -> None:
    driver.open()
    driver.appends = False
    request_id = driver.ask(submit([1]))
    append = driver.one(AppendRecord)
    driver.feed(AppendFailed(key=KEY, append_id=append.append_id, code=ErrorCode.NOT_OWNER, message="other"))
    (reply,) = driver.take(Reply)
    assert (reply.request_id, reply.message.code) == (request_id, ErrorCode.NOT_OWNER)
    assert KEY not in driver.core.state.sessions
    assert not driver.commands, "the new owner's worker is left alone"


def test_a_round_that_cannot_be_recorded_is_refused_and_ends(driver: Driver) -> None:
    driver.open()
    driver.appends = False
    driver.ask(submit([1]))
    append = driver.one(AppendRecord)
    failed = AppendFailed(key=KEY, append_id=append.append_id, code=ErrorCode.BUS_UNAVAILABLE, message="down")
    driver.feed(failed)
    assert driver.one(Reply).message.code == ErrorCode.BUS_UNAVAILABLE
    assert driver.core.state.num_rounds_in_flight == 0
    driver.appends = True
    driver.tick(1.0, "d")
    kinds = [type(entry).__name__ for entry in driver.entries[1:]]
    assert kinds == ["RoundStartedEntry", "RoundEndedEntry"], "what memory has reaches the record"
    assert not driver.sent(RunRound)
    driver.submit([2])


def test_the_end_of_a_round_is_appended_until_it_is_recorded(driver: Driver) -> None:
    driver.open()
    driver.submit([1])
    driver.acknowledge_run()
    driver.appends = False
    ack_id = driver.end([5])
    for _ in range(3):
        append = driver.one(AppendRecord)
        failed = AppendFailed(key=KEY, append_id=append.append_id, code=ErrorCode.BUS_UNAVAILABLE, message="down")
        driver.feed(failed)
        assert not driver.take(AcknowledgeEvent)
        driver.tick(0.5, "d")
    append = driver.one(AppendRecord)
    driver.feed(RecordAppended(key=KEY, append_id=append.append_id))
    assert driver.one(AcknowledgeEvent).ack_id == ack_id
