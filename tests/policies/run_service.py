"""A service's process that knows the policies of moving_policy.py, too: `run_service.py MODULE ARGUMENTS`."""

from __future__ import annotations

import runpy
import sys

from moving_policy import MIXED, MOVING

from shared.core.policies import POLICIES

if __name__ == "__main__":
    POLICIES.update({policy.name: policy for policy in (MOVING, MIXED)})
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
