"""`ampd profile`: the order of measurements, the flags, and the whole of it on the tiny model (no times asserted)."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest

from planner import measure_profile, profile_command
from planner.busy_neighbours import busy_neighbours
from planner.fit_profile import StepShape
from planner.fit_summary import summarise_fit
from planner.measure_profile import LONG_STEP_TOKENS, SHORT_STEP_RUNS, Progress, measure_steps
from planner.step_meter import ProfileOptions
from shared.core.profile import Profile, decode_profile
from shared.core.step_costs import StepCosts
from shared.engine.model_files import resolve_model
from shared.errors import AmpdError, ErrorCode

MIDDLE = [StepShape(chunks=((0, chunk),)) for chunk in (100, 200, 300, 400)]
SHORT = StepShape(contexts=(16,))
LONG = StepShape(chunks=((0, LONG_STEP_TOKENS + 1),))


class FakeMeter:
    """Every step takes as long as the next number of `seconds` says, and the clock goes on by it."""

    def __init__(self, seconds: Sequence[float] | None = None) -> None:
        self.now = 0.0
        self.steps: list[StepShape] = []
        self._seconds = iter(seconds) if seconds is not None else count(1.0, 0.0)

    def __call__(self, shape: StepShape) -> float:
        self.steps.append(shape)
        taken = next(self._seconds)
        self.now += taken
        return taken

    def run(self, shapes: list[StepShape], repeats: int, limit: float = 1e9) -> tuple[dict[StepShape, float], int]:
        self.progress: list[tuple[int, int]] = []
        return measure_steps(
            self,
            shapes,
            repeats=repeats,
            time_limit_s=limit,
            rng=random.Random(1),
            clock=lambda: self.now,
            progress=lambda what, done, total: self.progress.append((done, total)),
        )


def test_every_repeat_takes_all_points_in_a_new_order() -> None:
    meter = FakeMeter()
    _, repeats = meter.run(MIDDLE, repeats=5)
    rounds = [meter.steps[i : i + 4] for i in range(0, 20, 4)]
    assert repeats == 5
    assert all(set(order) == set(MIDDLE) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert meter.progress == [(done, 20) for done in range(1, 21)]
    again = FakeMeter()
    again.run(MIDDLE, repeats=5)
    assert again.steps == meter.steps


def test_a_point_gets_the_median_of_its_repeats() -> None:
    taken, _ = FakeMeter([5.0, 1.0, 90.0]).run(MIDDLE[:1], repeats=3)
    assert taken == {MIDDLE[0]: 5.0}


def test_short_steps_run_more_often_and_long_ones_less() -> None:
    meter = FakeMeter()
    meter.run([SHORT, MIDDLE[0], LONG], repeats=4)
    assert meter.steps.count(SHORT) == 4 * SHORT_STEP_RUNS
    assert meter.steps.count(MIDDLE[0]) == 4
    assert meter.steps.count(LONG) == 2
    assert meter.progress[-1] == (10, 10)


def test_no_repeat_begins_that_would_end_after_the_limit() -> None:
    meter = FakeMeter()
    taken, repeats = meter.run(MIDDLE, repeats=10, limit=13.0)  # 4 s a repeat
    assert repeats == 3
    assert meter.now == 12.0
    assert set(taken) == set(MIDDLE)
    _, repeats = FakeMeter().run(MIDDLE, repeats=10, limit=0.5)
    assert repeats == 1


def run_command(*argv: str) -> int:
    arguments = profile_command.build_parser().parse_args(["profile", *argv])
    return int(arguments.command(arguments))


def test_tiny_model_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tiny.json"
    flags = ["--model", "tiny-random", "--max-context", "1024", "--kv-memory-mb", "24", "--dtype", "float32"]
    assert run_command(*flags, "--quick", "--name", "cpu-tiny", "--host-kv-mb", "8", "--json", "--out", str(out)) == 0
    profile = decode_profile(out.read_bytes(), "cpu-tiny")
    assert (profile.name, profile.model, profile.max_context_tokens) == ("cpu-tiny", "tiny-random", 1024)
    assert profile.kv_bytes_per_token == 4 * 2 * 2 * 32 * 4  # layers, key and value, heads, head_dim, bytes
    assert profile.host_kv_bytes == 8_000_000
    [degree] = profile.degrees
    assert degree.num_kv_tokens == (24_000_000 // (profile.kv_bytes_per_token * 16) - 1) * 16
    summary = summarise_fit(profile)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(summary))
    assert summary["held_out"]["num_points"] == 9
    assert profile.provenance["fit"]["held_out"] == summary["held_out"]
    assert profile.provenance["machine"]["num_cpus"] >= 1
    assert {"torch", "numpy", "python"} <= set(profile.provenance["versions"])
    assert str(tmp_path) not in out.read_text()
    costs = StepCosts.from_profile(profile, 1)
    assert 0.0 < costs.prefill_s(0, 16) < costs.prefill_s(0, 512) < costs.prefill_s(512, 512)
    assert 0.0 < costs.decode_step_s(1, 16) < costs.decode_step_s(16, 512)
    assert list(tmp_path.iterdir()) == [out]


def test_other_engines_are_busy_while_one_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run steps of their own all the time, and are gone afterwards."""
    out = tmp_path / "beside.json"
    went_on: list[bool] = []
    before = set(psutil.Process().children())

    def measure(*args: Any, **fields: Any) -> Any:
        children = set(psutil.Process().children()) - before
        for child in children:
            then_s, deadline = sum(child.cpu_times()[:2]), time.monotonic() + 60.0
            while sum(child.cpu_times()[:2]) == then_s and time.monotonic() < deadline:
                time.sleep(0.02)
            went_on.append(sum(child.cpu_times()[:2]) > then_s)
        return measure_steps(*args, **fields)

    monkeypatch.setattr(measure_profile, "measure_steps", measure)
    flags = ["--model", "tiny-random", "--max-context", "1024", "--kv-memory-mb", "24", "--dtype", "float32"]
    assert run_command(*flags, "--quick", "--workers", "3", "--json", "--out", str(out)) == 0
    assert went_on == [True, True]
    assert set(psutil.Process().children()) <= before
    provenance = decode_profile(out.read_bytes(), "cpu-tiny-random").provenance
    assert (provenance["workers"], provenance["clock"]) == (3, "wall")
    assert "--workers 3" in provenance["command"]


def test_an_engine_that_does_not_start_is_said(tmp_path: Path) -> None:
    options = ProfileOptions(name="x", model="x", model_dir=tmp_path / "none", max_context=64)
    with pytest.raises(AmpdError, match="did not start"), busy_neighbours(options, 1):
        pass


class Asked(Exception):
    """Raised where the measurement would begin."""


@pytest.mark.parametrize(
    ("model_limit", "flags", "expected"),
    [(None, [], 4096), (32_768, [], 8192), (32_768, ["--max-context", "512"], 512)],
)
def test_contexts_are_as_long_as_the_model_takes_unless_told_otherwise(
    model_limit: int | None, flags: list[str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resolve_model("tiny-random")
    if model_limit is not None:
        model = Path(shutil.copytree(model, tmp_path / "longer"))
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": model_limit}))

    def refuse(options: ProfileOptions, provenance: Mapping[str, Any], progress: Progress) -> Profile:
        assert f"--max-context {options.max_context} " in provenance["command"], "the command makes the same again"
        raise Asked(options.max_context)

    monkeypatch.setattr(measure_profile, "measure_profile", refuse)
    with pytest.raises(Asked, match=f"^{expected}$"):
        run_command("--model", str(model), "--out", str(tmp_path / "out.json"), *flags)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--max-context", "100000"], "longer than the 4096 tokens"),
        (["--max-context", "4096", "--kv-memory-mb", "1"], "raise --kv-memory-mb"),
        (["--max-context", "64"], "--max-context must be at least"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags: list[str], named: str, tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    with pytest.raises(AmpdError, match=named) as caught:
        run_command("--model", "tiny-random", "--out", str(out), *flags)
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    assert not out.exists()


def test_a_target_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "missing" / "out.json"):
        with pytest.raises(AmpdError, match="--out"):
            run_command("--model", "no-such-model", "--out", str(target))


def test_bad_flags_say_what_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, said in (
        (["--threads", "0"], "0 must be at least 1"),
        (["--seed", "x"], "'x' is not a whole number"),
        (["--dtype", "int8"], "int8"),
    ):
        with pytest.raises(SystemExit):
            profile_command.build_parser().parse_args(["profile", "--out", "x.json", *flags])
        assert said in capsys.readouterr().err


def test_the_file_is_json_that_keeps_every_value() -> None:
    content: dict[str, Any] = {
        "a": {"b": 1, "c": [1.5, 2]},
        "points": [{"chunks": [[0, 4]], "x": "y" * 200}, {"chunks": [], "x": None}],
        "grid": [[0.0, 1e-05], [3.25, 4]],
        "empty": {},
    }
    assert json.loads(profile_command.format_profile(content)) == content
