"""How every service process runs: uvloop, logs, signals, a bounded drain, an exit code, and its health check.

`python -m shared.service health NAME` asks over NATS whether the service or worker NAME answers: exit status 0 or 1.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import importlib.util
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

import shared
from shared.child_process import die_with_parent
from shared.errors import AmpdError
from shared.log import configure_logging, get_logger

CANCEL_GRACE_S = 3.0  # after the drain's time is up: for clean-up in `finally` blocks
_PACKAGES = ("shared", "services", "planner", "loadgen")


class ServiceContext:
    """What a service's main gets. Main returns soon after `stop` is set; a return before ends the process too."""

    def __init__(self, name: str, drain_timeout_s: float) -> None:
        self.name = name
        self.stop = asyncio.Event()
        self.drain_timeout_s = drain_timeout_s
        self.failure = ""
        self.log = get_logger("service")

    def fail(self, reason: str) -> None:
        """Stop the service with exit status 1, after its drain; the first reason counts."""
        self.failure = self.failure or reason
        self.stop.set()


Main = Callable[[ServiceContext], Awaitable[None]]


def run_service(main: Main, name: str, *, drain_timeout_s: float = 30.0) -> int:
    """Run `main` until it returns or is stopped, and return the exit status.

    SIGTERM or SIGINT sets `context.stop`; main then has drain_timeout_s to return, is cancelled after that, and the
    process is ended CANCEL_GRACE_S later whatever it does. A second signal ends the process at once.
    0: main returned. 1: it raised, failed or overran its drain. 128 + N: ended by a second signal N.
    With AMPD_PARENT_PID set, the process is killed when that parent is gone.
    """
    if parent_pid := os.environ.get("AMPD_PARENT_PID"):
        die_with_parent(int(parent_pid))
    faulthandler.enable()
    configure_logging(name)
    check_packages_are_ours()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_supervise(main, name, drain_timeout_s))


def check_packages_are_ours() -> None:
    """Raise RuntimeError if a package of ours is shadowed by another distribution's of the same name."""
    assert shared.__file__ is not None
    root = Path(shared.__file__).resolve().parent.parent
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent.parent != root:
            found = "missing" if spec is None else f"found at {spec.origin}"
            raise RuntimeError(
                f"the package {package!r} is {found}, not under {root}: another distribution shadows it;"
                " install ampd in an environment of its own"
            )


async def _supervise(main: Main, name: str, drain_timeout_s: float) -> int:
    context = ServiceContext(name, drain_timeout_s)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_unhandled)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, context, number)
    context.log.info("starting", pid=os.getpid())
    running = asyncio.ensure_future(main(context))
    stopping = asyncio.create_task(context.stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        context.log.info("draining", timeout_s=drain_timeout_s)
        await asyncio.wait({running}, timeout=drain_timeout_s)
    stopping.cancel()
    if not running.done():
        context.fail(f"not drained within {drain_timeout_s:.3g} s")
        running.cancel()
        await asyncio.wait({running}, timeout=CANCEL_GRACE_S)
    if not running.done():
        context.log.error("main ignores its cancellation: ending the process")
        _end_process(1)
    return _conclude(context, running)


def _conclude(context: ServiceContext, running: asyncio.Future[None]) -> int:
    error = None if running.cancelled() else running.exception()
    if isinstance(error, AmpdError):
        context.log.error("stopped by an error", code=error.code.value, error=error.message)
    elif error is not None:
        context.log.error("crashed", exc_info=error)
    if context.failure:
        context.log.error("failed", reason=context.failure)
    failed = error is not None or running.cancelled() or bool(context.failure)
    context.log.info("stopped", status=int(failed))
    return int(failed)


def _on_signal(context: ServiceContext, number: signal.Signals) -> None:
    if context.stop.is_set():
        context.log.warning("second signal: ending at once", signal=number.name)
        _end_process(128 + number)
    context.log.info("stopping", signal=number.name)
    context.stop.set()


def _end_process(status: int) -> None:
    """Without clean-up: threads may be inside a forward pass or a socket call."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _log_unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    get_logger("asyncio").error(
        "unhandled in the event loop", problem=str(context.get("message")), exc_info=context.get("exception")
    )


# --------------------------------------------------------------------------------------- health check


class _Ping(msgspec.Struct):
    name: str = ""
    metadata: dict[str, str] = {}


async def answers_ping(url: str, name: str, *, timeout_s: float) -> bool:
    """Whether a service of this name, with or without the prefix `ampd-`, or the worker with this id, answers a ping
    on the bus within timeout_s."""
    from shared.nats_bus import connect_nats_bus  # the service itself need not load it to be started

    def is_it(reply: bytes) -> bool:
        try:
            ping = msgspec.json.decode(reply, type=_Ping)
        except msgspec.DecodeError:
            return False  # another program's service on the same server
        return name in (ping.name, ping.name.removeprefix("ampd-"), ping.metadata.get("worker_id"))

    try:
        async with asyncio.timeout(timeout_s):
            bus = await connect_nats_bus(url, name="health", timeout_s=timeout_s)
    except (AmpdError, TimeoutError):
        return False
    try:
        replies = await bus.request_many(
            "$SRV.PING", b"", timeout_s=timeout_s, enough=lambda replies: is_it(replies[-1])
        )
    except AmpdError:
        return False
    finally:
        await bus.close()
    return any(is_it(reply) for reply in replies)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.service", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    health = commands.add_parser("health", help="exit with 0 if the service answers on the bus, else with 1")
    health.add_argument("name", help="service name, such as coordinator, or a worker's id")
    health.add_argument("--url", default=os.environ.get("AMPD_NATS_URL", "nats://127.0.0.1:4222"))
    health.add_argument("--timeout", type=float, default=3.0, help="seconds (default 3)")
    args = parser.parse_args(argv)
    configure_logging("health")
    healthy = asyncio.run(answers_ping(args.url, args.name, timeout_s=args.timeout))
    print(f"{args.name}: {'healthy' if healthy else 'no answer'}")
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
