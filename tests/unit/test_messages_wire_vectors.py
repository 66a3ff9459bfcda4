"""The committed bytes: what older processes and other programs send is still understood.

A new message type gets its vector by `python tests/wire_vectors/generate.py`.
"""

from __future__ import annotations

import base64
import json
import typing
from pathlib import Path
from typing import Any

import msgpack
import pytest

from shared import messages

VECTORS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "wire_vectors" / "messages.json").read_text()
)


def contains(whole: Any, part: Any) -> bool:
    """Whether `whole` has all of `part`; it may have more fields. Bytes equal their base64 text."""
    match part:
        case dict():
            return isinstance(whole, dict) and all(k in whole and contains(whole[k], v) for k, v in part.items())
        case list():
            return len(whole) == len(part) and all(contains(w, p) for w, p in zip(whole, part, strict=True))
        case str() if isinstance(whole, bytes):
            return base64.b64encode(whole).decode() == part
        case _:
            return bool(whole == part)


def test_every_message_type_has_a_vector() -> None:
    assert set(VECTORS) == {cls.__struct_config__.tag for cls in typing.get_args(messages.AnyMessage)}


@pytest.mark.parametrize("tag", VECTORS)
def test_a_vector_is_understood_by_us_and_by_plain_msgpack(tag: str) -> None:
    packed, fields = bytes.fromhex(VECTORS[tag]["msgpack_hex"]), VECTORS[tag]["json"]
    plain = msgpack.unpackb(packed)
    assert plain["type"] == tag
    assert contains(plain, fields)
    message = messages.decode(packed)
    assert message == messages.decode(json.dumps(fields).encode())
    # what we send today has every field that was ever sent, with the same meaning; fields may have been added
    assert contains(msgpack.unpackb(messages.encode(message)), fields)
    assert contains(json.loads(messages.encode(message, "json")), fields)


def test_containment_notices_differences() -> None:
    assert contains({"a": [1, {"b": b"\x00"}], "c": 2}, {"a": [1, {"b": "AA=="}]})
    assert not contains({"a": 1}, {"b": 1})
    assert not contains({"a": [1, 2]}, {"a": [1]})
    assert not contains({"a": b"\x01"}, {"a": "AA=="})
