"""Synthetic traces have the statistics that their labels claim."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from loadgen.synth import KINDS, STATISTICAL_KINDS, TOOL_USE_TEXT, RequestsKind, synthesise
from loadgen.traces import TraceSession, read_trace, write_trace

NUM_SESSIONS = 4000
SEED = 1


def make(kind: str) -> list[TraceSession]:
    return list(synthesise(kind, NUM_SESSIONS, SEED))


def num_tokens(session: TraceSession) -> int:
    return sum(one.input_tokens + one.output_tokens for one in session.rounds)


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_labelled_and_readable(kind: str, tmp_path: Path) -> None:
    sessions = list(synthesise(kind, 20, 7))
    assert sessions == list(synthesise(kind, 20, 7))
    assert sessions[:5] == list(synthesise(kind, 5, 7))
    assert [one.rounds for one in sessions] != [one.rounds for one in synthesise(kind, 20, 8)]
    assert all(one.meta["label"].startswith("synthetic, ") and not one.arrival_known for one in sessions)
    assert all(one.rounds[0].delay_s is None for one in sessions)
    write_trace(tmp_path / "t.jsonl", iter(sessions))
    assert list(read_trace(tmp_path / "t.jsonl")) == sessions


@pytest.mark.parametrize(
    ("kind", "turns", "tool_s", "tokens"),
    [
        ("swe-bench", (10.9, 2.1), (0.925, 3.55), (70_126, 19_732)),
        ("bfcl", (6.3, 2.3), (1.923, 2.133), (93_256, 68_687)),
    ],
)
def test_continuum_table_2(
    kind: str, turns: tuple[float, float], tool_s: tuple[float, float], tokens: tuple[float, float]
) -> None:
    sessions = make(kind)
    counts = [len(one.rounds) for one in sessions]
    delays = [one.delay_s for session in sessions for one in session.rounds if one.delay_s is not None]
    totals = list(map(num_tokens, sessions))
    assert statistics.mean(counts) == pytest.approx(turns[0], rel=0.03)
    assert statistics.stdev(counts) == pytest.approx(turns[1], rel=0.05)
    assert statistics.mean(delays) == pytest.approx(tool_s[0], rel=0.06)
    assert statistics.stdev(delays) == pytest.approx(tool_s[1], rel=0.25)  # heavy-tailed
    assert statistics.mean(totals) == pytest.approx(tokens[0], rel=0.03)
    assert statistics.stdev(totals) == pytest.approx(tokens[1], rel=0.05)


def test_toolbench() -> None:
    sessions = make("toolbench")
    deciles = statistics.quantiles([len(one.rounds) for one in sessions], n=10, method="inclusive")
    assert (deciles[0], deciles[4], deciles[8]) == (3, 5, 7)
    assert statistics.median(one.rounds[0].input_tokens for one in sessions) == pytest.approx(1_700, rel=0.05)
    later = [one.input_tokens for session in sessions for one in session.rounds[1:]]
    assert statistics.median(later) == pytest.approx(107, rel=0.05)
    outputs = [one.output_tokens for session in sessions for one in session.rounds]
    assert statistics.median(outputs) == pytest.approx(61, rel=0.05)


def test_hotpotqa_has_three_retrievals() -> None:
    sessions = make("hotpotqa")
    assert {len(one.rounds) for one in sessions} == {4}
    assert statistics.median(one.rounds[0].input_tokens for one in sessions) == pytest.approx(1_800, rel=0.03)


@pytest.mark.parametrize("kind", ["mooncake-conversation", "mooncake-toolagent"])
def test_mooncake_table_2(kind: str) -> None:
    fitted = STATISTICAL_KINDS[kind]
    assert isinstance(fitted, RequestsKind)
    num_input = num_cacheable = num_output = num_requests = 0
    for session in synthesise(kind, 20_000, SEED):
        history = 0
        for one in session.rounds:
            num_input += history + one.input_tokens
            num_cacheable += history
            num_output += one.output_tokens
            num_requests += 1
            history += one.input_tokens + one.output_tokens
    assert num_input / num_requests == pytest.approx(fitted.mean_input, rel=0.04)
    assert num_output / num_requests == pytest.approx(fitted.mean_output, rel=0.04)
    assert num_cacheable / num_input == pytest.approx(fitted.cacheable, abs=0.02)


def test_tool_use_text_sizes() -> None:
    sessions = list(synthesise(TOOL_USE_TEXT, 300, SEED))
    assert {len(one.rounds) for one in sessions} == {3, 4, 5}
    for session in sessions:
        first, *later = session.rounds
        assert first.messages is not None
        assert [message.role for message in first.messages] == ["system", "user"]
        assert "{" not in first.messages[1].content  # every field of the template was filled
        assert 150 <= first.input_tokens <= 400
        for one in later:
            assert one.messages is not None
            assert 25 <= one.input_tokens <= 120
            assert one.delay_s is not None
            assert 0.05 <= one.delay_s <= 1.0
        assert all(8 <= one.output_tokens <= 32 for one in session.rounds)
