"""The `ampd` command as a user types it, each as a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import psutil
import pytest

AMPD = (sys.executable, "-m", "services.cli")
SMALL = ("--model", "tiny-random", "--dtype", "float32", "--kv-memory-mb", "16")
TIMEOUT_S = 120.0


async def ampd(*arguments: str, stdin: bytes = b"", url: str = "") -> tuple[int, str, str]:
    """Run to its end; (status, standard output, standard error)."""
    process = await asyncio.create_subprocess_exec(
        *AMPD,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **({"AMPD_NATS_URL": url} if url else {})},
    )
    out, err = await asyncio.wait_for(process.communicate(stdin), TIMEOUT_S)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


StartUp = Callable[..., Awaitable[tuple[asyncio.subprocess.Process, str]]]


@pytest.fixture
async def start_up() -> AsyncIterator[StartUp]:
    """`await start_up(*flags)`: `ampd up`, ready; the process and the url that it printed."""
    started: list[asyncio.subprocess.Process] = []

    async def start(*flags: str) -> tuple[asyncio.subprocess.Process, str]:
        argv = (*AMPD, "up", "--port", "0", *SMALL, *flags)
        process = await asyncio.create_subprocess_exec(
            *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        started.append(process)
        assert process.stdout is not None
        said = ""
        async with asyncio.timeout(TIMEOUT_S):
            while (ready := re.search(r"ready at (nats://\S+)", said)) is None:
                line = await process.stdout.readline()
                assert line, f"ampd up ended:\n{said}"
                said += line.decode()
        return process, ready[1]

    yield start
    for process in started:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


def descendants(process: asyncio.subprocess.Process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


async def all_gone(processes: Sequence[psutil.Process]) -> None:
    _, left = await asyncio.to_thread(psutil.wait_procs, processes, TIMEOUT_S)
    assert left == []


async def test_up_serves_status_and_chat_and_stops_cleanly(start_up: StartUp, tmp_path: Path) -> None:
    process, url = await start_up("--data-dir", str(tmp_path))
    children = descendants(process)
    status, out, _ = await ampd("status", "--json", "--stats", url=url)
    assert status == 0
    answer = json.loads(out)
    assert {worker["heartbeat"]["worker_id"] for worker in answer["status"]["workers"]} == {"prefill-0", "decode-0"}
    assert answer["stats"]["num_rounds"] == 0

    lines = b"hello\n\nand once more\n"
    status, out, err = await ampd("chat", "--session", "s1", "--max-output-tokens", "4", stdin=lines, url=url)
    assert status == 0, out + err
    rounds = re.findall(r"\[prefill on (\S+) ?.*?(\d+) new, (\d+) cached; TTFT \d+ ms;", out)
    assert len(rounds) == 2
    assert int(rounds[0][2]) == 0
    assert int(rounds[1][2]) > 0  # the second round continues the first

    status, out, _ = await ampd("status", "--stats", url=url)
    assert status == 0
    assert "s1" in out
    assert "prefill-0" in out
    status, out, err = await ampd("up", "--port", "0", *SMALL, "--data-dir", str(tmp_path))
    assert status == 2
    assert "--data-dir" in out + err

    process.terminate()
    assert await asyncio.wait_for(process.wait(), TIMEOUT_S) == 0
    await all_gone(children)
    assert {path.name for path in (tmp_path / "logs").glob("*.log")} >= {
        "coordinator.log",
        "planner.log",
        "prefill-0.log",
        "decode-0.log",
        "nats-server.log",
    }
    assert (tmp_path / "planner" / "stats.jsonl").exists()


async def test_nothing_outlives_a_killed_ampd(start_up: StartUp) -> None:
    process, _ = await start_up("--prefill", "0")
    children = descendants(process)
    assert len(children) >= 4  # nats-server, coordinator, planner, a worker
    process.send_signal(signal.SIGKILL)
    await process.wait()
    await all_gone(children)


async def test_run_gives_the_commands_output_and_status_and_cleans_up() -> None:
    show = "import os, tempfile, sys; print(os.environ['AMPD_NATS_URL']); sys.exit(7)"
    status, out, err = await ampd("run", *SMALL, "--prefill", "0", "--", sys.executable, "-c", show)
    assert status == 7
    assert re.fullmatch(r"nats://127\.0\.0\.1:\d+\n", out)
    assert "decode-0 is ready" in err


async def test_run_passes_a_signal_on() -> None:
    code = "import signal; signal.signal(15, signal.SIG_DFL); print('on', flush=True); signal.pause()"
    process = await asyncio.create_subprocess_exec(
        *(*AMPD, "run", *SMALL, "--prefill", "0", "--", sys.executable, "-c", code),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S) == b"on\n"
    children = descendants(process)
    process.terminate()
    assert await asyncio.wait_for(process.wait(), TIMEOUT_S) == 128 + signal.SIGTERM
    await all_gone(children)
