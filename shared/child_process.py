"""Child processes that never outlive their parent (Linux: PR_SET_PDEATHSIG)."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: nothing may be loaded between fork and exec


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent is gone; die now if that has happened already.

    The kernel watches the *thread* that started this process: parents start children from their main thread.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def dying_with_this_process() -> Callable[[], None]:
    """A preexec_fn for subprocess.Popen: the child is killed when the calling thread's process ends."""
    parent_pid = os.getpid()
    return lambda: die_with_parent(parent_pid)
