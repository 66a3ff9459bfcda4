"""What will be sent, and when: a trace cut to size, with arrival times. Pure: the same seed gives the same plan."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from loadgen.mooncake import GRID_S
from loadgen.traces import TraceRound, TraceSession
from shared.errors import AmpdError, ErrorCode
from shared.messages import ChatMessage

Arrivals = Literal["poisson", "recorded"]
DEFAULT_RATE = 1.0  # sessions a second, where the trace does not know its arrivals and --rate is not given


@dataclass(frozen=True, slots=True)
class PlannedRound:
    """One round to send `delay_s` after the end of the one before. Without content: `input_tokens` random ids."""

    input_tokens: int
    output_tokens: int
    delay_s: float
    messages: tuple[ChatMessage, ...] | None = None
    text: str | None = None

    @property
    def has_content(self) -> bool:
        return self.messages is not None or self.text is not None


@dataclass(frozen=True, slots=True)
class PlannedSession:
    """`arrival_s`: seconds after the start of the replay."""

    index: int
    session_id: str
    arrival_s: float
    rounds: tuple[PlannedRound, ...]

    @property
    def num_tokens(self) -> int:
        return sum(one.input_tokens + one.output_tokens for one in self.rounds)

    @property
    def has_content(self) -> bool:
        return self.rounds[0].has_content


@dataclass(slots=True)
class Cuts:
    """What was taken from the trace to make it fit."""

    inputs_truncated: int = 0
    outputs_truncated: int = 0
    rounds_dropped: int = 0
    sessions_cut: int = 0
    delays_capped: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Sessions in order of arrival. `rate`: their mean arrival rate, sessions a second; None for a single one."""

    sessions: tuple[PlannedSession, ...]
    arrivals: Arrivals
    rate: float | None
    cuts: Cuts = field(default_factory=Cuts)

    @property
    def num_rounds(self) -> int:
        return sum(len(session.rounds) for session in self.sessions)


def make_plan(
    trace: Iterable[TraceSession],
    *,
    num_sessions: int | None = None,
    sample: bool = False,
    rate: float | None = None,
    arrivals: Arrivals | None = None,
    max_context: int | None = None,
    max_delay_s: float | None = None,
    seed: int = 0,
) -> Plan:
    """Choose, cut and time the sessions of a replay.

    The first `num_sessions` are taken, or with `sample` as many drawn by the seed from the whole trace.
    Raises AmpdError INVALID_REQUEST when nothing is left to send or the arrivals asked for are not known.
    """
    chosen = choose_sessions(trace, num_sessions, sample=sample, seed=seed)
    if not chosen:
        raise AmpdError(ErrorCode.INVALID_REQUEST, "the trace has no sessions: nothing to replay")
    if arrivals is None:
        known = rate is None and all(session.arrival_known for session in chosen)
        arrivals = "recorded" if known else "poisson"
    if arrivals == "recorded":
        times = recorded_arrivals(chosen, rate=rate, seed=seed)
    else:
        times = poisson_arrivals(len(chosen), rate=rate or DEFAULT_RATE, seed=seed)
    cuts = Cuts()
    by_arrival = sorted(zip(times, chosen, strict=True), key=lambda pair: pair[0])
    sessions = tuple(
        PlannedSession(
            index=index,
            session_id=session.session_id,
            arrival_s=arrival_s,
            rounds=plan_rounds(session.rounds, max_context, max_delay_s, cuts),
        )
        for index, (arrival_s, session) in enumerate(by_arrival)
    )
    span_s = max(times) - min(times)
    mean_rate = (len(times) - 1) / span_s if span_s > 0 else None
    return Plan(sessions=sessions, arrivals=arrivals, rate=mean_rate, cuts=cuts)


def choose_sessions(
    trace: Iterable[TraceSession], num_sessions: int | None, *, sample: bool, seed: int
) -> list[TraceSession]:
    if num_sessions is None or not sample:
        return list(itertools.islice(trace, num_sessions))
    everything = list(trace)
    drawn = random.Random(f"{seed}/sample").sample(range(len(everything)), min(num_sessions, len(everything)))
    return [everything[index] for index in sorted(drawn)]


def poisson_arrivals(num_sessions: int, *, rate: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process with `rate` sessions a second; the first session arrives at 0."""
    draws = random.Random(f"{seed}/arrivals")
    gaps = [0.0, *(draws.expovariate(rate) for _ in range(num_sessions - 1))]
    return list(itertools.accumulate(gaps))


def recorded_arrivals(sessions: Sequence[TraceSession], *, rate: float | None, seed: int) -> list[float]:
    """The trace's own arrival times from 0, scaled to a mean of `rate` if given.

    Times that all lie on Mooncake's 3-second grid are spread evenly over their 3 seconds: replayed as they are,
    whole batches of sessions would arrive at once.
    """
    if not all(session.arrival_known for session in sessions):
        raise AmpdError(
            ErrorCode.INVALID_REQUEST, "this trace does not know its arrival times: use --arrivals poisson --rate R"
        )
    times = [session.arrival_s for session in sessions]
    if len(times) > 1 and all(time % GRID_S == 0 for time in times):
        draws = random.Random(f"{seed}/jitter")
        times = [time + draws.uniform(0.0, GRID_S) for time in times]
    first, span_s = min(times), max(times) - min(times)
    scale = (len(times) - 1) / span_s / rate if rate is not None and span_s > 0 else 1.0
    return [(time - first) * scale for time in times]


def plan_rounds(
    rounds: Sequence[TraceRound], max_context: int | None, max_delay_s: float | None, cuts: Cuts
) -> tuple[PlannedRound, ...]:
    """Cap the delays, and cut the session to `max_context` tokens of inputs and outputs together.

    Rounds that would go beyond it are dropped from the end. If not even the first one fits, its input is truncated:
    no more than the later rounds need, and never below half of max_context.
    """
    planned = [_plan_round(one, max_delay_s, cuts) for one in rounds]
    if max_context is None:
        return tuple(planned)
    if planned[0].input_tokens + planned[0].output_tokens > max_context:
        planned[0] = _truncate_first(planned, max_context, cuts)
    kept: list[PlannedRound] = []
    num_tokens = 0
    for one in planned:
        num_tokens += one.input_tokens + one.output_tokens
        if num_tokens > max_context:
            break
        kept.append(one)
    if len(kept) < len(planned):
        cuts.sessions_cut += 1
        cuts.rounds_dropped += len(planned) - len(kept)
    return tuple(kept)


def _plan_round(one: TraceRound, max_delay_s: float | None, cuts: Cuts) -> PlannedRound:
    delay_s = one.delay_s or 0.0
    if max_delay_s is not None and delay_s > max_delay_s:
        cuts.delays_capped += 1
        delay_s = max_delay_s
    return PlannedRound(
        input_tokens=one.input_tokens,
        output_tokens=one.output_tokens,
        delay_s=delay_s,
        messages=one.messages,
        text=one.text,
    )


def _truncate_first(planned: Sequence[PlannedRound], max_context: int, cuts: Cuts) -> PlannedRound:
    first = planned[0]
    if first.has_content:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"a first input of about {first.input_tokens} tokens of text does not fit --max-context {max_context}, "
            "and text is not truncated: give a larger --max-context",
        )
    others = sum(one.input_tokens + one.output_tokens for one in planned) - first.input_tokens
    input_tokens = min(first.input_tokens, max(max_context // 2, max_context - others))
    output_tokens = min(first.output_tokens, max_context - input_tokens)
    cuts.inputs_truncated += input_tokens < first.input_tokens
    cuts.outputs_truncated += output_tokens < first.output_tokens
    return replace(first, input_tokens=input_tokens, output_tokens=output_tokens)
