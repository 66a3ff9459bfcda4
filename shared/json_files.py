"""Reading the JSON files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.errors import AmpdError, ErrorCode


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in the file. Raises AmpdError INVALID_REQUEST that names the file if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value
