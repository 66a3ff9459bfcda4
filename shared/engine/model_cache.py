"""Folders that are made once and then only read, by any number of processes.

Invariant: a folder under its final name is complete. It is made under a temporary name, flushed to disk and
renamed; a maker that dies leaves only a temporary folder, which the next one removes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import AmpdError, ErrorCode

LOCK_WAIT_S = 600.0
LOCK_POLL_S = 0.1


def default_cache_dir() -> Path:
    """$AMPD_CACHE_DIR, else $XDG_CACHE_HOME/ampd, else ~/.cache/ampd."""
    if own := os.environ.get("AMPD_CACHE_DIR"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "ampd"
    return Path.home() / ".cache" / "ampd"


def make_once(
    cache_dir: Path,
    key: str,
    make: Callable[[Path], None],
    report: Callable[[str], None],
    *,
    lock_wait_s: float = LOCK_WAIT_S,
) -> Path:
    """The folder `cache_dir/models/key`, made by `make(empty_folder)` if nobody has made it yet.

    Raises AmpdError INVALID_REQUEST if the folder cannot be written, INTERNAL if another process has been making
    the same folder for longer than `lock_wait_s` seconds; whatever else `make` raises passes through.
    """
    folder = cache_dir / "models" / key
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f"{key}.lock", lock_wait_s, report):
            if not folder.is_dir():  # somebody else may have made it while we waited
                _make_and_rename(folder, make)
    except OSError as error:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"cannot make a model in the cache {cache_dir} ({error}): set AMPD_CACHE_DIR to a folder with room in it",
        ) from error
    return folder


def _make_and_rename(folder: Path, make: Callable[[Path], None]) -> None:
    """Only under the lock: every temporary folder found here was left by a maker that died."""
    prefix = f".{folder.name}."
    for abandoned in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(abandoned)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        make(temporary)
        temporary.chmod(0o755)  # mkdtemp's 0700 (and safetensors' 0600) would hide it from other users
        for path in temporary.iterdir():
            path.chmod(0o644)
            _flush_to_disk(path)
        temporary.rename(folder)
        _flush_to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path, wait_s: float, report: Callable[[str], None]) -> Iterator[None]:
    """Hold an exclusive lock on the file. The kernel releases it when its holder exits, however that happens."""
    deadline = time.monotonic() + wait_s
    with path.open("w") as file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise AmpdError(
                        ErrorCode.INTERNAL, f"another process has held {path} for {wait_s:.0f} s: is it stuck?"
                    ) from None
                if not waiting:
                    report(f"waiting for another process that is making {path.stem}")
                    waiting = True
                time.sleep(LOCK_POLL_S)
        yield  # closing the file releases the lock
