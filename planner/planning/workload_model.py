"""What arrives: a sample of sessions with all their rounds, and how sessions arrive.

The sample is the distribution: rounds, inputs, outputs, contexts and tool gaps keep how they go together (long sessions
have long contexts), which means and quantiles of each alone would lose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from loadgen.plan import PlannedSession
from shared.errors import AmpdError, ErrorCode

MAX_SESSIONS = 2_000  # of a sample: more would only take longer
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class RoundShape:
    """`delay_s`: the tool's time before it, 0 for the first."""

    num_history_tokens: int
    num_input_tokens: int
    num_output_tokens: int
    delay_s: float

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_history_tokens + self.num_input_tokens

    @property
    def num_total_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens


SessionShape = tuple[RoundShape, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadModel:
    """`sessions_per_s`: mean arrival rate. `burstiness`: squared coefficient of variation of the times between
    arrivals; 1 for Poisson arrivals."""

    sessions: tuple[SessionShape, ...]
    sessions_per_s: float
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        _require(bool(self.sessions), "the workload has no session: give a trace with at least one")
        _require(all(self.sessions), "the workload has a session without a round")
        rate = self.sessions_per_s
        _require(0 < rate < math.inf, f"sessions_per_s must be a positive number, got {rate!r}")
        burst = self.burstiness
        _require(0 <= burst < math.inf, f"burstiness must be a number of at least 0, got {burst!r}")

    @property
    def num_rounds(self) -> int:
        return sum(map(len, self.sessions))

    @property
    def longest_context(self) -> int:
        """Tokens of the longest session to its end."""
        return max(session[-1].num_total_tokens for session in self.sessions)

    def mean_per_session(self, values: Sequence[float]) -> float:
        return sum(values) / len(self.sessions)

    def describe(self) -> dict[str, Any]:
        """Distributions, for people and for JSON: means and the 50th, 90th and 99th percentiles."""
        rounds = [one for session in self.sessions for one in session]
        later = [one for session in self.sessions for one in session[1:]]
        return {
            "sessions": len(self.sessions),
            "sessions_per_s": self.sessions_per_s,
            "burstiness": self.burstiness,
            "rounds_per_session": describe_values([len(session) for session in self.sessions]),
            "first_input_tokens": describe_values([session[0].num_input_tokens for session in self.sessions]),
            "incremental_input_tokens": describe_values([one.num_input_tokens for one in later]),
            "output_tokens": describe_values([one.num_output_tokens for one in rounds]),
            "prompt_tokens": describe_values([one.num_prompt_tokens for one in rounds]),
            "tool_gap_s": describe_values([one.delay_s for one in later]),
        }


def model_sessions(
    sessions: Sequence[PlannedSession], sessions_per_s: float, *, burstiness: float = 1.0
) -> WorkloadModel:
    """Of planned sessions, MAX_SESSIONS of them at equal distances. Raises AmpdError INVALID_REQUEST."""
    step = max(1, -(-len(sessions) // MAX_SESSIONS))
    shapes = tuple(_shape(session) for session in sessions[::step])
    return WorkloadModel(sessions=shapes, sessions_per_s=sessions_per_s, burstiness=burstiness)


def measure_burstiness(arrivals_s: Sequence[float]) -> float:
    """Of recorded arrivals in ascending order; 1 where there are too few to tell."""
    gaps = [later - earlier for earlier, later in pairwise(arrivals_s)]
    mean_s = sum(gaps) / len(gaps) if gaps else 0.0
    if len(gaps) < 10 or mean_s <= 0.0:
        return 1.0
    return sum((gap - mean_s) ** 2 for gap in gaps) / len(gaps) / mean_s**2


def _shape(session: PlannedSession) -> SessionShape:
    history, shapes = 0, []
    for planned in session.rounds:
        shapes.append(RoundShape(history, planned.input_tokens, planned.output_tokens, planned.delay_s))
        history += planned.input_tokens + planned.output_tokens
    return tuple(shapes)


def describe_values(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"mean": 0.0, **{f"p{100 * q:g}": 0.0 for q in QUANTILES}}
    ordered = sorted(values)
    quantiles = {f"p{100 * q:g}": float(ordered[min(len(ordered) - 1, int(q * len(ordered)))]) for q in QUANTILES}
    return {"mean": sum(ordered) / len(ordered), **quantiles}


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AmpdError(ErrorCode.INVALID_REQUEST, message)
