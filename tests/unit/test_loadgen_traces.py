"""Trace readers: what they accept, what they refuse and with which line number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadgen.traces import TraceRound, TraceSession, detect_format, read_trace, write_trace
from shared.errors import AmpdError, ErrorCode
from shared.messages import ChatMessage

DEV_TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
GOOD = {
    "session_id": "a/0",
    "arrival_s": 1.5,
    "rounds": [
        {"input_tokens": 10, "output_tokens": 3, "delay_s": None},
        {"input_tokens": 4, "output_tokens": 2, "delay_s": 0.5},
    ],
    "meta": {"arrival_known": True},
}


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_ampd_format(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", GOOD, "\n", GOOD | {"meta": {}})
    first, second = read_trace(path)
    assert first.rounds == (
        TraceRound(input_tokens=10, output_tokens=3),
        TraceRound(input_tokens=4, output_tokens=2, delay_s=0.5),
    )
    assert first.arrival_known
    assert not second.arrival_known


def test_a_trace_written_reads_back_equal(tmp_path: Path) -> None:
    content = TraceRound(
        input_tokens=5, output_tokens=2, messages=(ChatMessage(role="user", content="What is 2 + 2?\n«ok»"),)
    )
    sessions = [
        TraceSession(session_id="x", arrival_s=0.0, rounds=(content,), meta={"label": "l"}),
        TraceSession(session_id="y", arrival_s=2.0, rounds=(TraceRound(input_tokens=1, output_tokens=1, text="hi"),)),
    ]
    assert write_trace(tmp_path / "t.jsonl", iter(sessions)) == 2
    assert list(read_trace(tmp_path / "t.jsonl")) == sessions


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ("{not json\n", "line 2"),
        (GOOD | {"rounds": []}, "rounds"),
        (GOOD | {"rounds": [{"input_tokens": 0, "output_tokens": 3}]}, "input_tokens"),
        (GOOD | {"rounds": [{"input_tokens": 3, "output_tokens": -1}]}, "output_tokens"),
        (GOOD | {"rounds": [{"input_tokens": 3, "output_tokens": 1, "delay_s": -2}]}, "delay_s"),
        (GOOD | {"rounds": [{"input_tokens": 2.5, "output_tokens": 1}]}, "input_tokens"),
        ({"session_id": "a", "rounds": []}, "line 2"),
        (
            GOOD | {"rounds": [{"input_tokens": 1, "output_tokens": 1, "text": "a"}, GOOD["rounds"][0]]},  # type: ignore[index]
            "either every round",
        ),
    ],
)
def test_bad_line_is_named(tmp_path: Path, bad: object, named: str) -> None:
    path = write_lines(tmp_path / "t.jsonl", GOOD, bad)
    with pytest.raises(AmpdError, match="line 2") as caught:
        list(read_trace(path))
    assert named in caught.value.message
    assert caught.value.code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize("content", ["", "[1]\n", '{"other": 1}\n', "nonsense\n"])
def test_format_that_cannot_be_told(tmp_path: Path, content: str) -> None:
    with pytest.raises(AmpdError):
        detect_format(write_lines(tmp_path / "t.jsonl", content))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AmpdError, match="cannot read the trace"):
        list(read_trace(tmp_path / "none.jsonl", "ampd"))


def request(timestamp: float, num_input: int, num_output: int, hash_ids: list[int]) -> dict[str, object]:
    return {"timestamp": timestamp, "input_length": num_input, "output_length": num_output, "hash_ids": hash_ids}


def test_mooncake_requests_are_chained_into_sessions(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "m.jsonl",
        request(0, 1100, 50, [0, 1, 2]),
        request(3000, 1200, 10, [0, 7, 8]),  # shares only the first block: another session
        request(9000, 1300, 20, [0, 1, 9]),  # blocks 0 and 1 are all of the first one's full blocks
        request(12000, 600, 5, [0, 4]),  # one full block: never continued
        request(15000, 700, 5, [0, 4]),
        request(60000, 2000, 5, [0, 1, 20, 21]),  # block 2 differs from the third request's only in its partial block
    )
    sessions = list(read_trace(path))
    assert [[one.input_tokens for one in session.rounds] for session in sessions] == [
        [1100, 1300 - 1150, 2000 - 1320],
        [1200],
        [600],
        [700],
    ]
    assert [session.arrival_s for session in sessions] == [0.0, 3.0, 12.0, 15.0]
    delays = [one.delay_s for one in sessions[0].rounds]
    assert delays == [None, pytest.approx(9 - 1 - 0.03 * 50), pytest.approx(51 - 1 - 0.03 * 20)]
    assert all(session.arrival_known for session in sessions)


def test_mooncake_history_longer_than_the_input_is_no_continuation(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.jsonl", request(0, 1100, 500, [0, 1, 2]), request(5000, 1200, 1, [0, 1, 3]))
    assert [len(session.rounds) for session in read_trace(path)] == [1, 1]


def test_mooncake_bad_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.jsonl", request(0, 10, 1, [0]), '{"timestamp": 1}\n')
    with pytest.raises(AmpdError, match="line 2"):
        list(read_trace(path))


@pytest.mark.skipif(not DEV_TRACES.is_dir(), reason="the development traces are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "num_sessions", "num_rounds"),
    [
        ("claude_code_kvct", 1_195, 34_754),
        ("mooncake_conversation", 5_908, 8_369),
        ("hotpotqa_react", 399, 1_640),
        ("toolbench", 18, 74),
        ("intercode", 2_334, 13_097),
        ("tracelab_examples", 2, 19),
    ],
)
def test_development_traces(name: str, num_sessions: int, num_rounds: int) -> None:
    sessions = list(read_trace(DEV_TRACES / f"{name}.jsonl"))
    assert len(sessions) == num_sessions
    assert sum(len(session.rounds) for session in sessions) == num_rounds
