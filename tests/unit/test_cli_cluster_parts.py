"""The parts of the embedded cluster that need no cluster: children, the data directory, ports, signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from services.data_dir import check_same_model, lock_data_dir
from services.local import check_port, describe_death, stop_processes
from services.service_process import ServiceProcess, describe_exit
from services.up import StoppedBySignal, StopSignals
from shared.errors import AmpdError

# Each says when it is ready, so that a signal is sent to a child that has set itself up.
OBEYS = "import signal, sys; signal.signal(15, lambda *_: sys.exit(3)); print('ready', flush=True); signal.pause()"
IGNORES = "import signal\nsignal.signal(15, signal.SIG_IGN); print('ready', flush=True)\nwhile True: signal.pause()"


def python(tmp_path: Path, code: str, name: str = "child") -> ServiceProcess:
    return ServiceProcess(name, [sys.executable, "-c", code], tmp_path / f"{name}.log", {"GREETING": "hello"})


async def log_says(process: ServiceProcess, text: str) -> None:
    while text not in process.last_log_lines():
        assert process.is_running
        await asyncio.sleep(0.01)


async def test_a_child_has_its_own_log_environment_and_session(tmp_path: Path) -> None:
    code = "import os; print(os.environ['GREETING'], os.environ['AMPD_PARENT_PID'], os.getsid(0) == os.getpid())"
    process = python(tmp_path, code)
    await process.start()
    assert await process.wait() == 0
    assert process.last_log_lines() == f"hello {os.getpid()} True"
    await process.start()
    await process.wait()
    assert len(process.last_log_lines().splitlines()) == 2  # a later life appends


async def test_stop_lets_a_child_finish(tmp_path: Path) -> None:
    process = python(tmp_path, OBEYS)
    await process.start()
    await log_says(process, "ready")
    await process.stop(grace_s=60.0)
    assert process.returncode == 3
    await process.stop(grace_s=60.0)  # once more does nothing


async def test_stop_kills_a_child_that_does_not_listen(tmp_path: Path) -> None:
    process = python(tmp_path, IGNORES)
    await process.start()
    await log_says(process, "ready")
    await process.stop(grace_s=0.05)
    assert process.returncode == -signal.SIGKILL
    assert "signal SIGKILL" in describe_death(process)


async def test_force_ends_the_wait_for_those_that_do_not_listen(tmp_path: Path) -> None:
    processes = [python(tmp_path, IGNORES, "a"), python(tmp_path, IGNORES, "b")]
    for process in processes:
        await process.start()
        await log_says(process, "ready")
    force = asyncio.Event()
    stopping = asyncio.create_task(stop_processes(processes, grace_s=600.0, force=force))
    force.set()
    await stopping
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


async def test_a_death_is_described_with_the_end_of_the_log(tmp_path: Path) -> None:
    process = python(tmp_path, "print('x' * 50_000); print('the reason'); raise SystemExit(7)")
    await process.start()
    await process.wait()
    description = describe_death(process)
    assert "child ended with status 7" in description
    assert description.endswith("the reason")
    assert len(description) < 20_000


def test_exits_in_words() -> None:
    assert describe_exit(0) == "status 0"
    assert describe_exit(-9) == "signal SIGKILL"
    assert describe_exit(-63) == "signal 63"


def test_a_data_directory_serves_one_cluster_at_a_time(tmp_path: Path) -> None:
    first = lock_data_dir(tmp_path / "data")
    with pytest.raises(AmpdError, match=rf"pid {os.getpid()}.*--data-dir"):
        lock_data_dir(tmp_path / "data")
    first.close()
    lock_data_dir(tmp_path / "data").close()


def test_a_data_directory_serves_one_model(tmp_path: Path) -> None:
    check_same_model(tmp_path, "tiny-random")
    check_same_model(tmp_path, "tiny-random")
    with pytest.raises(AmpdError, match=r"'tiny-random'.*--data-dir"):
        check_same_model(tmp_path, "smollm2")
    (tmp_path / "cluster.json").write_text("[]")
    with pytest.raises(AmpdError, match="--data-dir"):
        check_same_model(tmp_path, "smollm2")


def test_a_port_in_use_is_refused_with_the_flag_to_change() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(AmpdError, match="--port"):
            check_port(taken.getsockname()[1])
    check_port(0)


async def test_the_first_signal_asks_and_the_second_forces() -> None:
    with StopSignals().installed() as signals:
        working = asyncio.create_task(signals.run_until_requested(asyncio.Event().wait()))  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedBySignal) as stopped:
            await working
        assert stopped.value.exit_status == 128 + signal.SIGTERM
        assert not signals.forced.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        await signals.forced.wait()


async def test_work_that_ends_first_gives_its_result_or_its_error() -> None:
    async def fail() -> None:
        raise ValueError("broken")

    with StopSignals().installed() as signals:
        await signals.run_until_requested(asyncio.sleep(0))
        with pytest.raises(ValueError, match="broken"):
            await signals.run_until_requested(fail())
