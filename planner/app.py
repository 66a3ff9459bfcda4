"""The planner service: hears heartbeats and ended rounds, answers `get_stats`, writes the statistics down, re-plans."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import time
from pathlib import Path

from planner.collector import Collector
from planner.replanning.controller import Controller
from planner.replanning.observed import WINDOW_S
from planner.replanning.replanner import ReplanParameters
from planner.stats_log import StatsLog
from shared import subjects
from shared.bus import Bus, BusMessage
from shared.errors import AmpdError, ErrorCode
from shared.log import get_logger
from shared.messages import GetStats, Heartbeat, Replan, ReplanMode, RoundObserved, decode, encode, encoding_of
from shared.nats_bus import connect_nats_bus
from shared.service import ServiceContext, run_service

DEFAULT_INTERVAL_S = 10.0
VERSION = "0.1.0"

log = get_logger(__name__)


class PlannerService:
    """The collector on the bus. `num_malformed` counts messages that could not be read."""

    def __init__(self, bus: Bus, stats_log: StatsLog, controller: Controller | None = None) -> None:
        self._bus = bus
        self.controller = controller or Controller(bus, mode="dry-run", clock=time.monotonic)
        self._stats_log = stats_log
        self._collector = Collector(stats_log.read_totals(), time.monotonic())
        self.num_malformed = 0

    async def start(self) -> None:
        await self._bus.subscribe_ordered(subjects.HEARTBEATS, self._on_observation)
        await self._bus.subscribe_ordered(subjects.OBSERVED_ROUND, self._on_observation)
        await self._bus.subscribe(subjects.PLANNER_STATS, self._on_get_stats, queue="planner")
        await self._bus.subscribe(subjects.REPLAN, self._on_replan, queue="planner")
        await self._bus.register_service("ampd-planner", VERSION, {})

    def write_down(self) -> None:
        """Append the statistics; a full disk costs this line, not the service."""
        try:
            self._stats_log.append(self._collector.stats(time.monotonic()))
        except OSError as error:
            log.error("statistics not written", path=str(self._stats_log.path), error=str(error))

    def _on_observation(self, message: BusMessage) -> None:
        try:
            decoded = decode(message.data)
        except AmpdError as error:
            self.num_malformed += 1
            log.warning("message not read", subject=message.subject, error=error.message)
            return
        match decoded:
            case Heartbeat():
                self._collector.on_heartbeat(decoded, time.monotonic())
                self.controller.on_heartbeat(decoded)
            case RoundObserved():
                self._collector.on_round(decoded, time.monotonic())
                self.controller.on_round(decoded)
            case _:
                self.num_malformed += 1

    async def _on_get_stats(self, message: BusMessage) -> None:
        request = decode(message.data)
        if not isinstance(request, GetStats):
            raise AmpdError(ErrorCode.INVALID_REQUEST, 'this subject answers {"type":"get_stats"} alone')
        await message.respond(encode(self._collector.stats(time.monotonic()), encoding_of(message.data)))

    async def _on_replan(self, message: BusMessage) -> None:
        request = decode(message.data)
        if not isinstance(request, Replan):
            raise AmpdError(
                ErrorCode.INVALID_REQUEST, 'this subject answers {"type":"replan"} alone, with "mode":M to set the mode'
            )
        if request.mode is not None:
            self.controller.set_mode(request.mode)
        await message.respond(encode(self.controller.state, encoding_of(message.data)))


async def run_planner(
    service: ServiceContext,
    *,
    nats_url: str,
    data_dir: Path,
    interval_s: float,
    mode: ReplanMode = "dry-run",
    profile_name: str | None = None,
    parameters: ReplanParameters | None = None,
    window_s: float = WINDOW_S,
) -> None:
    """Serve until `service.stop`; the last statistics are written on the way out."""
    bus = await connect_nats_bus(nats_url, name="planner", on_lost=service.fail)
    try:
        controller = Controller(
            bus,
            mode=mode,
            clock=time.monotonic,
            profile_name=profile_name,
            parameters=parameters,
            window_s=window_s,
        )
        planner = PlannerService(bus, StatsLog(data_dir / "planner"), controller)
        await planner.start()
        while not service.stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(service.stop.wait(), interval_s)
            planner.write_down()
            if not service.stop.is_set():
                await controller.step()
    finally:
        await bus.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m planner",
        description="Collects the cluster's statistics, answers requests for them, writes them down, plans roles.",
        epilog="example: python -m planner --nats-url nats://127.0.0.1:4222 --data-dir data",
    )
    add = parser.add_argument
    add("--nats-url", default=os.environ.get("AMPD_NATS_URL", "nats://127.0.0.1:4222"))
    add("--data-dir", type=Path, required=True, help="statistics go to planner/stats.jsonl in it")
    add(
        "--interval",
        type=float,
        default=DEFAULT_INTERVAL_S,
        metavar="S",
        help="seconds between two lines, and between two plans (default: %(default)s)",
    )
    modes = ("act", "dry-run", "frozen")
    add("--replan", choices=modes, default="dry-run", help="what becomes of proposed roles (default: %(default)s)")
    add("--profile", metavar="NAME|FILE", help="timings of workers that name none themselves")
    default = ReplanParameters()
    hold_help = "seconds that the load must press before roles change (default: %(default)s)"
    add("--replan-hold", type=float, default=default.hold_s, metavar="S", help=hold_help)
    settle_help = "seconds from one change to the next (default: %(default)s)"
    add("--replan-settle", type=float, default=default.settle_s, metavar="S", help=settle_help)
    window_help = "seconds of ended rounds that are the workload (default: %(default)s)"
    add("--replan-window", type=float, default=WINDOW_S, metavar="S", help=window_help)
    args = parser.parse_args()
    for name, seconds, least in (
        ("--interval", args.interval, "more than"),
        ("--replan-hold", args.replan_hold, "at least"),
        ("--replan-settle", args.replan_settle, "at least"),
        ("--replan-window", args.replan_window, "more than"),
    ):
        if not (seconds > 0 or (seconds == 0 and least == "at least")):
            parser.error(f"{name} must be {least} 0 seconds, got {seconds}")
    serve = functools.partial(
        run_planner,
        nats_url=args.nats_url,
        data_dir=args.data_dir,
        interval_s=args.interval,
        mode=args.replan,
        profile_name=args.profile,
        parameters=ReplanParameters(hold_s=args.replan_hold, doubt_s=args.replan_window, settle_s=args.replan_settle),
        window_s=args.replan_window,
    )
    return run_service(serve, name="planner")
