"""What is written down about a run: one RoundRecord a round (rounds.jsonl), one RunInfo a run (run.json).

The simulator writes the same, so that report.py makes the same report of both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from loadgen.percentiles import Runs
from loadgen.plan import PlannedRound, PlannedSession
from loadgen.traces import bad_line, read_lines
from shared.errors import AmpdError, ErrorCode
from shared.messages import FinishReason, Slo, StepTimes, Usage

NOT_SENT = "not_sent"  # error code of rounds that were never sent, because the session had stopped
INTERRUPTED = "interrupted"  # error code of rounds cut off or not reached when the run was stopped


class RoundError(msgspec.Struct, frozen=True):
    """`code` is an ErrorCode's value, or NOT_SENT, or INTERRUPTED."""

    code: str
    message: str


class RoundRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One round. Times are seconds since the start of the run; None: it did not come to that.

    `due_s` is when the round should have been sent: its session's arrival, or the end of the round before plus its
    delay. `planned_input_tokens` is what the trace says, `usage.num_input_tokens` what was counted.
    `token_times_s` has every token's time; where `gaps` is given (simulated rounds), the first token's alone, and
    `gaps` are those between the tokens after it, in order, equal ones counted: (how many, seconds).
    """

    session_index: int
    session_id: str  # in the trace
    round: int
    planned_input_tokens: int
    planned_output_tokens: int
    delay_s: float
    state: Literal["completed", "failed", "not_sent"]
    due_s: float | None = None
    sent_s: float | None = None
    accepted_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    token_times_s: tuple[float, ...] = ()
    gaps: tuple[tuple[Annotated[int, msgspec.Meta(ge=1)], Annotated[float, msgspec.Meta(ge=0.0)]], ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    num_recoveries: int = 0
    error: RoundError | None = None
    text: str | None = None  # the answer, for rounds with real content
    session: str | None = None  # its name on the cluster, where there is one; simulated rounds have none

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token, as the client saw it."""
        if self.sent_s is None or not self.token_times_s:
            return None
        return self.token_times_s[0] - self.sent_s

    @property
    def num_output_tokens(self) -> int:
        """As many as reached the client."""
        return len(self.token_times_s) + sum(count for count, _ in self.gaps)

    @property
    def itl_runs(self) -> Runs:
        """Gaps between successive output tokens, (how many, seconds); tokens of one message have gaps of 0 between
        them."""
        if self.gaps:
            return self.gaps
        return [(1, later - earlier) for earlier, later in itertools.pairwise(self.token_times_s)]

    @property
    def itls_s(self) -> list[float]:
        """The same one by one."""
        return [itl_s for count, itl_s in self.itl_runs for _ in range(count)]

    @property
    def tpot_s(self) -> float | None:
        """(last - first) / (n - 1); None for fewer than two tokens."""
        if self.gaps:
            return sum(count * itl_s for count, itl_s in self.gaps) / sum(count for count, _ in self.gaps)
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """All that a report needs beside the rounds. `config`: the options of the run, as given.

    The report is of the rounds sent in [warm_up_s, until_s) alone, where these are given. `simulation`: what a
    simulated run was of, and what it took.
    """

    kind: Literal["live", "simulated"]
    policy: str
    model: str
    seed: int
    slo: Slo
    rounds_offered: int
    sessions_offered: int
    config: dict[str, Any]
    trace: dict[str, Any]  # file, sessions, cuts, arrivals, rate
    machine: dict[str, Any]
    warm_up_s: float = 0.0
    until_s: float | None = None
    simulation: dict[str, Any] | None = None
    step_times: dict[str, StepTimes] | None = None  # of live workers that have a profile, since each began


def record_unsent(
    session: PlannedSession, index: int, planned: PlannedRound, code: str, message: str, name: str
) -> RoundRecord:
    return RoundRecord(
        session_index=session.index,
        session_id=session.session_id,
        round=index,
        planned_input_tokens=planned.input_tokens,
        planned_output_tokens=planned.output_tokens,
        delay_s=planned.delay_s,
        state="not_sent",
        error=RoundError(code, message),
        session=name,
    )


def find_missing(
    sessions: Iterable[PlannedSession],
    records: Iterable[RoundRecord],
    name_session: Callable[[int], str],
    *,
    interrupted: bool,
) -> Iterator[RoundRecord]:
    """A record for every round that has none: offered, not sent, and counted against attainment."""
    seen = {(record.session_index, record.round) for record in records}
    code, message = (
        (INTERRUPTED, "the replay was stopped") if interrupted else (NOT_SENT, "an earlier round of the session failed")
    )
    for session in sessions:
        for index, planned in enumerate(session.rounds):
            if (session.index, index) not in seen:
                yield record_unsent(session, index, planned, code, message, name_session(session.index))


def encode_record(record: RoundRecord) -> bytes:
    """One line of rounds.jsonl; ttft_s and tpot_s are added for the reader's convenience."""
    line = msgspec.to_builtins(record)
    line["ttft_s"], line["tpot_s"] = record.ttft_s, record.tpot_s
    return msgspec.json.encode(line) + b"\n"


def read_records(path: Path) -> list[RoundRecord]:
    """Raises AmpdError INVALID_REQUEST naming the line."""
    decoder = msgspec.json.Decoder(RoundRecord)
    records = []
    for number, line in read_lines(path):
        try:
            records.append(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise bad_line(path, number, error) from error
    return records


def encode_run(run: RunInfo) -> bytes:
    return msgspec.json.format(msgspec.json.encode(run), indent=2) + b"\n"


def read_run(path: Path) -> RunInfo:
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunInfo)
    except OSError as error:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST, f"cannot read {path}: {error.strerror}; give the --out folder of a replay"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"{path}: {error}") from error
