"""Settings of the coordinator's core. Durations in seconds; every bound of its queues and retries is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from shared.core.patience import ADMISSION_FACTOR
from shared.core.policies import SchedulingPolicy, find_policy, switch_off, with_options
from shared.core.profile import Profile
from shared.errors import AmpdError, ErrorCode


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    # scheduling: a policy by name, without the parts switched off, with options by path; `scheduling` follows from them
    policy: str = "ampd"
    disabled_parts: tuple[str, ...] = ()
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    scheduling: SchedulingPolicy = field(init=False)
    profile: Profile | None = None  # timings of the workers; None: as their heartbeats measure them
    cost_scale: float = 1.0  # workers run this many times slower than the profile (emulated ones may)

    # residency and staging
    max_holders: int = 8  # prefill workers that are known to hold a part of one session's KV
    min_staged_tokens: int = 64  # fewer are not worth a message
    max_staging_in_flight: int = 32
    staging_timeout_s: float = 30.0  # one that is not heard of for so long is given up
    move_grant_timeout_s: float = 1.0  # how long a session that moves waits for the worker that it leaves

    # explanations
    decisions_kept: int = 64  # of a session's newest rounds
    closed_explained: int = 256  # closed sessions whose decisions can still be asked for

    # admission
    admission_factor: float = ADMISSION_FACTOR  # of the TTFT objective, beyond which a session's first round is refused
    max_sessions: int = 10_000
    max_sessions_per_tenant: int = 10_000
    max_rounds_in_flight: int = 1_024
    kv_overcommit: float = 4.0  # tokens of rounds in flight on a worker, in units of its KV pool
    max_deadline_s: float = 3_600.0
    max_idle_timeout_s: float = 86_400.0
    max_rounds_per_session: int = 10_000
    rounds_kept: int = 256  # ended rounds of a session that can be read, and whose idempotency keys count

    # workers
    heartbeat_timeout_s: float = 3.0
    suspect_s: float = 5.0  # a worker that lets commands time out gets no new work for this long
    role_change_patience_s: float = 10.0  # a change of role that no heartbeat tells of by then is given up
    max_role_waiters: int = 8  # requests that wait for one change
    worker_memory_s: float = 600.0  # a lost worker is forgotten after this long

    # rounds
    max_attempts: int = 5
    first_backoff_s: float = 0.2  # before the third attempt; the second starts at once, then four times longer
    last_backoff_s: float = 2.0
    placement_retry_s: float = 0.1
    no_worker_patience_s: float = 60.0  # how long a round in flight waits for a decode worker to appear
    cancel_patience_s: float = 1.0  # how long the end of a cancelled round waits for the worker to confirm
    command_timeout_s: float = 2.0
    max_command_tries: int = 3
    append_backoff_s: float = 0.5

    # requests that wait (a round about to end, a session being reconciled, workers not heard of yet)
    hold_s: float = 8.0
    max_held: int = 4_096
    max_held_per_session: int = 8

    def __post_init__(self) -> None:
        """Raises AmpdError INVALID_REQUEST for an unknown policy, part or option, or a number out of range."""
        scheduling = find_policy(self.policy)
        for part in self.disabled_parts:
            scheduling = switch_off(scheduling, part)
        object.__setattr__(self, "scheduling", with_options(scheduling, self.policy_options))
        if self.max_holders < 2:
            raise AmpdError(ErrorCode.INVALID_REQUEST, f"max_holders must be at least 2, got {self.max_holders}")
        for name in ("cost_scale", "admission_factor"):
            value = getattr(self, name)
            if not (isfinite(value) and value > 0):
                raise AmpdError(ErrorCode.INVALID_REQUEST, f"{name} must be more than 0, got {value}")
