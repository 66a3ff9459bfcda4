"""`python -m services.coordinator.replay LOG`: an event log through a fresh core, and what came out.

The core is deterministic: with the flags that the coordinator had, it decides what it decided then. The digest is of
every command in order: two replays that agree in it have decided the same. A coordinator that was started again has
appended to its log: each of its lives, which begin with RecordsLoaded, gets a core of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from services.coordinator.config_flags import add_config_flags, read_config
from services.coordinator.event_log import read_event_log
from shared.core.coordinator import Coordinator
from shared.core.coordinator_config import CoordinatorConfig
from shared.core.events import Event, RecordsLoaded
from shared.errors import AmpdError

_ENCODER = msgspec.json.Encoder()


@dataclass(slots=True)
class ReplaySummary:
    """Events and commands by kind, the seconds that the log spans, and what the core counted."""

    events: Counter[str] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    counters: Counter[str] = field(default_factory=Counter)
    span_s: float = 0.0
    num_sessions: int = 0
    digest: str = ""


def replay(config: CoordinatorConfig, log: Iterable[tuple[float, Event]]) -> ReplaySummary:
    """Feed every event, checking the core's invariants at the end of each life (AssertionError: they do not hold)."""
    summary, core = ReplaySummary(), Coordinator(config)
    digest = hashlib.blake2b(digest_size=16)
    before: float | None = None
    for now, event in log:
        if isinstance(event, RecordsLoaded):
            _end_life(summary, core)
            core, before = Coordinator(config), None
        summary.span_s += 0.0 if before is None else now - before
        before = now
        summary.events[type(event).__name__] += 1
        for command in core.on_event(event, now):
            summary.commands[type(command).__name__] += 1
            digest.update(_ENCODER.encode(command))
    _end_life(summary, core)
    summary.digest = digest.hexdigest()
    return summary


def _end_life(summary: ReplaySummary, core: Coordinator) -> None:
    core.check_integrity()
    summary.counters.update(core.state.counters)
    summary.num_sessions = len(core.state.sessions)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m services.coordinator.replay",
        description="Replays an event log (--event-log of the coordinator) into a fresh core.",
        epilog="give the flags that the coordinator had: they are part of what it decided",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("log", type=Path, metavar="LOG")
    add_config_flags(parser)
    args = parser.parse_args()
    try:
        summary = replay(read_config(args), read_event_log(args.log))
    except AmpdError as error:
        parser.error(error.message)
    except (OSError, msgspec.DecodeError) as error:
        print(f"{args.log} cannot be read: {error}", file=sys.stderr)
        return 1
    print(
        f"{summary.events.total()} events over {summary.span_s:.1f} s, {summary.num_sessions} sessions open at the end"
    )
    for title, counts in (("events", summary.events), ("commands", summary.commands), ("counters", summary.counters)):
        print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items()) if count))
    print(f"digest {summary.digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
