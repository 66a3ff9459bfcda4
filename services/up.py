"""`ampd up` and `ampd run`: the embedded cluster in the foreground, and what a signal does to it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from services.cluster_options import ClusterOptions
from services.local import LocalCluster
from services.service_process import describe_exit
from shared import subjects
from shared.child_process import dying_with_this_process

COMMAND_GRACE_S = 30.0  # what the command of `ampd run` gets to finish after the first signal
COMMAND_NOT_FOUND = 127  # as a shell says it


class StoppedBySignal(Exception):
    """A signal asked to stop before the cluster was ready."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.exit_status = 128 + number


class StopSignals:
    """SIGINT and SIGTERM: the first asks to stop (`requested`), the second forces (`forced`)."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()
        self.first: signal.Signals | None = None

    @contextmanager
    def installed(self) -> Iterator[StopSignals]:
        loop = asyncio.get_running_loop()
        handled = (signal.SIGINT, signal.SIGTERM)
        for number in handled:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield self
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    async def run_until_requested(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` to its end. Raises StoppedBySignal, with `work` cancelled, when a signal comes first."""
        working = asyncio.create_task(work)
        waiting = asyncio.create_task(self.requested.wait())
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if working.done():
            return working.result()
        working.cancel()
        await asyncio.wait({working})
        assert self.first is not None
        raise StoppedBySignal(self.first)

    def _on_signal(self, number: signal.Signals) -> None:
        if self.first is None:
            self.first = number
            self.requested.set()
        else:
            self.forced.set()


@asynccontextmanager
async def running_cluster(
    options: ClusterOptions, console: Console, signals: StopSignals
) -> AsyncIterator[LocalCluster]:
    """A ready cluster; whatever happens, every process is stopped at the end."""
    cluster = LocalCluster(options, lambda line: console.print(Text(line, style="dim")))
    try:
        await signals.run_until_requested(cluster.start())
        yield cluster
    finally:
        console.print(Text("stopping the cluster (Ctrl-C again: at once)", style="dim"))
        await cluster.stop(signals.forced)


async def serve(options: ClusterOptions, console: Console) -> int:
    """`ampd up`: serves until a signal, then returns 0. Raises ClusterFailed when the cluster cannot go on."""
    with StopSignals().installed() as signals:
        async with running_cluster(options, console, signals) as cluster:
            print_ready(cluster, options, console)
            try:
                await signals.run_until_requested(cluster.supervise())
            except StoppedBySignal:
                return 0
    raise AssertionError("supervise ends only by failing or by being cancelled")


async def run_command(options: ClusterOptions, argv: Sequence[str], console: Console) -> int:
    """`ampd run`: the command's status, 128 + n when signal n ended it. Raises ClusterFailed as `serve` does."""
    if shutil.which(argv[0]) is None:
        console.print(Text(f"ampd run: {argv[0]}: no such command", style="red"))
        return COMMAND_NOT_FOUND
    with StopSignals().installed() as signals:
        async with running_cluster(options, console, signals) as cluster:
            command = await asyncio.create_subprocess_exec(
                *argv, env={**os.environ, "AMPD_NATS_URL": cluster.url}, preexec_fn=dying_with_this_process()
            )
            returncode = await _wait_for_command(command, cluster, signals)
    if returncode < 0:
        console.print(Text(f"ampd run: {argv[0]} ended with {describe_exit(returncode)}", style="red"))
        return 128 - returncode
    return returncode


async def _wait_for_command(command: asyncio.subprocess.Process, cluster: LocalCluster, signals: StopSignals) -> int:
    """Its return code. A signal is passed on, and so is the cluster's failure, which is raised afterwards."""
    ended = asyncio.create_task(command.wait())
    failed = asyncio.create_task(cluster.supervise())
    requested = asyncio.create_task(signals.requested.wait())
    forced = asyncio.create_task(signals.forced.wait())
    try:
        await asyncio.wait({ended, failed, requested}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            if signals.first is None:
                command.send_signal(signal.SIGTERM)  # the cluster has failed: there is nothing left to run against
            elif not (signals.first is signal.SIGINT and sys.stdin.isatty()):
                command.send_signal(signals.first)  # a terminal's Ctrl-C has reached the command already
            await asyncio.wait({ended, forced}, timeout=COMMAND_GRACE_S, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                command.kill()
        returncode = await ended
        if failed.done():
            failed.result()
        return returncode
    finally:
        for task in (failed, requested, forced):
            task.cancel()


def print_ready(cluster: LocalCluster, options: ClusterOptions, console: Console) -> None:
    """How to connect, for a person; the commands stand outside the frame, so that they can be copied whole."""
    lines = (describe_workers(options), describe_engine(options), describe_policy(options))
    ready = Text("".join(f"{line}\n" for line in lines))
    ready.append(f"logs in {cluster.log_dir}; Ctrl-C stops", style="dim")
    console.print(Panel(ready, title=f"AMPD is ready at {cluster.url}", border_style="green", expand=False))
    open_request = """'{"type":"open"}'"""
    talk = (
        ("talk to the model", "ampd chat")
        if options.engine == "torch"
        else ("play a trace: the tokens are made up, there is no text", "loadgen replay TRACE --out DIR")
    )
    for comment, line in (
        ("in another terminal", f"export AMPD_NATS_URL={cluster.url}"),
        talk,
        ("workers, queues, sessions", "ampd status"),
        (
            "any NATS client will do",
            f"nats -s {cluster.url} req {subjects.session_request('default', 's1')} {open_request}",
        ),
    ):
        console.print(Text(f"# {comment}", style="dim"))
        console.print(Text(line, style="bold"), soft_wrap=True)


def describe_workers(options: ClusterOptions) -> str:
    counts = (
        (options.num_prefill, "prefill"),
        (options.num_decode, "decode"),
        (options.num_both, "prefill-and-decode"),
    )
    workers = " + ".join(f"{count} {role}" for count, role in counts if count)
    unit = "devices" if options.engine == "emulated" else "processes"
    degree = f", {options.parallel_degree} {unit} each" if options.parallel_degree > 1 else ""
    return f"{workers} worker(s){degree}"


def describe_engine(options: ClusterOptions) -> str:
    if options.engine == "emulated":
        return f"{options.served}, time scale {options.time_scale:g}"
    profile = "" if options.profile is None else f"; profile {options.profile}"
    return f"model {options.served}, {options.dtype}, {options.device}{profile}"


def describe_policy(options: ClusterOptions) -> str:
    without = f" without {', '.join(options.disabled_parts)}" if options.disabled_parts else ""
    return ", ".join((f"policy {options.policy}{without}", *options.policy_options))
