"""A cluster's data directory: it belongs to one running cluster, and to one model."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO

from services.cluster_options import EMULATED_SUFFIX
from shared.errors import AmpdError, ErrorCode


def lock_data_dir(data_dir: Path) -> IO[str]:
    """Hold the folder for this process; the lock ends with the file's closing, so also with the process."""
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = (data_dir / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip()
        lock.close()
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"{data_dir} is in use by another cluster (pid {owner}): stop it or give another --data-dir",
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def check_same_model(data_dir: Path, model: str) -> None:
    """Sessions are token ids, which mean nothing to another model: refuse it, or note ours in a new folder.

    model: as ClusterOptions.served names it.
    """
    note = data_dir / "cluster.json"
    if note.exists():
        try:
            known = json.loads(note.read_text())["model"]
        except (ValueError, KeyError, TypeError) as error:
            raise AmpdError(
                ErrorCode.INVALID_REQUEST, f"{note} cannot be read ({error}): give another --data-dir"
            ) from error
        if known != model:
            raise AmpdError(
                ErrorCode.INVALID_REQUEST,
                f"{data_dir} holds sessions of {known!r}: give {_name_flags(known)}, or another --data-dir",
            )
    else:
        note.write_text(json.dumps({"model": model}) + "\n")


def _name_flags(served: str) -> str:
    """What `ampd up` must be told to serve this again."""
    profile = served.removesuffix(EMULATED_SUFFIX)
    return f"--model {served}" if profile == served else f"--engine emulated --profile {profile}"
