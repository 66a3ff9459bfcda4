"""A trace, a rate and a seed: which sessions arrive when. The same for simulated and live runs.

With the same options `loadgen replay` sends the very same plan: sessions and arrivals are chosen by loadgen.plan.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from loadgen.plan import Plan, choose_sessions, make_plan
from loadgen.traces import TraceFormat, TraceSession
from shared.errors import AmpdError, ErrorCode

MAX_SESSIONS = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`sessions`, or as many as arrive in `duration` seconds, or all of the trace.

    `max_context` and `max_delay` cut as in a replay. `unknown_delay`: the gap before a round whose delay the trace
    does not know, seconds.
    """

    file: str
    format: TraceFormat | Literal["auto"] = "auto"
    rate: float
    sessions: int | None = None
    duration: float | None = None
    sample: bool = False
    max_context: int | None = None
    max_delay: float | None = None
    unknown_delay: float = 0.0
    seed: int = 0


def choose_workload(trace: Sequence[TraceSession], workload: Workload) -> list[TraceSession]:
    """The sessions, in the trace's order, with every delay known.

    A trace with fewer sessions than asked for is repeated: first as it is, then copies in orders drawn by the seed.
    Raises AmpdError INVALID_REQUEST for options that do not go together.
    """
    num_sessions = count_sessions(workload)
    if num_sessions is None or num_sessions <= len(trace):
        chosen = choose_sessions(trace, num_sessions, sample=workload.sample, seed=workload.seed)
    else:
        chosen = _repeat(trace, num_sessions, workload.seed)
    return [_fill_delays(session, workload.unknown_delay) for session in chosen]


def count_sessions(workload: Workload) -> int | None:
    """How many are asked for; None: all of the trace."""
    if workload.duration is None:
        return workload.sessions
    if workload.sessions is not None:
        raise AmpdError(ErrorCode.INVALID_REQUEST, "--sessions and --duration both say how many sessions: give one")
    num_sessions = max(1, round(workload.rate * workload.duration))
    if num_sessions > MAX_SESSIONS:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST, f"--rate x --duration is {num_sessions} sessions: {MAX_SESSIONS} at most"
        )
    return num_sessions


def plan_workload(chosen: Sequence[TraceSession], workload: Workload) -> Plan:
    return make_plan(
        chosen,
        rate=workload.rate,
        arrivals="poisson",
        max_context=workload.max_context,
        max_delay_s=workload.max_delay,
        seed=workload.seed,
    )


def describe_trace(trace: Sequence[TraceSession], workload: Workload, plan: Plan) -> dict[str, Any]:
    """The report's `trace`. `copies`: how often its sessions occur at most; above 1 the trace was repeated."""
    num_sessions = count_sessions(workload)
    copies = -(-len(plan.sessions) // max(1, len(trace)))
    return {
        "file": Path(workload.file).name,
        "selection": "repeated"
        if copies > 1
        else "all"
        if num_sessions is None
        else "sample"
        if workload.sample
        else "first",
        "copies": copies,
        "sessions_in_file": len(trace),
        "arrivals": plan.arrivals,
        "rate": plan.rate,
        "cuts": asdict(plan.cuts),
        "unknown_delay_s": workload.unknown_delay,
    }


def _repeat(trace: Sequence[TraceSession], num_sessions: int, seed: int) -> list[TraceSession]:
    """`num_sessions` of a trace with fewer; the copies' names say that they are copies."""
    draws = random.Random(f"{seed}/copies")
    sessions = list(trace)
    number = 1
    while trace and len(sessions) < num_sessions:
        number += 1
        copy = [msgspec.structs.replace(one, session_id=f"{one.session_id}~{number}") for one in trace]
        draws.shuffle(copy)
        sessions += copy
    return sessions[:num_sessions]


def _fill_delays(session: TraceSession, unknown_delay_s: float) -> TraceSession:
    if unknown_delay_s == 0.0 or all(one.delay_s is not None for one in session.rounds[1:]):
        return session
    first, *later = session.rounds
    filled = [
        one if one.delay_s is not None else msgspec.structs.replace(one, delay_s=unknown_delay_s) for one in later
    ]
    return msgspec.structs.replace(session, rounds=(first, *filled))
