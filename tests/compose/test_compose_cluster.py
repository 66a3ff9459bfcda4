"""The cluster of docker-compose.yml, built and run by a real Docker engine: `make test-compose`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.compose

ROOT = Path(__file__).resolve().parents[2]
ENGINE_SCRIPT = ROOT.parent / "shared" / "docker" / "docker-up.sh"
BASE_IMAGES = ("python:3.11-slim", "nats:2.11-alpine")
SERVICES = ("nats", "coordinator", "planner", "prefill-worker", "decode-worker")
NUM_SESSIONS, NUM_ROUNDS = 3, 3


class Compose:
    """`docker compose` for one project of its own name and port."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"nats://127.0.0.1:{port}"
        self.project = f"ampd-test-{os.getpid()}"
        self.environment = {
            **os.environ,
            "AMPD_PORT": str(port),
            "AMPD_MODEL": "tiny-random",
            "AMPD_POLICY": "remote",
            "AMPD_KV_MEMORY_MB": "64",
        }

    def __call__(self, *arguments: str, timeout_s: float = 600.0) -> str:
        return run("docker", "compose", "-p", self.project, *arguments, env=self.environment, timeout_s=timeout_s)

    def containers(self, service: str) -> list[str]:
        return self("ps", "--all", "--quiet", service).split()


def run(*argv: str, env: dict[str, str] | None = None, timeout_s: float = 120.0) -> str:
    """Standard output; a failure shows what the command said."""
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode != 0:
        said = (done.stdout + done.stderr)[-6000:]
        pytest.fail(f"{' '.join(argv)} ended with status {done.returncode}:\n{said}")
    return done.stdout


def inspect(container: str) -> dict[str, Any]:
    description: dict[str, Any] = json.loads(run("docker", "inspect", container))[0]
    return description


@pytest.fixture(scope="module")
def engine() -> Iterator[None]:
    """A Docker engine with the base images; stopped afterwards if it was this fixture that started it."""
    was_up = subprocess.run(["docker", "version"], capture_output=True, check=False).returncode == 0
    if ENGINE_SCRIPT.exists():
        run(str(ENGINE_SCRIPT), *BASE_IMAGES, timeout_s=600.0)
    elif not was_up:
        pytest.fail("no Docker engine answers `docker version`: start one")
    yield
    if ENGINE_SCRIPT.exists() and not was_up:
        run(str(ENGINE_SCRIPT), "--down")


@pytest.fixture(scope="module")
def compose(engine: None) -> Iterator[Compose]:
    """The cluster, built and healthy; taken down with its volumes, whatever happens."""
    compose = Compose()
    try:
        compose("build", timeout_s=1200.0)
        try:
            compose("up", "--detach", "--wait", "--no-build")
        except BaseException:
            print(compose("logs", "--tail", "40"))
            raise
        yield compose
    finally:
        compose("down", "--volumes", "--timeout", "20")
    assert run("docker", "ps", "--all", "--quiet", "--filter", f"name={compose.project}") == ""


def replay(compose: Compose, folder: Path) -> dict[str, Any]:
    """Multi-round sessions with loadgen on the host; returns its report, in which every round completed."""
    trace = folder / "sessions.jsonl"
    sessions = [
        {
            "session_id": f"s{index}",
            "arrival_s": 0.0,
            "rounds": [
                {"input_tokens": 40 if number == 0 else 12, "output_tokens": 8, "delay_s": 0.0 if number else None}
                for number in range(NUM_ROUNDS)
            ],
            "meta": {"arrival_known": True},
        }
        for index in range(NUM_SESSIONS)
    ]
    trace.write_text("".join(json.dumps(session) + "\n" for session in sessions))
    run(
        *(sys.executable, "-m", "loadgen.cli", "replay", str(trace), "--out", str(folder / "out")),
        env={**compose.environment, "AMPD_NATS_URL": compose.url},
        timeout_s=180.0,
    )
    report: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    assert report["rounds"]["completed"] == report["rounds"]["offered"] == NUM_SESSIONS * NUM_ROUNDS
    return report


def status(compose: Compose) -> dict[str, Any]:
    env = {**compose.environment, "AMPD_NATS_URL": compose.url}
    answer: dict[str, Any] = json.loads(run(sys.executable, "-m", "services.cli", "status", "--json", env=env))
    return answer["status"]


def test_containers_have_no_more_rights_than_they_need(compose: Compose) -> None:
    published = []
    for service in SERVICES:
        (container,) = compose.containers(service)
        description = inspect(container)
        host = description["HostConfig"]
        assert description["Config"]["User"] not in ("", "0", "root"), service
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        assert host["Memory"] > 0, service
        assert host["PidsLimit"] > 0, service
        assert description["State"]["Health"]["Status"] == "healthy", service
        published += [
            (service, name, binding["HostIp"])
            for name, bindings in description["NetworkSettings"]["Ports"].items()
            for binding in bindings or ()
        ]
    assert published == [("nats", "4222/tcp", "127.0.0.1")]


def test_sessions_run_scale_and_survive_a_killed_worker(compose: Compose, tmp_path: Path) -> None:
    (first := tmp_path / "first").mkdir()
    report = replay(compose, first)
    assert report["prefill"]["remote"] == NUM_SESSIONS * NUM_ROUNDS
    assert report["kv"]["bytes_moved"] > 0  # between containers

    compose("up", "--detach", "--wait", "--no-build", "--scale", "decode-worker=2")
    victim, survivor = compose.containers("decode-worker")
    alive = {worker["heartbeat"]["worker_id"] for worker in status(compose)["workers"] if worker["alive"]}
    hostnames = {inspect(container)["Config"]["Hostname"] for container in (victim, survivor)}
    assert {f"decode-{hostname}" for hostname in hostnames} <= alive

    before = inspect(victim)["State"]
    assert before["Running"]
    run("docker", "kill", "--signal", "KILL", victim)
    after = inspect(victim)["State"]
    assert after["Pid"] != before["Pid"]  # the process is gone, whether or not the engine started another
    assert inspect(survivor)["State"]["Running"]

    (second := tmp_path / "second").mkdir()
    replay(compose, second)
