"""Profiles on disk: the ones that ship, by name, and any other by its path."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from shared.core.profile import Profile, decode_profile
from shared.errors import AmpdError, ErrorCode

SHIPPED = Path(__file__).parent / "profiles"


def list_profiles() -> list[str]:
    """Names of the profiles that ship."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


@lru_cache(maxsize=16)
def load_profile(name: str) -> Profile:
    """A shipped profile by name, or a file by its path. Raises AmpdError INVALID_REQUEST."""
    path = Path(name) if name.endswith(".json") or "/" in name else SHIPPED / f"{name}.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"no profile {name!r} ({error.strerror}): give the path of a profile's JSON file, or one of "
            f"{', '.join(list_profiles()) or 'none shipped'}",
        ) from error
    return decode_profile(data, name)
