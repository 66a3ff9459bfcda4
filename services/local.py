"""The embedded cluster behind `ampd up` and `ampd run`: a real nats-server and every service as processes here.

Order: nats-server, coordinator and planner, workers; ready when the coordinator has heard every worker's
heartbeat. A worker that dies is reported and the cluster goes on; a coordinator or planner that dies is started
again, since its state is durable; nats-server's death ends the cluster. Stops in the order of who needs whom:
workers finish what they hold while the coordinator still listens.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from services.cluster_options import ClusterOptions, check_options, engine_arguments, policy_arguments
from services.data_dir import check_same_model, lock_data_dir
from services.service_process import ServiceProcess, describe_exit
from shared.child_process import dying_with_this_process
from shared.client import AmpdClient
from shared.errors import AmpdError, ErrorCode
from shared.nats_server import NatsServer, NatsServerError
from shared.transport.region import COPY_TUNABLE

READY_DEADLINE_S = 180.0
WORKER_DRAIN_S = 10.0  # running rounds may end
WORKER_GRACE_S = WORKER_DRAIN_S + 5.0
SERVICE_GRACE_S = 5.0
RESTART_DELAYS_S = (0.2, 0.5, 1.0, 2.0, 5.0)  # one more death in a row ends the cluster
RESTART_FORGIVEN_S = 60.0  # a service that lived this long starts the delays anew
_POLL_S = 0.1

Report = Callable[[str], None]


class ClusterFailed(Exception):
    """The cluster cannot start or go on; the message says which process, and quotes its log."""


class LocalCluster:
    """Start with `start`, watch with `supervise`, end with `stop`; `url` is where clients connect."""

    def __init__(self, options: ClusterOptions, report: Report) -> None:
        check_options(options)
        check_port(options.port)
        self._options = options
        self._report = report
        self._temporary = options.data_dir is None
        self.data_dir = options.data_dir or Path(tempfile.mkdtemp(prefix="ampd-"))
        self.log_dir = options.log_dir or self.data_dir / "logs"
        self._lock: IO[str] | None = None
        self._nats: NatsServer | None = None
        self.services: dict[str, ServiceProcess] = {}  # coordinator, planner
        self.workers: dict[str, ServiceProcess] = {}
        self._stopping = False

    @property
    def url(self) -> str:
        if self._nats is None:
            raise RuntimeError("the cluster was not started")
        return self._nats.url

    async def start(self) -> None:
        """Return when every worker is ready. Raises ClusterFailed, or AmpdError for an option at fault."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._lock = lock_data_dir(self.data_dir)
        check_same_model(self.data_dir, self._options.served)
        model_dir = None
        if self._options.engine == "torch":
            model_dir = await resolve_model_dir(self._options.model, self._report)
        self._nats = NatsServer(self.data_dir / "nats", run_dir=self.log_dir, port=self._options.port)
        try:
            self._nats.start()
        except NatsServerError as error:
            raise ClusterFailed(str(error)) from error
        self._define_processes(model_dir)
        for process in (*self.services.values(), *self.workers.values()):
            await process.start()
        async with asyncio.timeout(READY_DEADLINE_S) as deadline:
            try:
                await self._wait_until_ready()
            except TimeoutError:
                if not deadline.expired():
                    raise
                raise ClusterFailed(self._describe_not_ready()) from None

    async def supervise(self) -> None:
        """Keep the cluster running until cancelled. Raises ClusterFailed when it cannot go on."""
        watchers = [
            asyncio.create_task(self._watch_nats()),
            *(asyncio.create_task(self._report_death(worker)) for worker in self.workers.values()),
            *(asyncio.create_task(self._keep_running(service)) for service in self.services.values()),
        ]
        try:
            ended, _ = await asyncio.wait(watchers, return_when=asyncio.FIRST_EXCEPTION)
            for watcher in ended:
                watcher.result()
        finally:
            for watcher in watchers:
                watcher.cancel()

    async def stop(self, force: asyncio.Event) -> None:
        """Stop everything, within the graces above; at once when `force` is set."""
        self._stopping = True
        await stop_processes(list(self.workers.values()), WORKER_GRACE_S, force)
        for service in self.services.values():
            await stop_processes([service], SERVICE_GRACE_S, force)
        if self._nats is not None:
            self._nats.stop()
        if self._lock is not None:
            self._lock.close()
        if self._temporary:
            shutil.rmtree(self.data_dir, ignore_errors=True)

    # ------------------------------------------------------------------------------- processes

    def _define_processes(self, model_dir: Path | None) -> None:
        options = self._options
        environment = {
            "AMPD_NATS_URL": self.url,
            # a worker that is killed leaves its socket's folder behind: where ours is removed at the end, so is that
            **({"TMPDIR": str(self.data_dir)} if self._temporary else {}),
            # signs the tickets with which workers read each other's KV; new for every start of the cluster
            "AMPD_CLUSTER_SECRET": secrets.token_hex(32),
            # the logs are files, quoted to a person when their process dies
            "AMPD_LOG_FORMAT": os.environ.get("AMPD_LOG_FORMAT", "logfmt"),
            # threads of one worker that wait for another's core cost far more than they bring
            "OMP_NUM_THREADS": str(options.threads),
            "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", COPY_TUNABLE),
        }

        def child(name: str, module: str, *arguments: str) -> ServiceProcess:
            argv = [sys.executable, "-m", module, f"--nats-url={self.url}", *arguments]
            return ServiceProcess(name, argv, self.log_dir / f"{name}.log", environment)

        self.services = {
            "coordinator": child(
                "coordinator",
                "services.coordinator",
                *policy_arguments(options),
                f"--cost-scale={options.time_scale}",
                *([] if model_dir is None else [f"--model-dir={model_dir}"]),
            ),
            "planner": child(
                "planner",
                "planner",
                f"--data-dir={self.data_dir}",
                f"--replan={options.replan}",
                *([] if options.profile is None else [f"--profile={options.profile}"]),
                *options.planner_arguments,
            ),
        }
        worker_arguments = [
            *policy_arguments(options),
            *engine_arguments(options, model_dir),
            f"--drain-timeout={WORKER_DRAIN_S}",
            *([f"--max-context={options.max_context}"] if options.max_context is not None else []),
            *options.worker_arguments,
        ]
        for role, module, count in (
            ("prefill", "services.prefill_worker", options.num_prefill),
            ("decode", "services.decode_worker", options.num_decode),
            ("both", "services.decode_worker", options.num_both),
        ):
            for index in range(count):
                worker_id = f"{role}-{index}"
                self.workers[worker_id] = child(
                    worker_id, module, f"--worker-id={worker_id}", f"--role={role}", *worker_arguments
                )

    async def _wait_until_ready(self) -> None:
        """Ask the coordinator until it knows every worker, and the planner until it answers."""
        missing = set(self.workers)
        async with await AmpdClient.connect(self.url, name="ampd-up") as client:
            while missing:
                self._raise_if_any_died()
                try:
                    status = await client.status(timeout_s=1.0)
                except AmpdError:
                    continue  # the coordinator is not there yet: the client has waited; READY_DEADLINE_S bounds us
                alive = {worker.heartbeat.worker_id for worker in status.workers if worker.alive}
                for worker_id in sorted(missing & alive):
                    self._report(f"{worker_id} is ready")
                missing -= alive
                await asyncio.sleep(_POLL_S)
            await client.planner_stats(timeout_s=READY_DEADLINE_S)

    def _raise_if_any_died(self) -> None:
        for process in (*self.services.values(), *self.workers.values()):
            if not process.is_running:
                raise ClusterFailed(describe_death(process))

    def _describe_not_ready(self) -> str:
        logs = "\n".join(
            f"--- {process.log_path}\n{process.last_log_lines(5)}"
            for process in (*self.services.values(), *self.workers.values())
        )
        return f"the cluster was not ready within {READY_DEADLINE_S:.0f} s\n{logs}"

    # ----------------------------------------------------------------------------- supervision

    async def _watch_nats(self) -> None:
        assert self._nats is not None
        while self._nats.is_running:  # noqa: ASYNC110 - a process of another's: nothing signals its end here
            await asyncio.sleep(_POLL_S)
        raise ClusterFailed(f"nats-server has ended, and with it the bus; its log: {self._nats.log_file}")

    async def _report_death(self, worker: ServiceProcess) -> None:
        await worker.wait()
        if not self._stopping:
            self._report(f"{describe_death(worker)}\nthe cluster goes on without {worker.name}")

    async def _keep_running(self, service: ServiceProcess) -> None:
        loop = asyncio.get_running_loop()
        num_deaths = 0
        while True:
            started = loop.time()
            await service.wait()
            if self._stopping:
                return
            num_deaths = 1 if loop.time() - started > RESTART_FORGIVEN_S else num_deaths + 1
            if num_deaths > len(RESTART_DELAYS_S):
                raise ClusterFailed(f"{service.name} died {num_deaths} times in a row\n{describe_death(service)}")
            delay_s = RESTART_DELAYS_S[num_deaths - 1]
            self._report(f"{describe_death(service)}\n{service.name} is started again in {delay_s} s")
            await asyncio.sleep(delay_s)
            await service.start()


async def stop_processes(processes: list[ServiceProcess], grace_s: float, force: asyncio.Event) -> None:
    """SIGTERM to all at once, SIGKILL to those left after `grace_s` seconds or when `force` is set."""

    async def kill_when_forced() -> None:
        await force.wait()
        for process in processes:
            process.send_signal(signal.SIGKILL)

    killer = asyncio.create_task(kill_when_forced())
    await asyncio.gather(*(process.stop(grace_s) for process in processes))
    killer.cancel()


def describe_death(process: ServiceProcess) -> str:
    returncode = process.returncode
    how = "is not running" if returncode is None else f"ended with {describe_exit(returncode)}"
    return f"{process.name} {how}; the end of {process.log_path}:\n{process.last_log_lines()}"


# --------------------------------------------------------------------------------- preconditions


def check_port(port: int) -> None:
    """Raises AmpdError INVALID_REQUEST when `port` (not 0) cannot be bound on loopback."""
    if port == 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise AmpdError(
                ErrorCode.INVALID_REQUEST,
                f"port {port} cannot be used ({error.strerror}): give another with --port N, "
                "or --port 0 for any free one",
            ) from error


async def resolve_model_dir(model: str, report: Report) -> Path:
    """The model's folder; converting it may take a minute, once. In a process of its own: torch stays out of ours.

    Raises ClusterFailed with what that process said.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "shared.engine.model_files", model),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=dying_with_this_process(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    last_lines: list[str] = []
    try:
        async for raw in process.stderr:
            line = raw.decode(errors="replace").rstrip()
            last_lines = [*last_lines[-9:], line]
            report(line)
        output = (await process.stdout.read()).decode().strip()
        returncode = await process.wait()
    finally:
        if process.returncode is None:  # we are being stopped; what it has made so far is cleared away by the next
            process.kill()
            await process.wait()
    if returncode == 2:  # the name or the folder is at fault, and the last line says what to change
        raise AmpdError(ErrorCode.INVALID_REQUEST, last_lines[-1])
    if returncode != 0:
        raise ClusterFailed(f"the model {model!r} could not be prepared:\n" + "\n".join(last_lines))
    return Path(output.splitlines()[-1])
