"""Which part of a run is reported: all of it, or what happened between its warm-up and its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loadgen.records import RoundRecord, RunInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPart:
    """`rounds`: those sent in the measured time. `of_sessions`: every round of the sessions that arrived in it."""

    rounds: Sequence[RoundRecord]
    of_sessions: Sequence[RoundRecord]
    rounds_offered: int
    sessions_offered: int


def select_measured(run: RunInfo, records: Sequence[RoundRecord]) -> MeasuredPart:
    """A round that was never sent belongs to the time of the last one of its session that was.

    Rounds without any record (the run was killed) count as offered in the measured time.
    """
    if run.warm_up_s == 0.0 and run.until_s is None:
        return MeasuredPart(
            rounds=records,
            of_sessions=records,
            rounds_offered=run.rounds_offered,
            sessions_offered=run.sessions_offered,
        )
    until_s = float("inf") if run.until_s is None else run.until_s
    times: dict[int, float] = {}  # of each session: its latest round
    rounds: list[RoundRecord] = []
    sessions: set[int] = set()
    left_out: set[int] = set()
    for record in sorted(records, key=lambda one: (one.session_index, one.round)):
        time_s = record.sent_s if record.sent_s is not None else record.due_s
        if time_s is None:
            time_s = times.get(record.session_index, run.warm_up_s)
        is_measured = run.warm_up_s <= time_s < until_s
        if record.session_index not in times:
            (sessions if is_measured else left_out).add(record.session_index)
        times[record.session_index] = time_s
        if is_measured:
            rounds.append(record)
    return MeasuredPart(
        rounds=rounds,
        of_sessions=[record for record in records if record.session_index in sessions],
        rounds_offered=len(rounds) + run.rounds_offered - len(records),
        sessions_offered=run.sessions_offered - len(left_out),
    )
