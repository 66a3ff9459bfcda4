"""Bad bytes give a typed error that names the field, in bounded memory, and nothing else happens."""

from __future__ import annotations

import tracemalloc
import typing

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared import messages
from shared.errors import AmpdError, ErrorCode


def refuse(data: bytes) -> str:
    """The reason why `data` is refused, with what refusing it may cost at most."""
    tracemalloc.start()
    try:
        with pytest.raises(AmpdError) as caught:
            messages.decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.code == ErrorCode.MALFORMED_MESSAGE
    assert peak < 12 * len(data) + 1_000_000
    assert len(caught.value.message) < 500
    return caught.value.message


TEXT = {"type": "text", "text": "hi"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"type": "round", "input": TEXT, "deadline_s": "soon"}, "$.deadline_s"),
        ({"type": "round", "input": TEXT, "stop": {"max_output_tokens": 1.5}}, "$.stop.max_output_tokens"),
        ({"type": "round", "input": TEXT, "stop": {"stop": ["a", 1]}}, "$.stop.stop[1]"),
        ({"type": "round", "input": TEXT, "sampling": {"temprature": 1}}, "temprature"),
        ({"type": "round", "input": {"type": "tokens", "token_ids": [1, True]}}, "$.input.token_ids[1]"),
        ({"type": "round", "input": {"type": "audio"}}, "$.input.type"),
        ({"type": "round", "input": "hi"}, "$.input"),
        ({"type": "round"}, "input"),
        ({"type": "round", "input": {"type": "chat", "messages": [{"role": "user"}]}}, "content"),
        ({"type": "read_round", "round": None}, "$.round"),
        ({"type": "finished", "session": "s"}, "round"),
        ({"type": "launch_missiles"}, "launch_missiles"),
        ({"input": TEXT}, "type"),
        ({"type": 7}, "$.type"),
        ([1, 2, 3], "object"),
        ("text", "object"),
        (None, "object"),
    ],
)
def test_the_offending_field_is_named(fields: object, named: str) -> None:
    assert named in refuse(msgpack.packb(fields))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b'{"type":"cancel","round":"0"}', "$.round"),
        (b'{"type":"round","input":{"type":"tokens","token_ids":"%%%"}}', "$.input.token_ids"),
        (b'{"type":"open","idle_timeout_s":1e999}', "$.idle_timeout_s"),
        (b'{"type":"cancel","round":' + b"9" * 100_000 + b"}", "$.round"),
        (b'{"type":"cancel","round":' + b"9" * 30 + b"}", "64"),
        (b'{"type":"cancel"', "truncated"),
        (b'{"type":"cancel"}}', "trailing"),
        (b'{"type":"text\xff"}', "utf-8"),
        (b'{"type":"cancel","type":"close"}', "$.type"),
        (b" ", "truncated"),
    ],
)
def test_bad_json_is_refused(text: bytes, named: str) -> None:
    assert named in refuse(text).lower()


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"[", b'{"a":', b'[{"a":'])
def test_deep_nesting_is_refused(opening: bytes) -> None:
    start = b'{"type":"open","x":' if opening[:1] in b"[{" else b"\x82\xa4type\xa4open\xa1x"
    assert "recursion" in refuse(start + opening * 1_000_000)
    refuse(start + opening * 900)  # just below the limit: cut short
    refuse(opening * 1_000_000)


LIES = {
    "tuple": b"\x82\xa4type\xa5round\xa4stop\x81\xa4stop\xdd\xff\xff\xff\xff\xa1a",
    "list": b"\x82\xa4type\xa5round\xa5input\x82\xa4type\xa6tokens\xa9token_ids\xdd\xff\xff\xff\xff\x01",
    "bytes": b"\x82\xa4type\xa5round\xa5input\x82\xa4type\xa6tokens\xa9token_ids\xc6\xff\xff\xff\xff\x01",
    "text": b"\x82\xa4type\xa5round\xafidempotency_key\xdb\xff\xff\xff\xffab",
    "dict": b"\x82\xa4type\xaecluster_status\xa8counters\xdf\xff\xff\xff\xff\xa1a\x01",
    "message": b"\xdf\xff\xff\xff\xff\xa4type\xa4open",
    "ignored": b"\x82\xa4type\xa4open\xa1x\xdd\xff\xff\xff\xff",
    "extension": b"\x82\xa4type\xa4open\xa1x\xc9\xff\xff\xff\xff\x01",
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_length_that_lies_reserves_no_memory(lie: bytes) -> None:
    assert "truncated" in refuse(lie)


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "x" * 1_000_000},
        {"type": "error", "message": "", "code": "x" * 1_000_000},
        {"type": "round", "input": TEXT, "sampling": {"x" * 1_000_000: 1}},
    ],
)
def test_the_reason_is_short_whatever_the_sender_wrote(fields: object) -> None:
    assert "xxxx" in refuse(msgpack.packb(fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "round", "input": {"type": "tokens", "token_ids": [0] * 2_000_000}},
        {"type": "round", "input": TEXT, "stop": {"stop": [""] * 2_000_000}},
    ],
)
def test_what_is_accepted_takes_bounded_memory_too(fields: object) -> None:
    data = msgpack.packb(fields)
    tracemalloc.start()
    try:
        messages.decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # a pointer an item, twice while a growing list moves or becomes a tuple
    assert peak < 20 * len(data) + 1_000_000


def test_a_receivers_limit_is_checked_before_decoding() -> None:
    data = messages.encode(messages.SubmitRound(input=messages.TextInput(text="x" * 1000)))
    assert messages.decode(data, max_bytes=len(data))
    with pytest.raises(AmpdError, match="exceeds the limit of 1,000 bytes") as caught:
        messages.decode(data, max_bytes=1000)
    assert caught.value.code == ErrorCode.MALFORMED_MESSAGE


def decode_or_refuse(data: bytes) -> None:
    """Nothing but a message or MALFORMED_MESSAGE may come out; and a message must be fit to travel on."""
    try:
        message = messages.decode(data)
    except AmpdError as error:
        if error.code != ErrorCode.MALFORMED_MESSAGE:
            raise
    else:
        messages.encode(message)


TAGS = [cls.__struct_config__.tag for cls in typing.get_args(messages.AnyMessage)]
FIELDS = sorted({name for cls in typing.get_args(messages.AnyMessage) for name in cls.__struct_fields__})
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
@example(b"")
@example(b"\x00")
@example(b"\xc1")
def test_arbitrary_bytes(data: bytes) -> None:
    decode_or_refuse(data)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(TAGS), st.dictionaries(st.sampled_from(FIELDS), plain, max_size=8))
def test_messages_with_arbitrary_fields(tag: str, fields: dict[str, object]) -> None:
    decode_or_refuse(msgpack.packb({"type": tag, **fields}))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_messages(data: st.DataObject) -> None:
    usage = messages.Usage(
        num_history_tokens=1, num_input_tokens=2, num_cached_tokens=3, num_output_tokens=4, prefill="remote",
        prefill_worker="p", decode_worker="d",
    )  # fmt: skip
    message = messages.RoundFinished(
        session="s", round=0, attempt=1, seq=2, num_output_tokens=4, finish_reason="stop", usage=usage
    )
    damaged = bytearray(messages.encode(message, data.draw(st.sampled_from(["msgpack", "json"]))))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        match data.draw(st.sampled_from(["change", "cut", "insert"])):
            case "change":
                damaged[place] = data.draw(st.integers(0, 255))
            case "cut":
                del damaged[place + 1 :]
            case _:
                damaged[place:place] = data.draw(st.binary(min_size=1, max_size=5))
    decode_or_refuse(bytes(damaged))
