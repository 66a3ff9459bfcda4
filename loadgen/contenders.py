"""Who is compared: a policy, its variant, and the workers it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from shared.errors import AmpdError, ErrorCode
from shared.messages import Role
from shared.policy_flags import build_policy, read_policy_options

SPEC = "ROLE:COUNT or ROLE:COUNTxDEVICES, as in prefill:8x2,decode:8x2"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    role: Role
    count: int
    parallel_degree: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    policy: str
    workers: tuple[WorkerSpec, ...]
    disabled_parts: tuple[str, ...] = ()
    policy_options: tuple[str, ...] = ()  # PATH=VALUE

    def describe_workers(self) -> str:
        return " + ".join(
            f"{one.count} {one.role}" + (f" x {one.parallel_degree}" if one.parallel_degree > 1 else "")
            for one in self.workers
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "cluster": self.describe_workers(),
            "disabled_parts": list(self.disabled_parts),
            "policy_options": list(self.policy_options),
        }


def make_contenders(
    policies: Sequence[str],
    default_workers: tuple[WorkerSpec, ...] | None,
    clusters: Sequence[str],
    disabled_parts: Sequence[str],
    policy_options: Sequence[str],
) -> list[Contender]:
    """`clusters` are [POLICY=]SPEC, the others POLICY:PART and POLICY:PATH=VALUE.

    Raises AmpdError INVALID_REQUEST for a policy, part, option or cluster that does not exist, or is missing.
    """
    by_policy: dict[str, tuple[WorkerSpec, ...]] = {}
    for text in clusters:
        name, equals, spec = text.rpartition("=")
        if equals:
            by_policy[_known(name, policies, "--cluster")] = parse_workers(spec)
        else:
            default_workers = parse_workers(spec)
    parts = [_split(text, policies, "--disable") for text in disabled_parts]
    options = [_split(text, policies, "--policy-option") for text in policy_options]
    contenders = []
    for policy in policies:
        workers = by_policy.get(policy, default_workers)
        if workers is None:
            raise AmpdError(
                ErrorCode.INVALID_REQUEST,
                f"policy {policy} has no workers: give --prefill, --decode, --both, or --cluster [{policy}=]{SPEC}",
            )
        contender = Contender(
            policy=policy,
            workers=workers,
            disabled_parts=tuple(part for name, part in parts if name == policy),
            policy_options=tuple(option for name, option in options if name == policy),
        )
        build_policy(policy, contender.disabled_parts, read_policy_options(contender.policy_options))
        contenders.append(contender)
    return contenders


def parse_workers(spec: str) -> tuple[WorkerSpec, ...]:
    """prefill:8x2,decode:8x2. Raises AmpdError INVALID_REQUEST."""
    workers = tuple(_parse_group(part.strip(), spec) for part in spec.split(","))
    if len({one.role for one in workers}) < len(workers):
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"cluster {spec!r} names a role twice")
    if all(one.role == "prefill" for one in workers):
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"cluster {spec!r}: no worker decodes, give decode or both workers")
    return workers


def _parse_group(text: str, spec: str) -> WorkerSpec:
    role, _, size = text.partition(":")
    count, times, degree = size.partition("x")
    if role not in get_args(Role) or not count.isdecimal() or (times and not degree.isdecimal()):
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"cluster {spec!r}: {text!r} is not {SPEC}")
    parallel_degree = int(degree) if times else 1
    if int(count) < 1 or parallel_degree < 1:
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"cluster {spec!r}: {text!r} must count from 1")
    return WorkerSpec(role=role, count=int(count), parallel_degree=parallel_degree)  # type: ignore[arg-type]


def _split(text: str, policies: Sequence[str], flag: str) -> tuple[str, str]:
    name, colon, rest = text.partition(":")
    if not (colon and rest):
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"{flag} {text!r} must begin with its policy, as in ampd:...")
    return _known(name, policies, flag), rest


def _known(name: str, policies: Sequence[str], flag: str) -> str:
    if name not in policies:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST, f"{flag} is of policy {name!r}, which is not compared: {', '.join(policies)} are"
        )
    return name
