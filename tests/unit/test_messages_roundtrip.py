"""Every message survives the wire, in MessagePack and in JSON, and another program can read it."""

from __future__ import annotations

import base64
import typing
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import messages
from shared.errors import AmpdError, ErrorCode

TYPES: tuple[type[messages.Message], ...] = typing.get_args(messages.AnyMessage)


def values(kind: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    """Any value of a type as msgspec sees it."""
    match kind:
        case msgspec.inspect.StructType():
            return st.builds(kind.cls, **{field.name: values(field.type) for field in kind.fields})
        case msgspec.inspect.UnionType():
            return st.one_of([values(t) for t in kind.types])
        case msgspec.inspect.LiteralType():
            return st.sampled_from(kind.values)
        case msgspec.inspect.EnumType():
            return st.sampled_from(list(kind.cls))
        case msgspec.inspect.VarTupleType():
            return st.lists(values(kind.item_type), max_size=3).map(tuple)
        case msgspec.inspect.ListType():
            return st.lists(values(kind.item_type), max_size=3)
        case msgspec.inspect.DictType():
            return st.dictionaries(values(kind.key_type), values(kind.value_type), max_size=3)
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.BytesType():
            return st.binary(max_size=40)
        case msgspec.inspect.StrType():
            return st.text(max_size=20)
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.IntType():
            return st.integers(-(2**63), 2**64 - 1)
        case msgspec.inspect.FloatType():
            return st.floats(allow_nan=False, allow_infinity=False)
        case _:
            raise TypeError(f"no values for {kind}")


@pytest.mark.parametrize("cls", TYPES, ids=lambda cls: cls.__name__)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_message_survives_both_encodings(cls: type[messages.Message], data: st.DataObject) -> None:
    message = data.draw(values(msgspec.inspect.type_info(cls)))
    packed, text = messages.encode(message), messages.encode(message, "json")
    assert messages.decode(packed) == messages.decode(text) == message
    assert (messages.encoding_of(packed), messages.encoding_of(text)) == ("msgpack", "json")
    # a program without msgspec reads the same fields
    assert as_json(msgpack.unpackb(packed)) == msgspec.json.decode(text)


def as_json(value: Any) -> Any:
    """MessagePack's plain values as JSON has them: bytes in base64."""
    match value:
        case bytes():
            return base64.b64encode(value).decode()
        case list():
            return [as_json(item) for item in value]
        case dict():
            return {key: as_json(item) for key, item in value.items()}
        case _:
            return value


def test_tags_are_unique_and_every_message_is_in_the_union() -> None:
    tags = [cls.__struct_config__.tag for cls in TYPES]
    assert len(set(tags)) == len(tags)
    assert set(messages.Message.__subclasses__()) == set(TYPES)


def test_a_message_packed_by_another_program_is_understood() -> None:
    packed = msgpack.packb(
        {"type": "round", "input": {"type": "tokens", "token_ids": [1, 2, 3]}, "stop": {"max_output_tokens": 5}}
    )
    message = messages.decode(packed)
    assert isinstance(message, messages.SubmitRound)
    assert message.input == messages.TokensInput(token_ids=[1, 2, 3])
    assert message.stop.max_output_tokens == 5
    assert message.sampling == messages.SamplingParams()


def test_a_field_of_a_newer_version_is_ignored() -> None:
    assert messages.decode(msgpack.packb({"type": "ack", "of_the_future": {"a": [1]}})) == messages.Ack()


@settings(deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50))
def test_token_ids_survive_packing(token_ids: list[int]) -> None:
    packed = messages.pack_token_ids(token_ids)
    assert len(packed) == 4 * len(token_ids)
    assert packed == b"".join(token_id.to_bytes(4, "little", signed=True) for token_id in token_ids)
    assert messages.unpack_token_ids(packed) == messages.unpack_token_ids(token_ids) == token_ids


def test_token_ids_out_of_range_or_cut_are_refused() -> None:
    with pytest.raises(OverflowError):
        messages.pack_token_ids([2**31])
    with pytest.raises(AmpdError, match="5 bytes is not a multiple of 4") as caught:
        messages.unpack_token_ids(b"\x00" * 5)
    assert caught.value.code == ErrorCode.INVALID_REQUEST


def test_an_error_crosses_the_bus_and_is_raised_again() -> None:
    error = AmpdError(ErrorCode.NO_CAPACITY, "wait", retry_after_s=2.5)
    reply = messages.decode(messages.encode(messages.error_reply(error)))
    with pytest.raises(AmpdError, match="wait") as caught:
        messages.raise_if_error(reply)
    assert (caught.value.code, caught.value.retry_after_s) == (ErrorCode.NO_CAPACITY, 2.5)
    assert messages.raise_if_error(messages.Ack()) == messages.Ack()
