"""A simulated run in loadgen's terms: a RoundRecord a round, and what the run amounted to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from loadgen.plan import PlannedSession
from loadgen.records import NOT_SENT, RoundError, RoundRecord
from planner.simulator.rounds import SimRound
from planner.simulator.simulation import Result
from shared.errors import ErrorCode
from shared.messages import Usage

TIME_DIGITS = 6  # as a replay writes them
GAP_DIGITS = 7
MESSAGES = {
    ErrorCode.CONTEXT_TOO_LONG.value: "the round does not fit into the KV memory of its decode worker",
    ErrorCode.OVERLOADED.value: "refused: its first token would have come too late",
    ErrorCode.NO_DECODE_WORKER.value: "no worker that was alive could decode it",
}
CODES = {"no_worker": ErrorCode.NO_DECODE_WORKER.value}  # the simulator's names where they are not the API's


def record_rounds(result: Result, sessions: Sequence[PlannedSession]) -> list[RoundRecord]:
    """A record for every offered round, by session and round.

    After a failed round the session's others are `not_sent`. A round that the simulator neither ended nor failed found
    no worker.
    """
    by_session: dict[int, dict[int, SimRound]] = defaultdict(dict)
    for round_ in result.rounds:
        by_session[round_.session.index][round_.index] = round_
    return [record for session in sessions for record in _record_session(session, by_session[session.index])]


def _record_session(session: PlannedSession, rounds: dict[int, SimRound]) -> list[RoundRecord]:
    records: list[RoundRecord] = []
    due_s, has_failed = session.arrival_s, False
    for index, planned in enumerate(session.rounds):
        due_s += planned.delay_s if index else 0.0
        round_ = rounds.get(index)
        if round_ is not None and not round_.error and round_.finished_at >= 0.0:
            records.append(_record_completed(session, round_))
            due_s = round_.finished_at
            continue
        error, state = RoundError(NOT_SENT, "an earlier round of the session failed"), "not_sent"
        if not has_failed:
            code = ErrorCode.NO_DECODE_WORKER.value if round_ is None else CODES.get(round_.error, round_.error)
            error, state = RoundError(code, MESSAGES.get(code, "the round failed")), "failed"
        sent_s = round_.sent_at if round_ is not None else None if has_failed else due_s
        first_s = round_.first_token_at if round_ is not None and round_.first_token_at >= 0.0 else None
        records.append(
            RoundRecord(
                session_index=session.index,
                session_id=session.session_id,
                round=index,
                planned_input_tokens=planned.input_tokens,
                planned_output_tokens=planned.output_tokens,
                delay_s=planned.delay_s,
                state="failed" if state == "failed" else "not_sent",
                due_s=None if has_failed else _time(due_s),
                sent_s=None if sent_s is None else _time(sent_s),
                first_token_s=None if first_s is None else _time(first_s),
                token_times_s=() if first_s is None else (_time(first_s),),
                gaps=_gaps(round_) if round_ is not None and first_s is not None else (),
                error=error,
            )
        )
        has_failed = True
    return records


def _record_completed(session: PlannedSession, round_: SimRound) -> RoundRecord:
    planned = round_.planned
    first_s, finished_s = _time(round_.first_token_at), _time(round_.finished_at)
    return RoundRecord(
        session_index=session.index,
        session_id=session.session_id,
        round=round_.index,
        planned_input_tokens=planned.input_tokens,
        planned_output_tokens=planned.output_tokens,
        delay_s=planned.delay_s,
        state="completed",
        due_s=_time(round_.sent_at),
        sent_s=_time(round_.sent_at),
        accepted_s=_time(round_.sent_at),
        first_token_s=first_s,
        finished_s=finished_s,
        token_times_s=(first_s,),
        gaps=_gaps(round_),
        finish_reason="length",
        usage=_usage(round_),
    )


def _usage(round_: SimRound) -> Usage:
    """Queued, transfer and prefill together are the time to the first token; control messages count as queued.

    What a local prefill waits for (host memory, the KV of a session that moves) comes before it, what a remote one
    waits for (its way to the decode worker) after it. A remote prefill's wait for its history is part of its queue.
    """
    assert round_.decision is not None, "a round that ended was placed"
    started_at = round_.started_at if round_.started_at >= 0.0 else round_.sent_at
    before_s, after_s = max(0.0, started_at - round_.sent_at), max(0.0, round_.first_token_at - started_at)
    transfer_s = min(round_.transfer_s, after_s if round_.is_remote else before_s)
    return Usage(
        num_history_tokens=round_.num_history,
        num_input_tokens=round_.planned.input_tokens,
        num_cached_tokens=min(round_.num_cached, round_.num_history),
        num_output_tokens=round_.planned.output_tokens,
        prefill=round_.decision.placement,
        prefill_worker=round_.decision.worker_id,
        decode_worker=round_.decode.load.worker_id,
        kv_bytes_read=round_.kv_bytes_read,
        kv_bytes_written=round_.kv_bytes_written,
        queued_s=_time(before_s if round_.is_remote else before_s - transfer_s),
        transfer_s=_time(transfer_s),
        prefill_s=_time(after_s - transfer_s if round_.is_remote else after_s),
        decode_s=_time(round_.finished_at - round_.first_token_at),
        num_attempts=round_.attempt,
        num_preemptions=round_.num_preemptions,
    )


def _gaps(round_: SimRound) -> tuple[tuple[int, float], ...]:
    """Rounded, and what is then equal counted together."""
    gaps: list[tuple[int, float]] = []
    for count, gap_s in round_.gaps:
        gap_s = round(gap_s, GAP_DIGITS)
        if gaps and gaps[-1][1] == gap_s:
            gaps[-1] = (gaps[-1][0] + count, gap_s)
        elif count:
            gaps.append((count, gap_s))
    return tuple(gaps)


def _time(time_s: float) -> float:
    return round(time_s, TIME_DIGITS)


def describe_result(result: Result, wall_s: float) -> dict[str, Any]:
    """What only a simulation knows. `kv_bytes_moved`: over every link, staging and moved sessions included."""
    counters = asdict(result.counters)
    num_events = counters.pop("events")
    num_placed = result.counters.local + result.counters.remote
    return {
        "local_share": round(result.counters.local / num_placed, 6) if num_placed else None,
        "kv_bytes_moved": result.kv_bytes_moved,
        "num_evicted_tokens": result.num_evicted_tokens,
        "num_preemptions": result.num_preemptions,
        "simulated_s": round(result.end_s, 6),
        "wall_s": round(wall_s, 3),
        "num_events": num_events,
        "counters": counters,
    }
