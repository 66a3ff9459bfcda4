"""Synthetic traces, each fitted to published statistics and labelled so in its `meta`.

Method: a session's number of rounds and its token counts are drawn independently from distributions that have the
published mean and standard deviation (log-normal for lengths and times: positive, and skewed as such data is;
normal, rounded, for numbers of turns). What a source does not publish is an assumption, and is named in the label.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loadgen.synth_text import synthesise_tool_use_text
from loadgen.traces import TraceRound, TraceSession

Draw = random.Random


@dataclass(frozen=True, slots=True)
class LogNormal:
    """A log-normal distribution by its median and the standard deviation of its logarithm."""

    median: float
    sigma: float

    @classmethod
    def of_mean_sd(cls, mean: float, sd: float) -> LogNormal:
        """Moments inverted: sigma^2 = ln(1 + (sd/mean)^2), median = mean * exp(-sigma^2 / 2)."""
        variance = math.log1p((sd / mean) ** 2)
        return cls(mean * math.exp(-variance / 2), math.sqrt(variance))

    @classmethod
    def of_mean(cls, mean: float, sigma: float) -> LogNormal:
        return cls(mean * math.exp(-(sigma**2) / 2), sigma)

    @property
    def mean(self) -> float:
        return self.median * math.exp(self.sigma**2 / 2)

    def draw(self, draws: Draw) -> float:
        return self.median * math.exp(draws.gauss(0.0, self.sigma))

    def draw_count(self, draws: Draw) -> int:
        return max(1, round(self.draw(draws)))


@dataclass(frozen=True, slots=True)
class Turns:
    """A rounded normal number of rounds, at least `minimum`."""

    mean: float
    sd: float
    minimum: int = 1

    def draw(self, draws: Draw) -> int:
        return max(self.minimum, round(draws.gauss(self.mean, self.sd)))


@dataclass(frozen=True, slots=True)
class ProgramKind:
    """An agent program of which turns, tool time and tokens of a whole program are published (Continuum, Table 2).

    Not published is how the tokens divide: `first_share` of the inputs are in the first round, the rest is spread
    over the later rounds by random weights, and `output` is taken from another source.
    """

    label: str
    turns: Turns
    tool_s: LogNormal
    total_tokens: LogNormal
    output: LogNormal
    first_share: float

    def draw(self, draws: Draw) -> list[TraceRound]:
        num_rounds = self.turns.draw(draws)
        outputs = [self.output.draw_count(draws) for _ in range(num_rounds)]
        total = max(self.total_tokens.draw(draws), 2.0 * sum(outputs))
        num_input = total - sum(outputs)
        first = num_input if num_rounds == 1 else num_input * self.first_share
        weights = [draws.lognormvariate(0.0, 1.0) for _ in range(num_rounds - 1)]
        later = [(num_input - first) * weight / sum(weights) for weight in weights]
        return _make_rounds([first, *later], outputs, self.tool_s, draws)


@dataclass(frozen=True, slots=True)
class RoundsKind:
    """A workload of which the first input, the increments and the outputs are known as distributions."""

    label: str
    turns: Turns
    first: LogNormal
    increment: LogNormal
    output: LogNormal
    delay_s: LogNormal

    def draw(self, draws: Draw) -> list[TraceRound]:
        num_rounds = self.turns.draw(draws)
        inputs = [self.first.draw(draws), *(self.increment.draw(draws) for _ in range(num_rounds - 1))]
        outputs = [self.output.draw_count(draws) for _ in range(num_rounds)]
        return _make_rounds(inputs, outputs, self.delay_s, draws)


@dataclass(frozen=True, slots=True)
class RequestsKind:
    """Requests of which mean input I, mean output O and cacheable share c are published (Mooncake, Table 2).

    A session has a geometric number of rounds with mean m; its requests have the inputs F, F + S, F + 2 S, ...
    with S = increment + O. The means over requests are then I = F + (m - 1) S, and for the tokens that are not
    cacheable m (1 - c) I = F + (m - 1) increment. Their difference gives m = (I + O) / (O + (1 - c) I), and then F
    follows from the increment, which is free. Sharing between sessions (system prompts) is counted as if it were
    within them, because a trace of lengths cannot say it otherwise.
    """

    label: str
    mean_input: float
    mean_output: float
    cacheable: float
    increment: LogNormal
    delay_s: LogNormal
    first_sigma: float = 1.25
    output_sigma: float = 0.9

    @property
    def mean_rounds(self) -> float:
        return (self.mean_input + self.mean_output) / (self.mean_output + (1 - self.cacheable) * self.mean_input)

    @property
    def mean_first(self) -> float:
        return self.mean_input - (self.mean_rounds - 1) * (self.increment.mean + self.mean_output)

    def draw(self, draws: Draw) -> list[TraceRound]:
        num_rounds = 1
        while draws.random() > 1 / self.mean_rounds:
            num_rounds += 1
        first = LogNormal.of_mean(self.mean_first, self.first_sigma)
        output = LogNormal.of_mean(self.mean_output, self.output_sigma)
        inputs = [first.draw(draws), *(self.increment.draw(draws) for _ in range(num_rounds - 1))]
        outputs = [output.draw_count(draws) for _ in range(num_rounds)]
        return _make_rounds(inputs, outputs, self.delay_s, draws)


def _make_rounds(inputs: list[float], outputs: list[int], delay_s: LogNormal, draws: Draw) -> list[TraceRound]:
    return [
        TraceRound(
            input_tokens=max(1, round(num_input)),
            output_tokens=num_output,
            delay_s=round(delay_s.draw(draws), 4) if index else None,
        )
        for index, (num_input, num_output) in enumerate(zip(inputs, outputs, strict=True))
    ]


# Output per request, TraceLab (357K rounds): median 252. Its spread is that of a coding agent's trace.
_AGENT_OUTPUT = LogNormal(252, 0.9)
_CONTINUUM = "synthetic, fitted to {} in Continuum (arXiv 2511.02230) Table 2: turns, tool time, tokens a program; "
_SPLIT = "assumed: outputs as in TraceLab (median 252), {:.0%} of the input tokens in the first round"
_MOONCAKE = "synthetic, fitted to Mooncake (FAST'25) Table 2, {}: mean input, mean output, cacheable share; "
_CHAT = "assumed: geometric rounds, increments of mean {:g} tokens, delays of median {:g} s"

STATISTICAL_KINDS: dict[str, ProgramKind | RoundsKind | RequestsKind] = {
    "swe-bench": ProgramKind(
        label=_CONTINUUM.format("SWE-Bench") + _SPLIT.format(0.3),
        turns=Turns(10.9, 2.1),
        tool_s=LogNormal.of_mean_sd(0.925, 3.550),
        total_tokens=LogNormal.of_mean_sd(70_126, 19_732),
        output=_AGENT_OUTPUT,
        first_share=0.3,
    ),
    "bfcl": ProgramKind(
        label=_CONTINUUM.format("BFCL v4") + _SPLIT.format(0.3),
        turns=Turns(6.3, 2.3),
        tool_s=LogNormal.of_mean_sd(1.923, 2.133),
        total_tokens=LogNormal.of_mean_sd(93_256, 68_687),
        output=_AGENT_OUTPUT,
        first_share=0.3,
    ),
    "toolbench": RoundsKind(
        label="synthetic, fitted to ToolBench: rounds p10/50/90 3/5/7 (600 tasks), medians of first input 1,700, "
        "increment 107, output 61 tokens; assumed: spreads, and tool times as in BFCL v4 (Continuum Table 2)",
        turns=Turns(5.0, 1.56, minimum=2),
        first=LogNormal(1_700, 0.4),
        increment=LogNormal(107, 1.1),
        output=LogNormal(61, 0.95),
        delay_s=LogNormal.of_mean_sd(1.923, 2.133),
    ),
    "hotpotqa": RoundsKind(
        label="synthetic, fitted to HotpotQA with three retrievals (four rounds) and ReAct's medians of first input "
        "1,800, increment 95, output 42 tokens; assumed: delays of median 0.3 s (a retrieval)",
        turns=Turns(4.0, 0.0),
        first=LogNormal(1_800, 0.09),
        increment=LogNormal(95, 1.1),
        output=LogNormal(42, 0.3),
        delay_s=LogNormal(0.3, 0.5),
    ),
    "mooncake-conversation": RequestsKind(
        label=_MOONCAKE.format("conversation") + _CHAT.format(1_500, 120),
        mean_input=12_035,
        mean_output=343,
        cacheable=0.40,
        increment=LogNormal.of_mean(1_500, 1.5),
        delay_s=LogNormal(120, 1.2),
    ),
    "mooncake-toolagent": RequestsKind(
        label=_MOONCAKE.format("tool&agent") + _CHAT.format(800, 10),
        mean_input=8_596,
        mean_output=182,
        cacheable=0.59,
        increment=LogNormal.of_mean(800, 1.5),
        delay_s=LogNormal(10, 1.2),
    ),
}

TOOL_USE_TEXT = "tool-use-text"
KINDS = (*STATISTICAL_KINDS, TOOL_USE_TEXT)


def synthesise(kind: str, num_sessions: int, seed: int) -> Iterator[TraceSession]:
    """Sessions of a kind of KINDS. Session i depends on (kind, seed, i) alone: more sessions keep the first ones."""
    draw = _chooser(kind)
    for index in range(num_sessions):
        rounds, label = draw(random.Random(f"{kind}/{seed}/{index}"))
        yield TraceSession(
            session_id=f"{kind}/{seed}/{index}",
            arrival_s=0.0,
            rounds=tuple(rounds),
            meta={"arrival_known": False, "synthetic": True, "label": label, "seed": seed},
        )


def _chooser(kind: str) -> Callable[[Draw], tuple[list[TraceRound], str]]:
    if kind == TOOL_USE_TEXT:
        return synthesise_tool_use_text
    chosen = STATISTICAL_KINDS[kind]
    return lambda draws: (chosen.draw(draws), chosen.label)
