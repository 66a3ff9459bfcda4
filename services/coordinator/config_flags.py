"""The coordinator's settings as command-line flags: of the service, and of the replay of its event log."""

from __future__ import annotations

import argparse

from shared.core.coordinator_config import CoordinatorConfig
from shared.errors import AmpdError, ErrorCode
from shared.policy_flags import add_policy_flags, read_policy_options
from shared.profile_files import list_profiles, load_profile


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    default = CoordinatorConfig()
    add = parser.add_argument
    add_policy_flags(parser)
    add(
        "--profile",
        metavar="NAME|PATH",
        help=f"timings of the workers, instead of what they measure: {', '.join(list_profiles()) or 'a file'}",
    )
    add("--cost-scale", type=float, default=default.cost_scale, help="workers run so many times slower than --profile")
    add("--admission-factor", type=float, default=default.admission_factor, help="of a first round's TTFT objective")
    add("--max-sessions", type=int, default=default.max_sessions)
    add("--max-sessions-per-tenant", type=int, default=default.max_sessions_per_tenant)
    add("--max-rounds-in-flight", type=int, default=default.max_rounds_in_flight)
    add("--max-attempts", type=int, default=default.max_attempts, help="placements of one round")
    add("--max-deadline", type=float, default=default.max_deadline_s, metavar="S", help="longest deadline_s of a round")
    add("--heartbeat-timeout", type=float, default=default.heartbeat_timeout_s, metavar="S")


def read_config(args: argparse.Namespace) -> CoordinatorConfig:
    """Raises AmpdError INVALID_REQUEST naming the flag at fault."""
    for name in ("max_sessions", "max_sessions_per_tenant", "max_rounds_in_flight", "max_attempts"):
        if getattr(args, name) < 1:
            raise AmpdError(ErrorCode.INVALID_REQUEST, f"--{name.replace('_', '-')} must be at least 1")
    for name in ("cost_scale", "admission_factor", "max_deadline", "heartbeat_timeout"):
        if not 0 < getattr(args, name) < float("inf"):
            raise AmpdError(ErrorCode.INVALID_REQUEST, f"--{name.replace('_', '-')} must be more than 0")
    return CoordinatorConfig(
        policy=args.policy,
        disabled_parts=tuple(args.disable),
        policy_options=read_policy_options(args.policy_option),
        profile=load_profile(args.profile) if args.profile is not None else None,
        cost_scale=args.cost_scale,
        admission_factor=args.admission_factor,
        max_sessions=args.max_sessions,
        max_sessions_per_tenant=args.max_sessions_per_tenant,
        max_rounds_in_flight=args.max_rounds_in_flight,
        max_attempts=args.max_attempts,
        max_deadline_s=args.max_deadline,
        heartbeat_timeout_s=args.heartbeat_timeout,
    )
