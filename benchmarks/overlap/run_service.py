"""A service's process that knows one policy more: `run_service.py MODULE ARGUMENTS`.

`remote-later`: first rounds on their decode worker, later ones on a prefill worker that keeps nothing between them. So
every later round has its whole history to read, and its increment to give.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is not installed

from benchmarks.overlap.policy import REMOTE_LATER
from shared.core.policies import POLICIES

if __name__ == "__main__":
    POLICIES[REMOTE_LATER.name] = REMOTE_LATER
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
