"""Settings of the coordinator's core. Durations in seconds; every bound of its queues and retries is here."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.core.routing import POLICIES, RoutingParameters
from shared.errors import AmpdError, ErrorCode


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    policy: str = "ampd"
    routing: RoutingParameters = field(default_factory=RoutingParameters)

    # admission
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
        if self.policy not in POLICIES:
            raise AmpdError(
                ErrorCode.INVALID_REQUEST, f"unknown policy {self.policy!r}: choose one of {', '.join(POLICIES)}"
            )
