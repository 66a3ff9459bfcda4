"""Flags that choose a scheduling policy and its variant: the same for every command and process that schedules.

The policies are imported when somebody asks for them: a command line that only shows its help does not wait.
"""

from __future__ import annotations

import argparse
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from shared.errors import AmpdError, ErrorCode

if TYPE_CHECKING:
    from shared.core.policies import SchedulingPolicy

DEFAULT_POLICY = "ampd"


def add_policy_flags(parser: argparse.ArgumentParser, *, default: str = DEFAULT_POLICY) -> None:
    add = parser.add_argument
    policy_help = "how rounds are scheduled: %(choices)s (default: %(default)s)"
    add("--policy", choices=Names("POLICIES"), default=default, metavar="P", help=policy_help)
    disable_help = "switch off a part of the policy, repeatable: %(choices)s"
    add("--disable", choices=Names("PARTS"), action="append", default=[], metavar="PART", help=disable_help)
    option_help = "a parameter of the policy, repeatable: routing.alpha=0.5, routing.chunk.chunk_tokens=1024"
    add("--policy-option", action="append", default=[], metavar="PATH=VALUE", help=option_help)


class Names(Container[str], Iterable[str]):
    """Keys of a table of shared.core.policies."""

    def __init__(self, table: str) -> None:
        self._table = table

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)

    def __iter__(self) -> Iterator[str]:
        from shared.core import policies

        names: Iterable[str] = getattr(policies, self._table)
        return iter(names)


def read_policy_options(texts: Sequence[str]) -> dict[str, str]:
    """PATH=VALUE texts by path. Raises AmpdError INVALID_REQUEST."""
    return dict(map(_split_option, texts))


def build_policy(name: str, disabled_parts: Sequence[str], options: Mapping[str, str]) -> SchedulingPolicy:
    """Raises AmpdError INVALID_REQUEST naming the policy, part or option at fault."""
    from shared.core.policies import find_policy, switch_off, with_options

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
