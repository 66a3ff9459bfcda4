"""The fidelity benchmark compares like with like."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.scheduling.fidelity import build_commands


@pytest.mark.parametrize("engine", ["torch", "emulated"])
def test_both_sides_predict_with_the_same_profile(engine: str) -> None:
    args = Namespace(
        trace="t.jsonl", engine=engine, profile="mine.json", time_scale="8", model="m", dtype="float32", out=Path("o")
    )
    for command in build_commands(args, ["--rates", "1"]):
        assert command[command.index("--profile") + 1] == "mine.json"
        assert ("--time-scale" in command) == (engine == "emulated")
