"""Add a vector for every message type that has none: `python tests/wire_vectors/generate.py`.

A committed vector is never rewritten: it is what a process of an older version sends.
"""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import msgspec

from shared import messages

VECTORS = Path(__file__).with_name("messages.json")


def example(kind: msgspec.inspect.Type, name: str) -> Any:
    """A fixed value of the type, every optional field given, different from its default where that is easy."""
    match kind:
        case msgspec.inspect.StructType():
            return kind.cls(**{f.name: example(f.type, f.name) for f in kind.fields})
        case msgspec.inspect.UnionType():
            return example(next(t for t in kind.types if not isinstance(t, msgspec.inspect.NoneType)), name)
        case msgspec.inspect.LiteralType() | msgspec.inspect.EnumType():
            return kind.values[-1] if isinstance(kind, msgspec.inspect.LiteralType) else list(kind.cls)[-1]
        case msgspec.inspect.VarTupleType():
            return (example(kind.item_type, name), example(kind.item_type, name))
        case msgspec.inspect.DictType():
            return {"some_counter": 3}
        case msgspec.inspect.BytesType():
            return messages.pack_token_ids([0, 1, 70_000, 2**31 - 1])
        case msgspec.inspect.StrType():
            return f"{name} é 漢"
        case msgspec.inspect.BoolType():
            return True
        case msgspec.inspect.IntType():
            return 7 + 300 * len(name)
        case msgspec.inspect.FloatType():
            return 0.125 + len(name)
        case _:
            raise TypeError(f"no example for {kind}")


def main() -> None:
    vectors: dict[str, dict[str, Any]] = json.loads(VECTORS.read_text()) if VECTORS.exists() else {}
    for cls in typing.get_args(messages.AnyMessage):
        if cls.__struct_config__.tag in vectors:
            continue
        message = example(msgspec.inspect.type_info(cls), "")
        vectors[cls.__struct_config__.tag] = {
            "msgpack_hex": messages.encode(message).hex(),
            "json": json.loads(messages.encode(message, "json")),
        }
    VECTORS.write_text(json.dumps(vectors, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(vectors)} vectors in {VECTORS.name}")


if __name__ == "__main__":
    main()
