"""A rank that dies or hangs ends its worker with a typed error, and never outlives it; what cannot work is refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tensor_parallel_models import NUM_BLOCKS, make_sequences, step, write_model

from shared.engine import rank_group
from shared.engine.model_runner import ModelRunner
from shared.engine.rank_group import RankFailed
from shared.errors import AmpdError, ErrorCode

START_AND_WAIT = """
import sys, time
from pathlib import Path
from shared.engine.model_runner import ModelRunner
runner = ModelRunner.load(Path(sys.argv[1]), dtype="float32", num_blocks=8, parallel_degree=2)
print("loaded", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("llama"))


def load(model_dir: Path, parallel_degree: int = 2, **options: Any) -> ModelRunner:
    return ModelRunner.load(
        model_dir, dtype="float32", num_blocks=NUM_BLOCKS, parallel_degree=parallel_degree, **options
    )


@pytest.fixture
def runner(model_dir: Path) -> Iterator[ModelRunner]:
    loaded = load(model_dir)
    yield loaded
    loaded.close()


def find_rank(parent_pid: int) -> psutil.Process:
    [rank] = [child for child in psutil.Process(parent_pid).children() if "rank_process" in " ".join(child.cmdline())]
    return rank


def test_a_killed_rank_ends_the_step_that_it_is_missed_in(runner: ModelRunner) -> None:
    [sequence] = make_sequences(1, [40])
    rank = find_rank(os.getpid())

    def kill_rank(layer: int) -> None:
        if layer == 0:
            rank.kill()

    with pytest.raises(RankFailed, match="rank 1 ended in a step with status -9"):
        step(runner, (sequence, sequence.item(on_layer=kill_rank)))
    sequence.cached = 0
    with pytest.raises(RankFailed, match="rank 1 ended in a step with status -9"):
        step(runner, (sequence, sequence.item()))


async def test_a_rank_killed_between_steps_is_noticed(runner: ModelRunner) -> None:
    [sequence] = make_sequences(2, [4])
    watching = asyncio.create_task(runner.watch())
    step(runner, (sequence, sequence.item()))
    find_rank(os.getpid()).kill()
    with pytest.raises(RankFailed, match="status -9") as failed:
        await asyncio.wait_for(watching, 30)
    assert failed.value.code is ErrorCode.INTERNAL
    with pytest.raises(RankFailed):
        step(runner, (sequence, sequence.item()))


def test_a_rank_that_hangs_is_given_up_and_closing_allows_others(model_dir: Path) -> None:
    first = load(model_dir, rank_timeout_s=15.0)
    try:
        [sequence] = make_sequences(3, [4])
        rank = find_rank(os.getpid())
        rank.suspend()
        with pytest.raises(RankFailed, match="did not keep together in a step"):
            step(first, (sequence, sequence.item()))
    finally:
        first.close()
    assert not rank.is_running()
    first.close()
    second = load(model_dir)
    try:
        [sequence] = make_sequences(4, [4])
        step(second, (sequence, sequence.item()))
        assert len(sequence.tokens) == 5
    finally:
        second.close()


def test_signals_to_all_processes_are_for_rank_0(runner: ModelRunner) -> None:
    """A container's stop reaches every process: the ranks serve on while rank 0 drains."""
    [sequence] = make_sequences(5, [4])
    rank = find_rank(os.getpid())
    for number in (signal.SIGTERM, signal.SIGINT):
        rank.send_signal(number)
    step(runner, (sequence, sequence.item()))
    assert rank.is_running()


def test_ranks_do_not_outlive_rank_0(model_dir: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", START_AND_WAIT, str(model_dir)], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"loaded\n"
        rank = find_rank(parent.pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    with contextlib.suppress(psutil.NoSuchProcess):
        rank.wait(30)


def test_a_rank_that_cannot_start(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group.sys, "executable", "/bin/false")
    with pytest.raises(RankFailed, match="rank 1 ended while it started with status 1"):
        load(model_dir)


@pytest.mark.parametrize(
    ("degree", "says"),
    [
        (4, "6 query heads and 2 KV heads cannot be split over 4 ranks: choose --parallel-degree from 1, 2"),
        (0, "must be at least 1"),
    ],
)
def test_degrees_that_cannot_be(degree: int, says: str, model_dir: Path) -> None:
    with pytest.raises(AmpdError, match=says) as refused:
        load(model_dir, degree)
    assert refused.value.code is ErrorCode.INVALID_REQUEST
