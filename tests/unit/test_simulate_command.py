"""`ampd simulate` end to end on small synthetic traces, against the replay's plan and the simulator's own numbers."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loadgen.records import RoundRecord, read_records
from loadgen.run import ReplayConfig, plan_replay, render_again
from loadgen.synth import synthesise
from loadgen.traces import TraceRound, TraceSession, read_trace, write_trace
from loadgen.workload import Workload, choose_workload, describe_trace, plan_workload
from planner.simulator.outcome import summarise
from planner.simulator.results import record_rounds
from planner.simulator.simulate_command import add_simulate_command, parse_failure, read_setup
from planner.simulator.simulation import Simulation
from shared.errors import AmpdError, ErrorCode
from shared.policy_flags import add_policy_flags

PROFILE = "h100-qwen3-32b"
NUM_SESSIONS = 40


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "hotpotqa.jsonl"
    write_trace(path, synthesise("hotpotqa", NUM_SESSIONS, 5))
    return path


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_simulate_command(parser.add_subparsers(required=True))
    return parser.parse_args(["simulate", *flags])


def flags_for(trace: Path, out: Path, *more: str, policy: str = "ampd", rate: str = "6") -> list[str]:
    workers = ["--prefill", "1", "--prefill-tp", "2", "--decode", "2", "--decode-tp", "2"]
    slo = ["--ttft-slo", "0.5", "--itl-slo", "0.05"]
    base = ["--profile", PROFILE, "--trace", str(trace), "--policy", policy, "--rate", rate, "--out", str(out)]
    return [*base, *workers, *slo, *more]


def simulate(trace: Path, out: Path, *more: str, policy: str = "ampd", rate: str = "6") -> dict[str, Any]:
    arguments = parse(*flags_for(trace, out, *more, policy=policy, rate=rate))
    assert arguments.command(arguments) == 0
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def test_it_writes_what_a_replay_writes(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = simulate(trace, tmp_path)
    assert (report["kind"], report["policy"], report["model"]) == ("simulated", "ampd", "Qwen/Qwen3-32B")
    assert report["rounds"]["completed"] == report["rounds"]["offered"] > NUM_SESSIONS
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    records = read_records(tmp_path / "rounds.jsonl")
    assert len(records) == report["rounds"]["offered"]
    for one in records:
        assert one.session is None, "no cluster knows it"
        assert one.usage is not None
        assert one.ttft_s is not None
        assert one.finished_s is not None
        assert one.first_token_s is not None
        assert one.num_output_tokens == one.planned_output_tokens == one.usage.num_output_tokens
        stages_s = one.usage.queued_s + one.usage.transfer_s + one.usage.prefill_s
        assert stages_s == pytest.approx(one.ttft_s, abs=1e-5)
        decode_s = sum(count * gap_s for count, gap_s in one.gaps)
        assert one.finished_s - one.first_token_s == pytest.approx(decode_s, abs=1e-4)
        assert one.usage.decode_s == pytest.approx(decode_s, abs=1e-4)
    by_round = {(one.session_index, one.round): one for one in records}
    for (session, index), one in by_round.items():
        if index:
            ended_s = by_round[session, index - 1].finished_s
            assert ended_s is not None
            assert one.sent_s == pytest.approx(ended_s + one.delay_s, abs=1e-5)
    simulation = report["simulation"]
    assert simulation["cluster"] == "1 prefill x 2 + 2 decode x 2"
    assert simulation["profile"]["name"] == PROFILE
    assert simulation["profile"]["provenance"]["source"]
    assert simulation["local_share"] == report["prefill"]["local_share"]
    assert simulation["kv_bytes_moved"] == report["kv"]["bytes_moved"] > 0
    assert simulation["num_events"] > 0
    assert "rounds" in capsys.readouterr().out
    assert render_again(tmp_path, Console(quiet=True), None, None) == report


def test_its_numbers_are_the_simulators_own(trace: Path) -> None:
    arguments = parse(*flags_for(trace, Path("unused"), policy="adaptive", rate="30"))
    setup = read_setup(arguments)
    workload = Workload(file=str(trace), rate=30.0)
    plan = plan_workload(choose_workload(list(read_trace(trace)), workload), workload)
    result = Simulation(setup.build_cluster(), setup.build_policy(), plan.sessions, setup.slo).run()
    records = record_rounds(result, plan.sessions)
    outcome = summarise(result, setup.slo)
    attained = [
        one
        for one in records
        if one.ttft_s is not None and one.ttft_s <= 0.5 and (one.tpot_s or 0.0) <= 0.05 and one.state == "completed"
    ]
    assert len(attained) / len(records) == pytest.approx(outcome.attainment, abs=1e-9)
    assert 0 < len(attained) <= len(records) == outcome.num_rounds


def test_a_seed_repeats_itself_and_another_differs(trace: Path, tmp_path: Path) -> None:
    reports = [simulate(trace, tmp_path / name, "--seed", seed) for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))]
    rounds = [(tmp_path / name / "rounds.jsonl").read_bytes() for name in "abc"]
    assert rounds[0] == rounds[1] != rounds[2]
    for report in reports:
        for measured in (report["simulation"], report["simulation"]["counters"]):
            for key in ("wall_s", "decision_s"):  # of this process's clock
                measured.pop(key, None)
    assert reports[0] == reports[1]


@pytest.mark.parametrize("more", [[], ["--sessions", "9", "--sample", "--max-context", "1500", "--max-delay", "0.2"]])
def test_arrivals_and_sessions_are_those_of_a_replay(trace: Path, tmp_path: Path, more: list[str]) -> None:
    simulate(trace, tmp_path, "--seed", "7", *more)
    config = ReplayConfig(file=str(trace), rate=6.0, seed=7)
    if more:
        config = replace(config, sessions=9, sample=True, max_context=1500, max_delay=0.2)
    plan = plan_replay(config)
    records = read_records(tmp_path / "rounds.jsonl")
    sent = [(one.session_id, one.round, one.planned_input_tokens, one.planned_output_tokens) for one in records]
    assert sent == [
        (session.session_id, index, one.input_tokens, one.output_tokens)
        for session in plan.sessions
        for index, one in enumerate(session.rounds)
    ]
    arrivals = [one.due_s for one in records if one.round == 0]
    assert arrivals == pytest.approx([session.arrival_s for session in plan.sessions], abs=1e-6)


def test_a_short_trace_is_repeated_in_another_order(trace: Path, tmp_path: Path) -> None:
    report = simulate(trace, tmp_path, "--sessions", str(2 * NUM_SESSIONS + 5), rate="20")
    assert report["sessions"]["offered"] == 2 * NUM_SESSIONS + 5
    assert (report["trace"]["selection"], report["trace"]["copies"]) == ("repeated", 3)
    sessions = list(read_trace(trace))
    workload = Workload(file=str(trace), rate=1.0, sessions=3 * NUM_SESSIONS)
    chosen = choose_workload(sessions, workload)
    assert chosen[:NUM_SESSIONS] == sessions
    originals = [one.session_id.split("~")[0] for one in chosen]
    first, second, third = (originals[start : start + NUM_SESSIONS] for start in range(0, 120, NUM_SESSIONS))
    assert sorted(first) == sorted(second) == sorted(third)
    assert first != second != third
    assert len({one.session_id for one in chosen}) == len(chosen)


def test_unknown_delays_are_filled_and_known_ones_kept() -> None:
    rounds = tuple(TraceRound(input_tokens=1, output_tokens=1, delay_s=delay_s) for delay_s in (None, 0.0, None, 4.0))
    trace = [TraceSession(session_id="s", arrival_s=0.0, rounds=rounds)]
    workload = Workload(file="f", rate=1.0, unknown_delay=2.5)
    plan = plan_workload(choose_workload(trace, workload), workload)
    assert [one.delay_s for one in plan.sessions[0].rounds] == [0.0, 0.0, 2.5, 4.0]
    assert describe_trace(trace, workload, plan)["unknown_delay_s"] == 2.5


def test_the_report_is_of_the_time_between_warm_up_and_duration(trace: Path, tmp_path: Path) -> None:
    report = simulate(trace, tmp_path, "--duration", "10", "--warm-up", "3")
    assert (report["measured"]["from_s"], report["measured"]["until_s"]) == (3.0, 10.0)
    records = read_records(tmp_path / "rounds.jsonl")
    assert report["sessions"]["offered"] == sum(
        3.0 <= one.due_s < 10.0 for one in records if one.round == 0 and one.due_s is not None
    )
    measured = [one for one in records if one.sent_s is not None and 3.0 <= one.sent_s < 10.0]
    assert report["rounds"]["offered"] == len(measured) < len(records)
    assert report["measured"]["rounds_left_out"] == len(records) - len(measured)
    assert report["ttft_s"]["max"] == pytest.approx(max(one.ttft_s or 0.0 for one in measured), abs=1e-6)


def test_a_worker_that_dies_is_survived(trace: Path, tmp_path: Path) -> None:
    calm = simulate(trace, tmp_path / "calm")
    report = simulate(trace, tmp_path / "failing", "--fail", "1@1.5:2")
    assert report["simulation"]["failures"] == [{"index": 1, "at": 1.5, "down_s": 2.0}]
    assert report["simulation"]["counters"]["failures"] == 1
    assert report["rounds"]["completed"] == report["rounds"]["offered"]
    assert report["tokens"]["extra_attempts"] > calm["tokens"]["extra_attempts"]


def test_rounds_without_a_worker_fail_and_their_successors_are_not_sent(trace: Path, tmp_path: Path) -> None:
    report = simulate(trace, tmp_path, "--fail", "1@1", "--fail", "2@1.5")
    assert report["rounds"]["failed"] > 0
    assert set(report["errors"]) == {"no_decode_worker", "not_sent"}
    sessions: dict[int, list[RoundRecord]] = {}
    for one in read_records(tmp_path / "rounds.jsonl"):
        sessions.setdefault(one.session_index, []).append(one)
    for rounds in sessions.values():
        states = [one.state for one in rounds]
        if "failed" in states:
            first = states.index("failed")
            assert states == ["completed"] * first + ["failed"] + ["not_sent"] * (len(states) - first - 1)
            assert all(one.usage is None for one in rounds[first:])


def test_a_round_too_long_for_the_memory_fails_with_its_code(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rounds = (TraceRound(input_tokens=3_000_000, output_tokens=4), TraceRound(input_tokens=5, output_tokens=4))
    write_trace(path, iter([TraceSession(session_id="long", arrival_s=0.0, rounds=rounds)]))
    report = simulate(path, tmp_path / "out", policy="colocated")
    assert report["rounds"] == {"offered": 2, "completed": 0, "failed": 2, "attained": 0}
    assert report["errors"]["not_sent"] == 1


def test_the_step_model_matters(trace: Path, tmp_path: Path) -> None:
    mixed = simulate(trace, tmp_path / "mixed", policy="colocated", rate="20")
    pause = simulate(trace, tmp_path / "pause", "--step-model", "pause", policy="colocated", rate="20")
    assert pause["simulation"]["step_model"] == "pause"
    assert pause["itl_s"]["max"] > mixed["itl_s"]["max"]


def test_json_is_all_that_standard_output_gets(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = simulate(trace, tmp_path, "--json")
    assert json.loads(capsys.readouterr().out) == report


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--policy-option", "routing.alpha"], "PATH=VALUE"),
        (["--policy-option", "routing.no_such=1"], "no_such"),
        (["--profile", "no-such"], "h100-qwen3-32b"),
        (["--decode", "0"], "--decode"),
        (["--decode-tp", "3"], "parallel degree"),
        (["--fail", "1"], "INDEX@SECONDS"),
        (["--fail", "9@1"], "3 workers"),
        (["--trace", "missing.jsonl"], "missing.jsonl"),
        (["--sessions", "3", "--duration", "5"], "--duration"),
        (["--duration", "5", "--warm-up", "5"], "--warm-up"),
    ],
)
def test_wrong_options_say_what_to_change(trace: Path, tmp_path: Path, more: list[str], named: str) -> None:
    arguments = parse(*flags_for(trace, tmp_path / "out", *more))
    with pytest.raises(AmpdError, match=named) as caught:
        arguments.command(arguments)
    assert caught.value.code is ErrorCode.INVALID_REQUEST  # the ampd command ends with 2


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        (["--rate", "0"], "0"),
        (["--sessions", "1.5"], "1.5"),
        (["--step-model", "x"], "mixed"),
        (["--warm-up", "-1"], "-1"),
        (["--policy", "no-such"], "adaptive"),
        (["--disable", "no-such"], "moore_hodgson"),
    ],
)
def test_wrong_values_exit_with_2(trace: Path, flag: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse(*flags_for(trace, Path("unused"), *flag))
    assert leaving.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert flag[0] in error
    assert named in error


def test_the_policy_flags_are_those_of_ampd_up() -> None:
    flags = ["--policy", "adaptive", "--disable", "moves", "--policy-option", "routing.uncertainty=0.5"]
    setup = read_setup(parse(*flags_for(Path("unused"), Path("unused")), *flags))
    assert (setup.policy, setup.disabled_parts) == ("adaptive", ("moves",))
    assert setup.policy_options == ("routing.uncertainty=0.5",)
    up = argparse.ArgumentParser()
    add_policy_flags(up)
    defaults = up.parse_args([])
    simulate_arguments = parse("--profile", "p", "--trace", "t", "--rate", "1", "--out", "o")
    assert {name: getattr(simulate_arguments, name) for name in vars(defaults)} == vars(defaults)


@pytest.mark.parametrize(
    ("text", "expected"), [("3@20", (3, 20.0, None)), ("0@1.5:2", (0, 1.5, 2.0))]
)  # fmt: skip
def test_failures_are_read(text: str, expected: tuple[int, float, float | None]) -> None:
    assert parse_failure(text) == expected


@pytest.mark.parametrize("text", ["", "@", "1@", "-1@2", "1@2:", "1@2:0", "a@2", "1@nan"])
def test_wrong_failures_are_refused(text: str) -> None:
    with pytest.raises(AmpdError, match="--fail"):
        parse_failure(text)


def test_adding_the_command_imports_nothing_heavy() -> None:
    code = (
        "import argparse, sys; from planner.simulator.simulate_command import add_simulate_command;"
        "add_simulate_command(argparse.ArgumentParser().add_subparsers());"
        "heavy = {'torch', 'nats', 'rich', 'msgspec', 'numpy', 'matplotlib'} & set(sys.modules);"
        "sys.exit(' '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
