"""RoundAssembly: whatever the bus does to a round's messages, the output is exact."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core.round_assembly import MAX_HELD_MESSAGES, RoundAssembly
from shared.errors import AmpdError, ErrorCode
from shared.messages import (
    ErrorReply,
    RoundFailed,
    RoundFinished,
    RoundSnapshot,
    RoundTokens,
    StreamMessage,
    Usage,
    pack_token_ids,
)

USAGE = Usage(
    num_history_tokens=0,
    num_input_tokens=1,
    num_cached_tokens=0,
    num_output_tokens=0,
    prefill="local",
    prefill_worker="d0",
    decode_worker="d0",
)


def spell(token_ids: list[int]) -> str:
    return "".join(f"<{token_id}>" for token_id in token_ids)


def tokens(attempt: int, seq: int, start: int, ids: list[int], text: str | None = None) -> RoundTokens:
    return RoundTokens(
        session="s",
        round=0,
        attempt=attempt,
        seq=seq,
        start_index=start,
        token_ids=pack_token_ids(ids),
        text=spell(ids) if text is None else text,
    )


def finished(attempt: int, seq: int, count: int) -> RoundFinished:
    return RoundFinished(
        session="s", round=0, attempt=attempt, seq=seq, num_output_tokens=count, finish_reason="length", usage=USAGE
    )


def snapshot(ids: list[int], start: int = 0, end: RoundFinished | None = None) -> RoundSnapshot:
    rest = ids[start:]
    return RoundSnapshot(
        session="s", round=0, start_index=start, token_ids=pack_token_ids(rest), text=spell(rest), finished=end
    )


def feed(assembly: RoundAssembly, *messages: StreamMessage) -> None:
    for now, message in enumerate(messages):
        assembly.add(message, float(now))


def test_in_order() -> None:
    assembly = RoundAssembly(8)
    feed(assembly, tokens(1, 0, 0, [5]), tokens(1, 1, 1, [6, 7]), finished(1, 2, 3))
    assert assembly.token_ids == [5, 6, 7]
    assert assembly.token_times == [0.0, 1.0, 1.0]
    assert assembly.text == "<5><6><7>"
    assert assembly.is_complete
    assert assembly.text_is_exact
    assert not assembly.has_gap


def test_late_text_without_tokens_belongs_to_the_round() -> None:
    assembly = RoundAssembly(8)
    feed(assembly, tokens(1, 0, 0, [5], text=""), tokens(1, 1, 1, [], text="held back"), finished(1, 2, 1))
    assert assembly.text == "held back"
    assert assembly.is_complete
    assert assembly.text_is_exact


def test_lost_text_is_noticed_by_the_sequence_number() -> None:
    assembly = RoundAssembly(8)
    feed(assembly, tokens(1, 0, 0, [5], text=""), finished(1, 2, 1))
    assert assembly.is_complete
    assert not assembly.text_is_exact
    assembly.set_exact_text("held back")
    assert assembly.text_is_exact


def test_duplicates_and_stale_attempts_are_ignored() -> None:
    assembly = RoundAssembly(8)
    feed(
        assembly,
        tokens(1, 0, 0, [5]),
        tokens(1, 0, 0, [5]),
        tokens(2, 0, 1, [6]),
        tokens(1, 1, 1, [99]),
        finished(1, 2, 2),
    )
    assert assembly.token_ids == [5, 6]
    assert not assembly.is_complete
    feed(assembly, finished(2, 1, 2))
    assert assembly.is_complete


def test_new_attempt_that_repeats_tokens_adds_only_the_new_ones() -> None:
    assembly = RoundAssembly(8)
    feed(assembly, tokens(1, 0, 0, [5]), tokens(1, 1, 1, [6]), tokens(2, 0, 1, [6, 7]), finished(2, 1, 3))
    assert assembly.token_ids == [5, 6, 7]
    assert assembly.is_complete
    assert not assembly.text_is_exact  # <7> came together with <6>, which had been streamed


def test_gap_is_held_and_filled_by_a_snapshot() -> None:
    assembly = RoundAssembly(8)
    feed(assembly, tokens(1, 0, 0, [5]), tokens(1, 2, 2, [7]))
    assert assembly.has_gap
    assert assembly.token_ids == [5]
    assembly.add_snapshot(snapshot([5, 6], 1), 9.0)
    assert assembly.token_ids == [5, 6, 7]
    assert not assembly.has_gap


def test_lost_end_of_the_stream_shows_in_finished() -> None:
    assembly = RoundAssembly(8)
    feed(assembly, tokens(1, 0, 0, [5]), finished(1, 2, 2))
    assert assembly.has_gap
    assert not assembly.is_complete
    assembly.add_snapshot(snapshot([5, 6], 1, finished(1, 2, 2)), 9.0)
    assert assembly.token_ids == [5, 6]
    assert assembly.is_complete


def test_failure_ends_the_round_but_an_older_attempts_does_not() -> None:
    assembly = RoundAssembly(8)
    reply = ErrorReply(code=ErrorCode.WORKER_LOST, message="worker d0 is gone")
    failed = RoundFailed(session="s", round=0, attempt=1, seq=1, num_output_tokens=1, error=reply)
    feed(assembly, tokens(2, 0, 0, [5]), failed)
    assert not assembly.is_complete
    feed(assembly, RoundFailed(session="s", round=0, attempt=2, seq=1, num_output_tokens=1, error=reply))
    assert assembly.is_complete


def test_more_output_than_was_asked_for_is_an_error_not_memory() -> None:
    assembly = RoundAssembly(2)
    with pytest.raises(AmpdError, match="max_output_tokens") as caught:
        feed(assembly, tokens(1, 0, 0, [1, 2, 3]))
    assert caught.value.code is ErrorCode.INTERNAL


def test_held_messages_are_bounded() -> None:
    assembly = RoundAssembly(10_000)
    feed(assembly, *(tokens(1, seq, seq, [seq]) for seq in range(1, 2 * MAX_HELD_MESSAGES)))
    assembly.add(tokens(1, 0, 0, [0]), 0.0)
    assert assembly.token_ids == list(range(MAX_HELD_MESSAGES + 1))


@given(data=st.data())
def test_any_order_any_loss_any_attempts_end_exact(data: st.DataObject) -> None:
    """Messages of several attempts, shuffled, repeated and dropped, with reads in between, always give the output."""
    output = data.draw(st.lists(st.integers(0, 50_000), min_size=1, max_size=24))
    messages: list[StreamMessage] = []
    num_attempts = data.draw(st.integers(1, 3))
    for attempt in range(1, num_attempts + 1):
        start = data.draw(st.integers(0, len(output) - 1)) if attempt > 1 else 0
        stop = len(output) if attempt == num_attempts else data.draw(st.integers(start, len(output)))
        seq = 0
        while start < stop:
            size = data.draw(st.integers(1, 4))
            messages.append(tokens(attempt, seq, start, output[start : min(start + size, stop)]))
            start, seq = min(start + size, stop), seq + 1
    end = finished(num_attempts, seq, len(output))
    delivered = data.draw(st.lists(st.sampled_from([*messages, end]), max_size=40))
    if data.draw(st.booleans()):
        delivered = [*messages, end]

    assembly = RoundAssembly(len(output))
    for message in delivered:
        before = list(assembly.token_ids)
        assembly.add(message, 0.0)
        assert assembly.token_ids[: len(before)] == before
        assert assembly.token_ids == output[: len(assembly.token_ids)]
        if assembly.has_gap and data.draw(st.booleans()):
            assembly.add_snapshot(snapshot(output, len(assembly.token_ids)), 0.0)
    if not assembly.is_complete:
        assembly.add_snapshot(snapshot(output, len(assembly.token_ids), end), 0.0)
    assert assembly.is_complete
    assert assembly.token_ids == output
    assert len(assembly.token_times) == len(output)
    if assembly.text_is_exact:
        assert assembly.text == spell(output)
