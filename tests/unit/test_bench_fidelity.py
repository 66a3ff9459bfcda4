"""The fidelity benchmark compares like with like."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scheduling.fidelity import build_commands, simulate_at_its_speed
from shared.core.step_costs import StepCosts
from shared.profile_files import load_profile


@pytest.mark.parametrize("engine", ["torch", "emulated"])
def test_both_sides_predict_with_the_same_profile(engine: str) -> None:
    args = Namespace(
        trace="t.jsonl", engine=engine, profile="mine.json", time_scale="8", model="m", dtype="float32", out=Path("o")
    )
    for command in build_commands(args, ["--rates", "1"]):
        assert command[command.index("--profile") + 1] == "mine.json"
        assert ("--time-scale" in command) == (engine == "emulated")


def write_live(out: Path, step_times: dict[str, Any] | None) -> None:
    run = {"kind": "live", "policy": "p", "model": "m", "seed": 0, "slo": {}, "rounds_offered": 1, "config": {}}
    run |= {"sessions_offered": 1, "trace": {}, "machine": {}, "step_times": step_times}
    (out / "live" / "r").mkdir(parents=True)
    (out / "live" / "r" / "run.json").write_text(json.dumps(run))
    (out / "live" / "compare.json").write_text(json.dumps({"runs": [{"policy": "p", "rate": 2.0, "folder": "r"}]}))


def test_a_live_point_is_simulated_at_the_speed_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"prefill_s": 3.0, "prefill_profile_s": 2.0, "decode_s": 5.0, "decode_profile_s": 4.0}
    write_live(tmp_path, {"w": times})
    profiles: list[str] = []

    def simulate(command: list[str], **_: Any) -> None:
        profiles.append(command[command.index("--profile") + 1])
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True)
        point = {"policy": "p", "rate": 2.0, "numbers": {"attainment": {"mean": 0.7}}}
        (out / "compare.json").write_text(json.dumps({"cells": [point]}))

    monkeypatch.setattr("subprocess.run", simulate)
    args = Namespace(trace="t", engine="torch", profile="h100-qwen3-32b", model="m", dtype="float32", out=tmp_path)
    row = simulate_at_its_speed(args, [], "p", 2.0, live=0.6)
    assert (row["prefill_over_profile"], row["decode_over_profile"]) == (1.5, 1.25)
    assert row["difference_points_at_its_speed"] == 10.0
    before, after = (StepCosts.from_profile(load_profile(name), 1) for name in ("h100-qwen3-32b", profiles[0]))
    assert after.decode_step_s(1, 100.0) == pytest.approx(1.25 * before.decode_step_s(1, 100.0))


def test_a_live_run_whose_speed_is_not_known_is_refused(tmp_path: Path) -> None:
    write_live(tmp_path, None)
    args = Namespace(trace="t", engine="torch", profile="h100-qwen3-32b", model="m", dtype="float32", out=tmp_path)
    with pytest.raises(SystemExit, match="no step_times"):
        simulate_at_its_speed(args, [], "p", 2.0, live=0.6)
