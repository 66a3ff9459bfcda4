"""A service process from outside: signals, drain, exit status, death of its parent, health."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared import service
from shared.nats_server import NatsServer

LIMIT_S = 30.0
ROOT = Path(service.__file__).parents[1]

HEAD = """
import asyncio, os, subprocess, sys, time
from shared.errors import AmpdError, ErrorCode
from shared.nats_bus import connect_nats_bus
from shared.service import ServiceContext, run_service

async def main(context: ServiceContext) -> None:
    print("ready", os.getpid(), flush=True)
    try:
        await serve(context)
    finally:
        print("cleaned up", flush=True)

async def serve(context):
"""
TAIL = """
sys.exit(run_service(main, "probe", drain_timeout_s=float(sys.argv[1])))
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(body, drain_s) runs a service whose `serve` has this body, and returns when it is ready."""
    started: list[subprocess.Popen[str]] = []

    def start_service(body: str, drain_s: float = LIMIT_S, **environment: str) -> subprocess.Popen[str]:
        script = tmp_path / f"service{len(started)}.py"
        indented = "\n".join("    " + line for line in body.strip().splitlines())
        script.write_text(HEAD + indented + TAIL)
        process = subprocess.Popen(
            [sys.executable, str(script), str(drain_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "AMPD_LOG_FORMAT": "logfmt", **environment},
        )
        started.append(process)
        read_until(process, "ready")
        return process

    yield start_service
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def read_until(process: subprocess.Popen[str], word: str) -> str:
    """Read its output up to the line that has `word`; pytest's time-out bounds the wait."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if word in line:
            return text
    raise AssertionError(f"{word!r} did not come: {text}")


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(status, the rest of its output)"""
    assert process.stdout is not None
    output = process.stdout.read()  # not communicate(): that forgets what read_until has buffered
    return process.wait(LIMIT_S), output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(start: Start, number: signal.Signals) -> None:
    process = start("await context.stop.wait()\nprint('drained', flush=True)")
    process.send_signal(number)
    status, output = finish(process)
    assert status == 0
    assert output.index(number.name) < output.index("drained") < output.index("cleaned up")


def test_returning_ends_it(start: Start) -> None:
    assert finish(start("await asyncio.sleep(0)"))[0] == 0


def test_a_crash_is_status_1_with_its_traceback(start: Start) -> None:
    status, output = finish(start("raise LookupError('a bug')"))
    assert status == 1
    assert "Traceback" in output
    assert "LookupError" in output


def test_an_operating_error_is_status_1_without_a_traceback(start: Start) -> None:
    status, output = finish(start("raise AmpdError(ErrorCode.BUS_UNAVAILABLE, 'start the server')"))
    assert status == 1
    assert "start the server" in output
    assert "Traceback" not in output


def test_a_failure_stops_it_with_status_1(start: Start) -> None:
    status, output = finish(start("context.fail('the connection is lost')\nawait context.stop.wait()"))
    assert status == 1
    assert "the connection is lost" in output
    assert "cleaned up" in output


def test_an_overrun_drain_is_cancelled(start: Start) -> None:
    process = start("await asyncio.sleep(3600)", drain_s=0.1)
    process.terminate()
    status, output = finish(process)
    assert status == 1
    assert "not drained within" in output
    assert "cleaned up" in output


def test_a_main_that_ignores_its_cancellation_is_ended(start: Start) -> None:
    process = start(
        "while True:\n    try:\n        await asyncio.sleep(3600)\n    except asyncio.CancelledError:\n        pass",
        drain_s=0.1,
    )
    process.terminate()
    status, output = finish(process)
    assert status == 1
    assert "ignores its cancellation" in output


def test_a_second_signal_ends_it_at_once(start: Start) -> None:
    process = start("await asyncio.sleep(3600)")
    process.terminate()
    read_until(process, "draining")
    process.terminate()
    status, output = finish(process)
    assert status == 128 + signal.SIGTERM
    assert "cleaned up" not in output


def test_it_dies_with_its_parent(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(HEAD + "    await asyncio.sleep(3600)" + TAIL)
    parent = start(
        f"""
environment = {{**os.environ, "AMPD_PARENT_PID": str(os.getpid())}}
child = subprocess.Popen([sys.executable, {str(script)!r}, "60"], env=environment, stdout=subprocess.PIPE, text=True)
print("child", child.stdout.readline().split()[1], flush=True)
await asyncio.sleep(3600)
"""
    )
    child = int(read_until(parent, "child").split()[-1])
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + LIMIT_S
    while Path(f"/proc/{child}").exists():
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # dead; whoever adopted it has not collected it yet
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_parent_that_is_gone_already_ends_it() -> None:
    process = subprocess.run(
        [sys.executable, "-c", HEAD + "    pass" + TAIL, "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "AMPD_PARENT_PID": "1"},
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    assert process.stdout == b""


def health(url: str, name: str, *, timeout_s: float) -> int:
    return subprocess.run(
        [sys.executable, "-m", "shared.service", "health", name, "--timeout", str(timeout_s)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "AMPD_NATS_URL": url},
        stdout=subprocess.DEVNULL,
        timeout=LIMIT_S,
        check=False,
    ).returncode


def test_health_is_that_the_process_answers(start: Start, tmp_path: Path) -> None:
    with NatsServer(tmp_path / "nats") as server:
        process = start(
            f"""
bus = await connect_nats_bus({server.url!r}, name="probe")
await bus.register_service("ampd-probe", "0.1.0", {{"worker_id": "worker-7"}})
print("registered", flush=True)
await context.stop.wait()
await bus.close()
"""
        )
        read_until(process, "registered")
        for name in ("ampd-probe", "probe", "worker-7"):
            assert health(server.url, name, timeout_s=LIMIT_S / 2) == 0
        assert health(server.url, "worker-8", timeout_s=0.5) == 1
        process.send_signal(signal.SIGSTOP)
        assert health(server.url, "probe", timeout_s=0.5) == 1
        process.send_signal(signal.SIGCONT)
        assert health(server.url, "probe", timeout_s=LIMIT_S / 2) == 0
        process.terminate()
        assert finish(process)[0] == 0
        assert health(server.url, "probe", timeout_s=0.5) == 1
        url = server.url
    assert health(url, "probe", timeout_s=0.5) == 1


def test_a_shadowed_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    service.check_packages_are_ours()
    stranger = importlib.machinery.ModuleSpec("planner", None, origin="/elsewhere/planner/__init__.py")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: stranger if name == "planner" else real(name))
    with pytest.raises(RuntimeError, match=r"'planner' is found at /elsewhere"):
        service.check_packages_are_ours()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="missing"):
        service.check_packages_are_ours()
