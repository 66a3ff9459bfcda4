"""Flags that choose a scheduling policy and its variant: the same for every process that schedules."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from shared.core.policies import PARTS, POLICIES, SchedulingPolicy, find_policy, switch_off, with_options
from shared.errors import AmpdError, ErrorCode


def add_policy_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--policy", choices=list(POLICIES), default="ampd", help="how rounds are scheduled")
    disable_help = f"switch off a part of the policy, repeatable: {', '.join(PARTS)}"
    add("--disable", choices=list(PARTS), action="append", default=[], metavar="PART", help=disable_help)
    option_help = "set a parameter of the policy, repeatable: routing.alpha=0.5, routing.chunk.chunk_tokens=1024"
    add("--policy-option", action="append", default=[], metavar="PATH=VALUE", help=option_help)


def read_policy_options(texts: Sequence[str]) -> dict[str, str]:
    """PATH=VALUE texts by path. Raises AmpdError INVALID_REQUEST."""
    return dict(map(_split_option, texts))


def build_policy(name: str, disabled_parts: Sequence[str], options: Mapping[str, str]) -> SchedulingPolicy:
    """Raises AmpdError INVALID_REQUEST naming the policy, part or option at fault."""
    policy = find_policy(name)
    for part in disabled_parts:
        policy = switch_off(policy, part)
    return with_options(policy, options)


def _split_option(text: str) -> tuple[str, str]:
    path, equals, value = text.partition("=")
    if not (path and equals):
        raise AmpdError(
            ErrorCode.INVALID_REQUEST, f"--policy-option {text!r} must be PATH=VALUE, as in routing.alpha=0.5"
        )
    return path, value
