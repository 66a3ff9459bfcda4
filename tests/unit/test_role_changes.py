"""The coordinator's core: workers that take another role, and what becomes of the sessions that they have."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from coordinator_driver import KEY, Driver, error, source, submit, tokens_message
from moving_policy import configure

from shared.core.commands import AppendRecord, Command, Reply, SendToWorker
from shared.core.coordinator import Coordinator
from shared.core.events import (
    CommandFailed,
    Event,
    RecordAppended,
    RecordsLoaded,
    RoleRequested,
    SessionRecord,
    Ticked,
)
from shared.core.policies import SchedulingPolicy
from shared.core.records import AttemptStartedEntry, RoundStartedEntry, WorkerRef
from shared.core.routing import route_colocated, route_remote
from shared.errors import ErrorCode
from shared.messages import (
    Ack,
    ChangeRole,
    DropSession,
    ErrorReply,
    GrantHistory,
    HistoryGranted,
    OpenSession,
    PrefillTask,
    Role,
    RoleChanged,
    RunRound,
    SetRole,
    WorkerStatus,
)

STAYING = SchedulingPolicy(name="staying", route=route_colocated, moves_sessions=True)
ALL_REMOTE = SchedulingPolicy(name="all remote", route=route_remote, moves_sessions=True)


def drive(*workers: str, policy: SchedulingPolicy | str = "ampd", **config: Any) -> Driver:
    driver = Driver(policy=policy, **config) if isinstance(policy, str) else Driver(**config)
    if not isinstance(policy, str):
        driver.core = Coordinator(configure(policy))
    for worker_id in workers:
        driver.beat(worker_id)
    return driver


def ask(driver: Driver, worker_id: str, role: Role) -> int:
    driver.num_ids += 1
    driver.feed(RoleRequested(request_id=driver.num_ids, request=ChangeRole(worker_id=worker_id, role=role)))
    return driver.num_ids


def answers(driver: Driver) -> dict[int, Any]:
    return {reply.request_id: reply.message for reply in driver.take(Reply)}


def refused(driver: Driver, worker_id: str, role: Role) -> ErrorReply:
    request_id = ask(driver, worker_id, role)
    message = answers(driver)[request_id]
    assert isinstance(message, ErrorReply)
    assert not driver.sent(SetRole)
    return message


def begin(driver: Driver, worker_id: str, role: Role) -> SendToWorker:
    """The change is under way; the command that was sent."""
    ask(driver, worker_id, role)
    (command,) = driver.sent(SetRole)
    assert (command.worker_id, command.message) == (worker_id, SetRole(incarnation=1, role=role))
    return command


def change(driver: Driver, worker_id: str, role: Role, seq: int = 1) -> None:
    """From the request to the heartbeat that tells the new role."""
    driver.reply(begin(driver, worker_id, role), Ack())
    driver.beat(worker_id, role=role, seq=seq)
    assert driver.core.state.fleet.workers[worker_id].change is None
    assert [type(message) for message in answers(driver).values()] == [RoleChanged]


def role_of(driver: Driver, worker_id: str) -> str:
    return driver.core.state.fleet.workers[worker_id].load.role


def status_of(driver: Driver, worker_id: str) -> WorkerStatus:
    return next(w for w in driver.core.describe_cluster(driver.now).workers if w.heartbeat.worker_id == worker_id)


def counter(driver: Driver, name: str) -> int:
    return driver.core.state.counters[name]


# --------------------------------------------------------------------------------- the way of a change


def test_the_new_role_counts_at_once_and_late_heartbeats_do_not_undo_it() -> None:
    driver = drive("d1", "d2")
    command = begin(driver, "d1", "prefill")
    assert (role_of(driver, "d1"), status_of(driver, "d1").wanted_role) == ("prefill", "prefill")
    assert status_of(driver, "d1").heartbeat.role == "decode"
    driver.beat("d1", seq=1)
    assert role_of(driver, "d1") == "prefill"
    assert not answers(driver)
    driver.reply(command, Ack())
    assert list(answers(driver).values()) == [RoleChanged(worker_id="d1", role="prefill", previous="decode")]
    driver.beat("d1", seq=2)
    assert role_of(driver, "d1") == "prefill", "sent before the worker had heard of it"
    driver.beat("d1", seq=3, role="prefill")
    assert (status_of(driver, "d1").wanted_role, role_of(driver, "d1")) == (None, "prefill")
    driver.beat("d1", seq=4, role="both")
    assert role_of(driver, "d1") == "both", "heartbeats count again"


def test_a_heartbeat_that_tells_the_role_answers_before_the_acknowledgement_does() -> None:
    driver = drive("d1", "d2")
    command = begin(driver, "d1", "both")
    driver.beat("d1", seq=1, role="both")
    assert list(answers(driver).values()) == [RoleChanged(worker_id="d1", role="both", previous="decode")]
    driver.reply(command, Ack())
    assert not answers(driver)


def test_the_same_change_again_is_the_same_answer() -> None:
    driver = drive("d1", "d2")
    command = begin(driver, "d1", "prefill")
    again = ask(driver, "d1", "prefill")
    assert not driver.sent(SetRole)
    driver.reply(command, Ack())
    assert set(answers(driver).values()) == {RoleChanged(worker_id="d1", role="prefill", previous="decode")}
    after = ask(driver, "d1", "prefill")
    assert answers(driver)[after].previous == "decode", "no heartbeat has told it yet"
    driver.beat("d1", seq=1, role="prefill")
    settled = ask(driver, "d1", "prefill")
    assert answers(driver)[settled] == RoleChanged(worker_id="d1", role="prefill", previous="prefill")
    assert again < after < settled
    assert counter(driver, "role_changes") == 1


def test_requests_that_wait_for_a_change_are_bounded() -> None:
    driver = drive("d1", "d2", max_role_waiters=2)
    begin(driver, "d1", "prefill")
    ask(driver, "d1", "prefill")
    assert refused(driver, "d1", "prefill").code == ErrorCode.OVERLOADED


# ------------------------------------------------------------------------------------------- refusals


def test_a_change_that_cannot_be_is_refused_with_what_to_do() -> None:
    driver = drive("d1", "p1")
    unknown = refused(driver, "d9", "prefill")
    assert (unknown.code, "choose one of d1, p1" in unknown.message) == (ErrorCode.INVALID_REQUEST, True)
    last = refused(driver, "d1", "prefill")
    assert (last.code, "give another the role" in last.message) == (ErrorCode.NO_DECODE_WORKER, True)
    driver.beat("d2", model="another")
    assert refused(driver, "d1", "prefill").code == ErrorCode.NO_DECODE_WORKER, "of this model it is the last"
    driver.beat("d3", draining=True)
    assert refused(driver, "d1", "prefill").code == ErrorCode.NO_DECODE_WORKER, "the other one is stopping"
    assert refused(driver, "d3", "both").code == ErrorCode.DRAINING
    driver.tick(4.0, "d1")
    lost = refused(driver, "p1", "decode")
    assert (lost.code, "p1 is lost" in lost.message) == (ErrorCode.WORKER_LOST, True)


def test_another_change_of_the_same_worker_waits_for_the_first() -> None:
    driver = drive("d1", "d2")
    begin(driver, "d1", "prefill")
    changing = refused(driver, "d1", "both")
    assert (changing.code, changing.retry_after_s) == (ErrorCode.ROLE_CHANGING, 1.0)


def test_a_worker_that_is_about_to_decode_counts_when_it_has_told_so() -> None:
    driver = drive("d1", "p1")
    driver.reply(begin(driver, "p1", "decode"), Ack())
    assert refused(driver, "d1", "prefill").code == ErrorCode.NO_DECODE_WORKER
    driver.beat("p1", seq=1, role="decode")
    begin(driver, "d1", "prefill")
    assert refused(driver, "p1", "prefill").code == ErrorCode.NO_DECODE_WORKER, "d1 is no decode worker any more"


# ------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("code", [ErrorCode.DRAINING, ErrorCode.MALFORMED_MESSAGE])
def test_what_the_worker_refuses_is_undone(code: ErrorCode) -> None:
    driver = drive("d1", "d2")
    driver.reply(begin(driver, "d1", "prefill"), error(code))
    assert [message.code for message in answers(driver).values()] == [code]
    assert (role_of(driver, "d1"), counter(driver, "role_changes_given_up")) == ("decode", 1)


def test_a_worker_that_does_not_answer_is_asked_again_and_then_given_up() -> None:
    driver = drive("d1", "d2")
    command = begin(driver, "d1", "prefill")
    for _ in range(2):
        driver.feed(CommandFailed(command_id=command.command_id, reason="timeout"))
        (command,) = driver.sent(SetRole)
    assert not answers(driver)
    driver.feed(CommandFailed(command_id=command.command_id, reason="timeout"))
    assert [message.code for message in answers(driver).values()] == [ErrorCode.WORKER_LOST]
    assert role_of(driver, "d1") == "decode"
    driver.beat("d1", seq=1, role="prefill")
    assert role_of(driver, "d1") == "prefill", "it had heard: what it tells counts"


@pytest.mark.parametrize("how", ["gone", "replaced", "replaced before it heard"])
def test_a_worker_that_is_lost_or_replaced_is_what_its_next_life_tells(how: str) -> None:
    driver = drive("d1", "d2")
    command = begin(driver, "d1", "prefill")
    if how == "gone":
        driver.feed(CommandFailed(command_id=command.command_id, reason="no_responders"))
    elif how == "replaced":
        driver.beat("d1", incarnation=2)
        driver.feed(CommandFailed(command_id=command.command_id, reason="timeout"))
    else:
        driver.reply(command, error(ErrorCode.WRONG_INCARNATION))
    assert len(answers(driver)) == 1
    driver.beat("d1", incarnation=2)
    assert (role_of(driver, "d1"), status_of(driver, "d1").wanted_role) == ("decode", None)
    driver.beat("d1", incarnation=2, seq=1, role="both")
    assert role_of(driver, "d1") == "both"


def test_a_change_that_no_heartbeat_tells_of_is_given_up() -> None:
    driver = drive("d1", "d2")
    driver.reply(begin(driver, "d1", "prefill"), Ack())
    driver.tick(20.0, "d1", "d2")
    assert (role_of(driver, "d1"), counter(driver, "role_changes_given_up")) == ("decode", 1)
    begin(driver, "d1", "both")


# ------------------------------------------------------------------------------------------- sessions


def test_nothing_new_is_routed_by_the_old_role() -> None:
    driver = drive("d1", "d2", policy=STAYING)
    begin(driver, "d1", "prefill")
    for number in range(4):
        key = KEY._replace(session=f"s{number}")
        driver.answer(OpenSession(), key=key)
        driver.ask(submit([1, 2, 3]), key=key)
    assert {run.worker_id for run in driver.sent(RunRound)} == {"d2"}


def test_a_round_goes_on_where_it_decodes_and_the_next_one_takes_the_kv_along() -> None:
    driver = drive(policy=STAYING)
    driver.open("d1")
    driver.beat("d2")
    driver.submit([1, 2, 3])
    assert driver.run.worker_id == "d1"
    change(driver, "d1", "prefill")
    driver.acknowledge_run()
    driver.stream(tokens_message(0, 7))
    driver.end([7, 8])
    assert not driver.sent(DropSession), "its KV stays until it is needed elsewhere"
    driver.ask(submit([4, 5]))
    (grant,) = driver.sent(GrantHistory)
    assert (grant.worker_id, grant.message.hold) == ("d1", True)
    driver.reply(grant, HistoryGranted(num_tokens=4, history=source("d1")))
    (driver.run,) = driver.sent(RunRound)
    assert (driver.run.worker_id, driver.run.message.num_source_tokens) == ("d2", 4)
    driver.acknowledge_run(cached=4)
    driver.stream(tokens_message(0, 9, round=1))
    assert [drop.worker_id for drop in driver.sent(DropSession)] == ["d1"]
    driver.end([9])
    assert counter(driver, "moves") == 1
    assert counter(driver, "attempts_failed") == 0


def test_a_round_that_is_being_recorded_runs_where_it_was_placed() -> None:
    """The worker carries out what was on its way: the attempt neither fails nor starts anew."""
    driver = drive("d1", policy=STAYING)
    driver.open("d1")
    driver.beat("d2")
    driver.appends = False
    driver.ask(submit([1, 2, 3]))
    begin(driver, "d1", "prefill")
    driver.appends = True
    append = driver.one(AppendRecord)
    driver.feed(RecordAppended(key=KEY, append_id=append.append_id))
    (driver.run,) = driver.sent(RunRound)
    assert (driver.run.worker_id, driver.run.message.attempt) == ("d1", 1)


def test_policies_that_move_nothing_bind_the_session_anew_and_the_old_worker_drops_it() -> None:
    driver = drive(policy="local")
    driver.open("d1")
    driver.play_round([1, 2, 3], [4, 5])
    driver.beat("d2")
    change(driver, "d1", "prefill")
    driver.submit([6])
    assert (driver.run.worker_id, driver.run.message.tokens_start, driver.run.message.source) == ("d2", 0, None)
    assert [drop.worker_id for drop in driver.sent(DropSession)] == ["d1"]
    driver.acknowledge_run()
    driver.end([7])
    assert counter(driver, "rebinds") == 1


def test_the_worker_that_a_session_leaves_does_not_prefill_for_it_before_it_has_dropped_it() -> None:
    """Its drop would take the prefill along."""
    driver = drive(policy="remote")
    driver.open("d1")
    driver.play_round([1, 2, 3], [4, 5])
    driver.beat("d2")
    change(driver, "d1", "prefill")
    driver.submit([6])
    (drop,) = driver.sent(DropSession)
    assert (driver.run.worker_id, driver.run.message.remote) == ("d2", None)
    driver.acknowledge_run()
    driver.end([7])
    driver.submit([8])
    assert driver.run.message.remote is None, "the drop has not been confirmed"
    driver.acknowledge_run()
    driver.end([9])
    driver.reply(drop, Ack())
    driver.submit([10])
    assert driver.run.message.remote.worker_id == "d1"
    driver.acknowledge_run()
    (task,) = driver.sent(PrefillTask)
    assert task.worker_id == "d1"


def test_kv_that_would_come_along_goes_before_computing_it_again_elsewhere() -> None:
    driver = drive(policy=ALL_REMOTE)
    driver.open("d1", "p1")
    driver.play_remote_round([1] * 400, [5] * 8, cached=0, resident=0)
    driver.beat("d2")
    change(driver, "d1", "prefill")
    driver.ask(submit([6, 7]))
    (grant,) = driver.sent(GrantHistory)
    assert grant.worker_id == "d1"
    driver.reply(grant, HistoryGranted(num_tokens=407, history=source("d1")))
    (driver.run,) = driver.sent(RunRound)
    assert (driver.run.worker_id, driver.run.message.remote) == ("d2", None)


def test_a_session_that_never_comes_back_is_dropped_by_its_idle_time_out() -> None:
    driver = drive(policy=STAYING)
    driver.beat("d1")
    driver.beat("d2")
    driver.answer(OpenSession(idle_timeout_s=30.0))
    driver.play_round([1, 2, 3], [4, 5])
    home = driver.run.worker_id
    change(driver, home, "prefill")
    for _ in range(80):
        driver.now += 0.5
        for worker_id in ("d1", "d2"):
            driver.beat(worker_id, seq=2, role="prefill" if worker_id == home else "decode")
        driver.feed(Ticked())
    assert [drop.worker_id for drop in driver.sent(DropSession)] == [home]
    assert not driver.core.state.sessions


def test_a_prefill_worker_that_decodes_gets_sessions_and_keeps_the_tasks_that_it_has() -> None:
    driver = drive(policy="remote")
    driver.open("d1", "p1")
    driver.submit([1, 2, 3])
    assert driver.run.message.remote.worker_id == "p1"
    change(driver, "p1", "decode")
    driver.acknowledge_run()
    (task,) = driver.sent(PrefillTask)
    assert task.worker_id == "p1", "the round was placed before"
    driver.end_prefill(task)
    driver.end([4])
    assert counter(driver, "attempts_failed") == 0
    other = KEY._replace(session="other")
    driver.answer(OpenSession(), key=other)
    driver.ask(submit([1]), key=other)
    assert [run.worker_id for run in driver.sent(RunRound)] == ["p1"], "fewer sessions are there"


def test_after_a_restart_the_worker_that_prefills_for_a_session_that_it_had_does_not_drop_it() -> None:
    """d1 decoded, became a prefill worker, and prefills the round in flight of the session that has left it."""
    first = drive("d1", policy="remote")
    first.open("d1")
    first.play_round([1, 2, 3], [4])
    opened, started, ended = first.entries
    assert isinstance(started, RoundStartedEntry)
    d1, d2 = WorkerRef("d1", 1), WorkerRef("d2", 1)
    second = RoundStartedEntry(
        round=1,
        idempotency_key="",
        digest=b"",
        input_token_ids=started.input_token_ids,
        sampling=started.sampling,
        stop=started.stop,
        slo=started.slo,
        deadline_s=60.0,
        stream_encoding="msgpack",
        decode=d2,
        prefill=None,
    )
    again = AttemptStartedEntry(round=1, attempt=2, forced_token_ids=b"", deadline_s=60.0, decode=d2, prefill=d1)
    driver = Driver(policy="remote")
    driver.feed(RecordsLoaded(records=(SessionRecord(KEY, (opened, started, ended, second, again)),)))
    driver.beat("d1", role="prefill")
    driver.beat("d2")
    assert not driver.sent(DropSession)
    (run,) = driver.sent(RunRound)
    assert (run.worker_id, run.message.remote.worker_id) == ("d2", "d1")


# ----------------------------------------------------------------------------------------- event log


def test_a_log_of_events_with_role_changes_replays() -> None:
    driver = Driver()
    log: list[bytes] = []
    commands: list[Command] = []
    decide = driver.core.on_event

    def note(event: Event, now: float) -> list[Command]:
        log.append(msgspec.json.encode((now, event)))
        decided = decide(event, now)
        commands.extend(decided)
        return decided

    driver.core.on_event = note  # type: ignore[method-assign]
    driver.open("d1", "d2")
    change(driver, "d1", "prefill")
    driver.play_round([1, 2], [3])
    assert any(isinstance(c, SendToWorker) and isinstance(c.message, SetRole) for c in commands)
    core = Coordinator(driver.core.state.config)
    events = [msgspec.json.decode(line, type=tuple[float, Event]) for line in log]
    assert [command for now, event in events for command in core.on_event(event, now)] == commands
