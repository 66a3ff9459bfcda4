"""The durable record: its encoding, and that folding it is idempotent."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core.records import (
    RECORD_VERSION,
    AttemptStartedEntry,
    RecordEntry,
    RoundEndedEntry,
    RoundStartedEntry,
    SessionClosedEntry,
    SessionOpenedEntry,
    WorkerRef,
    decode_entry,
    encode_entry,
)
from shared.core.session import fold
from shared.core.types import SessionKey
from shared.errors import AmpdError, ErrorCode
from shared.messages import ErrorReply, SamplingParams, Slo, StopConditions, Usage, pack_token_ids

KEY = SessionKey("t", "s")
D, P = WorkerRef("d", 1), WorkerRef("p", 2)
OPENED = SessionOpenedEntry(model="m", max_context_tokens=100, vocab_size=50, slo=Slo(), idle_timeout_s=60.0)
USAGE = Usage(
    num_history_tokens=0,
    num_input_tokens=1,
    num_cached_tokens=0,
    num_output_tokens=1,
    prefill="local",
    prefill_worker="d",
    decode_worker="d",
)


def started(index: int, tokens: list[int]) -> RoundStartedEntry:
    return RoundStartedEntry(
        round=index,
        idempotency_key=f"k{index}",
        digest=b"digest",
        input_token_ids=pack_token_ids(tokens),
        sampling=SamplingParams(temperature=1.0, seed=2**63 - 1),
        stop=StopConditions(stop=("x",)),
        slo=Slo(),
        deadline_s=5.0,
        stream_encoding="json",
        decode=D,
        prefill=P,
    )


def attempt(index: int, number: int, forced: list[int]) -> AttemptStartedEntry:
    return AttemptStartedEntry(
        round=index, attempt=number, forced_token_ids=pack_token_ids(forced), deadline_s=3.0, decode=D, prefill=None
    )


def ended(index: int, tokens: list[int], *, failed: bool = False) -> RoundEndedEntry:
    return RoundEndedEntry(
        round=index,
        attempt=1,
        output_token_ids=pack_token_ids(tokens),
        finish_reason=None if failed else "stop",
        usage=None if failed else USAGE,
        error=ErrorReply(code=ErrorCode.CANCELLED, message="") if failed else None,
    )


@pytest.mark.parametrize("entry", [OPENED, started(0, [1]), attempt(0, 2, [3]), ended(0, [1]), SessionClosedEntry()])
def test_entries_survive_the_wire_and_are_plain_messagepack(entry: RecordEntry) -> None:
    data = encode_entry(entry)
    assert decode_entry(data) == entry
    assert msgpack.unpackb(data)["version"] == RECORD_VERSION


@given(st.binary(max_size=60))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(AmpdError) as refused:
        decode_entry(data)
    assert refused.value.code == ErrorCode.MALFORMED_MESSAGE


def test_entries_of_a_newer_version_are_refused() -> None:
    document = msgpack.unpackb(encode_entry(SessionClosedEntry())) | {"version": RECORD_VERSION + 1}
    with pytest.raises(AmpdError, match="upgrade"):
        decode_entry(msgpack.packb(document))


@st.composite
def records(draw: st.DrawFn) -> list[RecordEntry]:
    entries: list[RecordEntry] = [OPENED]
    tokens = st.lists(st.integers(0, 49), min_size=1, max_size=4)
    for index in range(draw(st.integers(0, 5))):
        entries.append(started(index, draw(tokens)))
        entries.extend(attempt(index, number, draw(tokens)) for number in range(2, draw(st.integers(2, 4))))
        entries.append(ended(index, draw(tokens), failed=draw(st.booleans())))
    return entries[: draw(st.integers(1, len(entries)))]


@given(records(), st.data())
def test_an_entry_that_was_appended_twice_changes_nothing(entries: list[RecordEntry], data: st.DataObject) -> None:
    repeated = [entry for entry in entries for _ in range(data.draw(st.integers(1, 2)))]
    once, twice = fold(KEY, entries, 64), fold(KEY, repeated, 64)
    assert once is not None
    assert twice is not None
    assert (once.history, once.num_rounds, once.rounds) == (twice.history, twice.num_rounds, twice.rounds)
    assert once.history_checksum == twice.history_checksum
    assert (once.in_flight is None) == (twice.in_flight is None)
    if once.in_flight is not None and twice.in_flight is not None:
        assert (once.in_flight.attempt, once.in_flight.forced) == (twice.in_flight.attempt, twice.in_flight.forced)


def test_only_finished_rounds_join_the_history() -> None:
    session = fold(
        KEY, [OPENED, started(0, [1]), ended(0, [2]), started(1, [3]), ended(1, [4], failed=True), started(2, [5])], 64
    )
    assert session is not None
    assert session.history == pack_token_ids([1, 2])
    assert session.output_of(session.rounds[0]) == pack_token_ids([2])
    assert session.output_of(session.rounds[1]) == pack_token_ids([4])
    assert session.in_flight is not None
    assert session.conversation_from(1) == pack_token_ids([2, 5])


def test_a_record_without_a_beginning_is_no_session() -> None:
    assert fold(KEY, [], 64) is None
    assert fold(KEY, [ended(0, [1])], 64) is None
    closed = fold(KEY, [OPENED, SessionClosedEntry()], 64)
    assert closed is not None
    assert closed.closed
