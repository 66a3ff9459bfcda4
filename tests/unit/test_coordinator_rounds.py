"""The coordinator's rules for a round that goes well or is ended: events in, commands out."""

from __future__ import annotations

import pytest
from coordinator_driver import KEY, USAGE, Driver, error, finished_message, submit, tokens_message

from shared.core.commands import (
    AcknowledgeEvent,
    AppendRecord,
    EncodeInput,
    ObserveRound,
    PublishStream,
    Reply,
)
from shared.core.events import (
    InputEncoded,
    InputRefused,
    RecordAppended,
)
from shared.core.records import RoundEndedEntry, RoundStartedEntry
from shared.core.types import SessionKey
from shared.errors import ErrorCode
from shared.messages import (
    Ack,
    CancelRound,
    CancelRun,
    ChatInput,
    ChatMessage,
    CloseSession,
    InspectSession,
    OpenSession,
    ReadRound,
    RoundAccepted,
    RunRound,
    SamplingParams,
    Slo,
    StopConditions,
    SubmitRound,
    TokensInput,
    pack_token_ids,
    unpack_token_ids,
)


@pytest.fixture
def driver() -> Driver:
    return Driver(policy="remote")


# ----------------------------------------------------------------------------------------- rounds


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


# ---------------------------------------------------------------------------------------- endings


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
