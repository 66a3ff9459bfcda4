"""The coordinator's core, one rule at a time: events in, commands out."""

from __future__ import annotations

import pytest
from coordinator_driver import KEY, USAGE, Driver, error, finished_message, source, submit, tokens_message

from shared.core.commands import (
    AcknowledgeEvent,
    AppendRecord,
    EncodeInput,
    ObserveRound,
    PublishStream,
    PurgeRecord,
    Reply,
)
from shared.core.events import (
    AppendFailed,
    CommandFailed,
    InputEncoded,
    InputRefused,
    RecordAppended,
    RecordsLoaded,
    SessionRecord,
    Ticked,
    WorkerReported,
)
from shared.core.records import AttemptStartedEntry, RoundEndedEntry, RoundStartedEntry
from shared.core.types import SessionKey
from shared.errors import ErrorCode
from shared.messages import (
    Ack,
    CancelRound,
    CancelRun,
    ChatInput,
    ChatMessage,
    ClientRequest,
    CloseSession,
    DropSession,
    InspectSession,
    NeedTokens,
    OpenSession,
    PrefillEnded,
    PrefillTask,
    ReadRound,
    RoundAccepted,
    RunRound,
    RunRoundAck,
    SamplingParams,
    Slo,
    StopConditions,
    SubmitRound,
    TokensInput,
    WorkerLeaving,
    pack_token_ids,
    unpack_token_ids,
)


@pytest.fixture
def driver() -> Driver:
    return Driver(policy="remote")


# ---------------------------------------------------------------------------------- sessions


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


# ------------------------------------------------------------------------------------ rounds


def test_nothing_is_answered_or_commanded_before_the_record_has_the_round(driver: Driver) -> None:
    driver.open()
    driver.appends = False
    driver.ask(submit([1, 2, 3]))
    append = driver.one(AppendRecord)
    assert isinstance(append.entry, RoundStartedEntry)
    assert not driver.commands
    driver.feed(RecordAppended(key=KEY, append_id=append.append_id))
    assert isinstance(driver.one(Reply).message, RoundAccepted)
    assert len(driver.sent(RunRound)) == 1


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (submit([]), ErrorCode.EMPTY_INPUT),
        (submit([1, 100]), ErrorCode.INVALID_REQUEST),
        (submit([1, -1]), ErrorCode.INVALID_REQUEST),
        (SubmitRound(input=TokensInput(token_ids=b"123")), ErrorCode.INVALID_REQUEST),
        (submit([1] * 991), ErrorCode.CONTEXT_TOO_LONG),
        (submit([1], max_output=0), ErrorCode.INVALID_REQUEST),
        (submit([1], sampling=SamplingParams(temperature=-0.1)), ErrorCode.INVALID_REQUEST),
        (submit([1], sampling=SamplingParams(temperature=float("nan"))), ErrorCode.INVALID_REQUEST),
        (submit([1], sampling=SamplingParams(top_p=0.0)), ErrorCode.INVALID_REQUEST),
        (submit([1], sampling=SamplingParams(top_k=-1)), ErrorCode.INVALID_REQUEST),
        (submit([1], sampling=SamplingParams(seed=-1)), ErrorCode.INVALID_REQUEST),
        (submit([1], stop=StopConditions(stop=("x",) * 17)), ErrorCode.INVALID_REQUEST),
        (submit([1], stop=StopConditions(stop=("x" * 257,))), ErrorCode.INVALID_REQUEST),
        (submit([1], stop=StopConditions(stop=("",))), ErrorCode.INVALID_REQUEST),
        (submit([1], stop=StopConditions(stop_token_ids=(100,))), ErrorCode.INVALID_REQUEST),
        (submit([1], deadline_s=0.0), ErrorCode.INVALID_REQUEST),
        (submit([1], deadline_s=1e9), ErrorCode.INVALID_REQUEST),
        (submit([1], slo=Slo(ttft_s=-1.0)), ErrorCode.INVALID_REQUEST),
        (submit([1], idempotency_key="k" * 257), ErrorCode.INVALID_REQUEST),
    ],
)
def test_bad_rounds_are_refused_and_start_nothing(driver: Driver, request_: SubmitRound, code: ErrorCode) -> None:
    driver.open()
    assert driver.answer(request_).code == code
    assert len(driver.entries) == 1
    assert driver.core.state.num_rounds_in_flight == 0


def test_the_longest_context_is_accepted(driver: Driver) -> None:
    driver.open()
    driver.submit([1] * 990)


def test_one_round_at_a_time(driver: Driver) -> None:
    driver.open()
    driver.submit()
    assert driver.answer(submit([1])).code == ErrorCode.ROUND_IN_FLIGHT


def test_rounds_in_flight_are_bounded() -> None:
    driver = Driver(max_rounds_in_flight=1)
    driver.open()
    driver.submit()
    driver.answer(OpenSession(), key=SessionKey("t", "other"))
    refused = driver.answer(submit([1]), key=SessionKey("t", "other"))
    assert (refused.code, refused.retry_after_s is not None) == (ErrorCode.OVERLOADED, True)


def test_a_round_that_no_pool_can_hold_is_refused_for_good(driver: Driver) -> None:
    driver.beat("d", num_blocks=10)
    driver.answer(OpenSession())
    refused = driver.answer(submit([1] * 200))
    assert (refused.code, refused.retry_after_s) == (ErrorCode.NO_CAPACITY, None)


def test_full_pools_refuse_with_a_hint() -> None:
    driver = Driver(kv_overcommit=1.0)
    driver.beat("d", num_blocks=10)
    driver.answer(OpenSession())
    driver.submit([1] * 100)
    driver.answer(OpenSession(), key=SessionKey("t", "other"))
    refused = driver.answer(submit([1] * 100), key=SessionKey("t", "other"))
    assert (refused.code, refused.retry_after_s is not None) == (ErrorCode.NO_CAPACITY, True)


def test_the_same_key_again_gets_the_same_answer_and_starts_nothing(driver: Driver) -> None:
    driver.open()
    driver.submit([1, 2], idempotency_key="k")
    again = driver.answer(submit([1, 2], idempotency_key="k"))
    assert (again.round, again.num_input_tokens) == (0, 2)
    driver.end([5])
    later = driver.answer(submit([1, 2], idempotency_key="k"))
    assert later == again
    conflict = driver.answer(submit([9], idempotency_key="k"), digest=b"y")
    assert conflict.code == ErrorCode.IDEMPOTENCY_CONFLICT
    assert driver.core.state.sessions[KEY].num_rounds == 1


def test_a_repeat_that_overtakes_the_record_is_answered_with_it(driver: Driver) -> None:
    driver.open()
    driver.appends = False
    driver.ask(submit([1, 2], idempotency_key="k"))
    driver.ask(submit([1, 2], idempotency_key="k"))
    append = driver.one(AppendRecord)
    assert not driver.take(Reply)
    driver.feed(RecordAppended(key=KEY, append_id=append.append_id))
    first, second = driver.take(Reply)
    assert first.message == second.message


def test_keys_are_forgotten_with_their_rounds() -> None:
    driver = Driver(rounds_kept=2)
    driver.open()
    for number in range(4):
        driver.submit([1], idempotency_key=f"k{number}")
        driver.end([5])
    session = driver.core.state.sessions[KEY]
    assert list(session.round_of_key) == ["k2", "k3"]
    assert list(session.rounds) == [2, 3]
    assert driver.answer(ReadRound(round=0)).code == ErrorCode.UNKNOWN_ROUND


def test_a_sampled_round_without_seed_gets_the_one_in_the_event(driver: Driver) -> None:
    driver.open()
    run = driver.submit([1], sampling=SamplingParams(temperature=1.0))
    assert run.sampling.seed == 77
    driver.end([5])
    assert driver.submit([1], sampling=SamplingParams(temperature=1.0, seed=3)).sampling.seed == 3


def test_chat_is_tokenised_in_the_state_that_the_session_then_has(driver: Driver) -> None:
    driver.open()
    chat = SubmitRound(input=ChatInput(messages=(ChatMessage(role="user", content="hi"),)))
    request_id = driver.ask(chat)
    wanted = driver.one(EncodeInput)
    assert wanted.last_token_id is None
    driver.feed(InputEncoded(request_id=request_id, key=KEY, token_ids=pack_token_ids([4, 5])))
    assert driver.one(Reply).message.num_input_tokens == 2
    (driver.run,) = driver.sent(RunRound)
    driver.end([6, 7])
    request_id = driver.ask(chat)
    assert driver.one(EncodeInput).last_token_id == 7
    driver.feed(InputRefused(request_id=request_id, key=KEY, error=error(ErrorCode.TEXT_UNAVAILABLE)))
    assert driver.one(Reply).message.code == ErrorCode.TEXT_UNAVAILABLE
    driver.submit([1])


def test_a_session_closed_while_tokenising_answers_that_round(driver: Driver) -> None:
    driver.open()
    request_id = driver.ask(SubmitRound(input=ChatInput(messages=())))
    driver.one(EncodeInput)
    driver.ask(CloseSession())
    replies = {reply.request_id: reply.message for reply in driver.take(Reply)}
    assert replies[request_id].code == ErrorCode.SESSION_CLOSED
    driver.feed(InputEncoded(request_id=request_id, key=KEY, token_ids=pack_token_ids([4])))
    assert not driver.commands or not driver.take(Reply)


# ----------------------------------------------------------------------- binding and routing


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


# ----------------------------------------------------------------------------------- endings


def test_round_ended_is_acknowledged_after_the_record_has_it(driver: Driver) -> None:
    driver.open()
    driver.submit([1, 2])
    driver.acknowledge_run()
    driver.appends = False
    first = driver.end([3, 4])
    append = driver.one(AppendRecord)
    second = driver.end([3, 4])  # the worker repeats it
    assert not driver.take(AcknowledgeEvent)
    driver.feed(RecordAppended(key=KEY, append_id=append.append_id))
    assert {ack.ack_id for ack in driver.take(AcknowledgeEvent)} == {first, second}
    third = driver.end([3, 4])
    assert driver.one(AcknowledgeEvent).ack_id == third
    assert isinstance(append.entry, RoundEndedEntry)
    observed = driver.one(ObserveRound).observation
    assert (observed.round, observed.error, observed.usage) == (0, None, USAGE)


def test_the_next_round_may_come_before_the_last_one_is_recorded(driver: Driver) -> None:
    """The client sees `finished` on the stream before anybody has recorded it."""
    driver.open()
    driver.submit([1])
    driver.acknowledge_run()
    driver.stream(tokens_message(0, 5, 6), finished_message(2))
    accepted = driver.answer(submit([7]))
    assert (accepted.round, accepted.num_history_tokens) == (1, 3)
    driver.sent(RunRound)
    driver.end([5, 6])  # late: acknowledged, changes nothing
    assert driver.core.state.sessions[KEY].num_tokens == 3


def test_a_round_that_finished_with_gaps_in_its_stream_holds_the_next_request(driver: Driver) -> None:
    driver.open()
    driver.submit([1])
    driver.acknowledge_run()
    driver.stream(tokens_message(0, 5), finished_message(3))
    request_id = driver.ask(submit([7]))
    assert not driver.take(Reply)
    driver.end([5, 6, 7])
    (reply,) = driver.take(Reply)
    assert (reply.request_id, reply.message.num_history_tokens) == (request_id, 4)


def test_held_requests_are_bounded_and_let_go_in_time() -> None:
    driver = Driver(max_held_per_session=2, hold_s=2.0)
    driver.open()
    driver.submit([1])
    driver.acknowledge_run("finished")
    for _ in range(2):
        driver.ask(submit([7]))
    assert driver.answer(submit([8])).code == ErrorCode.ROUND_IN_FLIGHT
    driver.tick(2.0, "d")
    assert [reply.message.code for reply in driver.take(Reply)] == [ErrorCode.ROUND_IN_FLIGHT] * 2


def test_cancel_tells_the_worker_and_rolls_the_history_back(driver: Driver) -> None:
    driver.open()
    driver.play_round([1], [2])
    driver.submit([3])
    driver.acknowledge_run()
    driver.stream(tokens_message(0, 8, round=1))
    request_id = driver.ask(CancelRound(round=1))
    (cancel,) = driver.sent(CancelRun)
    assert not driver.take(Reply)
    driver.reply(cancel, Ack())
    reply = [r for r in driver.take(Reply) if r.request_id == request_id]
    assert reply[0].message.cancelled
    failed = driver.one(PublishStream).message
    assert (failed.error.code, failed.num_output_tokens) == (ErrorCode.CANCELLED, 1)
    run = driver.submit([4])
    assert (run.round, run.num_history_tokens, run.tokens_start) == (2, 2, 2)


def test_a_round_that_finishes_while_it_is_cancelled_has_finished(driver: Driver) -> None:
    driver.open()
    driver.submit([1])
    driver.acknowledge_run()
    driver.ask(CancelRound())
    driver.stream(tokens_message(0, 5), finished_message(1))
    assert driver.one(Reply).message.cancelled is False
    assert not driver.take(PublishStream)
    assert driver.core.state.sessions[KEY].num_tokens == 2


def test_cancel_without_a_round_in_flight_does_nothing(driver: Driver) -> None:
    driver.open()
    assert driver.answer(CancelRound()).cancelled is False
    driver.play_round([1], [2])
    assert driver.answer(CancelRound(round=0)).cancelled is False
    assert driver.answer(CancelRound(round=1)).code == ErrorCode.UNKNOWN_ROUND


def test_close_cancels_and_then_closes(driver: Driver) -> None:
    driver.open()
    driver.submit([1])
    driver.acknowledge_run()
    driver.ask(CloseSession())
    assert driver.answer(submit([2])).code == ErrorCode.SESSION_CLOSED
    (cancel,) = driver.sent(CancelRun)
    driver.reply(cancel, Ack())
    assert driver.one(PublishStream).message.error.code == ErrorCode.CANCELLED
    assert driver.one(Reply).message.num_rounds == 1
    assert KEY not in driver.core.state.sessions


@pytest.mark.parametrize("worker_answers", [True, False])
def test_a_deadline_ends_the_round_within_two_seconds(driver: Driver, worker_answers: bool) -> None:
    driver.open()
    driver.submit([1], deadline_s=5.0)
    driver.acknowledge_run()
    driver.tick(4.9, "d")
    assert not driver.sent(CancelRun)
    driver.tick(0.2, "d")
    (cancel,) = driver.sent(CancelRun)
    if worker_answers:
        driver.reply(cancel, Ack())
    else:
        driver.tick(1.5, "d")
    assert driver.one(PublishStream).message.error.code == ErrorCode.DEADLINE_EXCEEDED
    assert driver.now < 7.0


def test_an_error_that_no_other_attempt_can_mend_fails_the_round(driver: Driver) -> None:
    driver.open()
    driver.submit([1])
    driver.acknowledge_run()
    driver.end([5], error=error(ErrorCode.CLIENT_GONE))
    failed = driver.one(PublishStream).message
    assert (failed.error.code, failed.num_output_tokens) == (ErrorCode.CLIENT_GONE, 1)


def test_rounds_can_be_read_and_sessions_inspected(driver: Driver) -> None:
    driver.open()
    driver.play_round([1], [5, 6, 7])
    snapshot = driver.answer(ReadRound(round=0, start_index=1))
    assert unpack_token_ids(snapshot.token_ids) == [6, 7]
    assert snapshot.finished.num_output_tokens == 3
    driver.submit([2])
    driver.acknowledge_run()
    driver.stream(tokens_message(0, 8, round=1))
    running = driver.answer(ReadRound(round=1))
    assert unpack_token_ids(running.token_ids) == [8]
    assert running.finished is running.failed is None
    assert driver.answer(ReadRound(round=2)).code == ErrorCode.UNKNOWN_ROUND
    assert driver.answer(ReadRound(round=1, start_index=-1)).code == ErrorCode.INVALID_REQUEST
    info = driver.answer(InspectSession(include_tokens=True))
    assert (info.state, info.decode_worker, info.num_tokens) == ("running", "d", 4)
    assert [r.state for r in info.rounds] == ["finished", "decoding"]
    assert unpack_token_ids(info.token_ids) == [1, 5, 6, 7]
    status = driver.core.describe_cluster(driver.now)
    assert (status.num_sessions, status.num_rounds_in_flight, len(status.workers)) == (1, 1, 1)


# ---------------------------------------------------------------------------------- attempts


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


# ---------------------------------------------------------------------------------- the record


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


# ------------------------------------------------------------------------------ after a restart


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
