"""Folders made once: complete or absent, whoever asks, whoever dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from shared.engine.model_cache import default_cache_dir, make_once
from shared.errors import AmpdError, ErrorCode


def ignore(line: str) -> None:
    pass


def write_file(folder: Path) -> None:
    (folder / "weights").write_text("whole")


def test_makes_the_folder_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        write_file(folder)

    first = make_once(tmp_path, "m", make, ignore)
    second = make_once(tmp_path, "m", make, ignore)
    assert first == second
    assert len(made) == 1
    assert made[0] != first, "it is made under another name, so that it is never seen half made"
    assert (first / "weights").read_text() == "whole"
    assert (first / "weights").stat().st_mode & 0o777 == 0o644


def test_a_failed_making_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write_file(folder)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        make_once(tmp_path, "m", fail, ignore)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["m.lock"]
    assert (make_once(tmp_path, "m", write_file, ignore) / "weights").read_text() == "whole"


def _make_until_killed(cache_dir: Path, half_way: Event) -> None:
    def make(folder: Path) -> None:
        (folder / "weights").write_text("ha")
        half_way.set()
        signal.pause()

    make_once(cache_dir, "m", make, ignore)


def test_what_a_killed_maker_left_is_never_used(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    half_way = context.Event()
    maker = context.Process(target=_make_until_killed, args=(tmp_path, half_way))
    maker.start()
    assert half_way.wait(60)
    assert maker.pid is not None
    os.kill(maker.pid, signal.SIGKILL)
    maker.join()

    folder = make_once(tmp_path, "m", write_file, ignore)

    assert (folder / "weights").read_text() == "whole"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["m", "m.lock"]


def test_who_waited_for_another_takes_what_that_one_made(tmp_path: Path) -> None:
    waiting = threading.Event()
    made: list[str] = []

    def make_slowly(folder: Path) -> None:
        second.start()
        assert waiting.wait(60), "the second asks while the first is making"
        made.append("first")
        write_file(folder)

    def ask_second() -> None:
        make_once(tmp_path, "m", lambda folder: made.append("second"), lambda line: waiting.set())

    second = threading.Thread(target=ask_second)
    folder = make_once(tmp_path, "m", make_slowly, ignore)
    second.join()
    assert made == ["first"]
    assert (folder / "weights").read_text() == "whole"


def _make_and_count(cache_dir: Path, start: Event) -> None:
    def make(folder: Path) -> None:
        with (cache_dir / "count").open("a") as file:
            file.write("x")
        write_file(folder)

    start.wait(60)
    make_once(cache_dir, "m", make, ignore)


def test_processes_that_ask_at_once_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    processes = [context.Process(target=_make_and_count, args=(tmp_path, start)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "x"


def test_waiting_for_another_maker_is_bounded_and_said(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    half_way = context.Event()
    maker = context.Process(target=_make_until_killed, args=(tmp_path, half_way))
    maker.start()
    try:
        assert half_way.wait(60)
        lines: list[str] = []
        with pytest.raises(AmpdError, match="is it stuck") as caught:
            make_once(tmp_path, "m", write_file, lines.append, lock_wait_s=0.3)
    finally:
        maker.kill()
        maker.join()
    assert caught.value.code is ErrorCode.INTERNAL
    assert lines == ["waiting for another process that is making m"]


def test_cache_directory_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AMPD_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == Path.home() / ".cache" / "ampd"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "ampd"
    monkeypatch.setenv("AMPD_CACHE_DIR", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(AmpdError, match="AMPD_CACHE_DIR") as caught:
        make_once(in_the_way, "m", write_file, ignore)
    assert caught.value.code is ErrorCode.INVALID_REQUEST
