"""The `loadgen` command: replay traces, compare policies, make synthetic traces, render reports again.

Exit status: 0 when every round completed (compare: when every run was made); 1 when not; 2 when the command could not
start, with a message that says what to change.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from dataclasses import fields
from pathlib import Path

import uvloop
from rich.console import Console

from loadgen.argument_types import context, count, non_negative, positive, seed
from loadgen.compare_command import add_compare_command
from loadgen.plan import Plan
from loadgen.run import RUN, ReplayConfig, make_folder, plan_replay, render_again, replay_trace
from loadgen.synth import KINDS, synthesise
from loadgen.traces import write_trace
from shared.client import AmpdClient
from shared.errors import AmpdError, BusError

DEFAULT_URL = "nats://127.0.0.1:4222"
CONNECT_TIMEOUT_S = 5.0

REPLAY_EXAMPLE = "example: loadgen replay trace.jsonl --sessions 8 --rate 0.2 --ttft-slo 2 --itl-slo 0.2 --out out/run"
SYNTH_EXAMPLE = "example: loadgen synth tool-use-text --sessions 12 --seed 7 --out demo.jsonl"
REPORT_EXAMPLE = "example: loadgen report out/run --ttft-slo 1"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. A wrong command line exits with 2, as argparse does."""
    args = build_parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except AmpdError as error:
        Console(stderr=True).print(f"loadgen: {error.message} ({error.code.value})", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 1
    return status


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loadgen", description="Load generator of AMPD.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_replay(commands)
    _add_synth(commands)
    _add_report(commands)
    add_compare_command(commands)
    return parser


def _add_replay(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    replay = commands.add_parser(
        "replay", help="replay a trace of multi-round sessions against a cluster", epilog=REPLAY_EXAMPLE
    )
    replay.set_defaults(run=run_replay)
    replay.add_argument("file", metavar="FILE", help="trace, JSON lines")
    replay.add_argument("--format", choices=("auto", "ampd", "mooncake"), default="auto")
    replay.add_argument("--nats-url", metavar="URL", help=f"default: $AMPD_NATS_URL, or {DEFAULT_URL}")
    replay.add_argument("--tenant", default="default")
    replay.add_argument("--sessions", type=count, metavar="N", help="the first N of the trace (default: all)")
    replay.add_argument("--sample", action="store_true", help="N drawn from the whole trace by the seed instead")
    replay.add_argument("--rate", type=positive, metavar="R", help="mean arrivals, sessions per second")
    replay.add_argument(
        "--arrivals",
        choices=("poisson", "recorded"),
        help="default: poisson with --rate; without, recorded if the trace knows them, else poisson at 1/s",
    )
    replay.add_argument("--ttft-slo", type=positive, default=ReplayConfig.ttft_slo, metavar="S")
    replay.add_argument("--itl-slo", type=positive, default=ReplayConfig.itl_slo, metavar="S")
    replay.add_argument(
        "--max-context", type=context, metavar="N", help="cut sessions to N tokens, inputs and outputs together"
    )
    replay.add_argument("--max-delay", type=non_negative, metavar="S", help="cap the delays between rounds")
    replay.add_argument(
        "--max-in-flight", type=count, default=ReplayConfig.max_in_flight, metavar="N", help="sessions open at once"
    )
    replay.add_argument(
        "--deadline",
        type=positive,
        default=ReplayConfig.deadline,
        metavar="S",
        help="of a round (default: %(default)g)",
    )
    replay.add_argument("--seed", type=seed, default=0, metavar="K")
    replay.add_argument("--out", type=Path, required=True, metavar="DIR")


def _add_synth(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    synth = commands.add_parser(
        "synth", help="make a synthetic trace, fitted to published statistics", epilog=SYNTH_EXAMPLE
    )
    synth.set_defaults(run=run_synth)
    synth.add_argument("kind", choices=sorted(KINDS), metavar="KIND", help=", ".join(sorted(KINDS)))
    synth.add_argument("--sessions", type=count, required=True, metavar="N")
    synth.add_argument("--seed", type=seed, default=0, metavar="K")
    synth.add_argument("--out", type=Path, required=True, metavar="FILE")


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser(
        "report",
        help="render table, report.json and plot of a replay again",
        description=f"Reads {RUN} and rounds.jsonl. With another SLO only the table is printed.",
        epilog=REPORT_EXAMPLE,
    )
    report.set_defaults(run=run_report)
    report.add_argument("folder", type=Path, metavar="DIR", help="the --out folder of a replay")
    report.add_argument("--ttft-slo", type=positive, metavar="S")
    report.add_argument("--itl-slo", type=positive, metavar="S")


def run_replay(args: argparse.Namespace) -> int:
    config = ReplayConfig(**{field.name: getattr(args, field.name) for field in fields(ReplayConfig)})
    plan = plan_replay(config)
    make_folder(args.out)
    url = args.nats_url or os.environ.get("AMPD_NATS_URL") or DEFAULT_URL
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_connect_and_replay(url, args.tenant, config, plan, args.out))


async def _connect_and_replay(url: str, tenant: str, config: ReplayConfig, plan: Plan, out: Path) -> int:
    try:
        client = await AmpdClient.connect(url, tenant=tenant, name="loadgen", timeout_s=CONNECT_TIMEOUT_S)
    except BusError as error:
        raise AmpdError(
            error.code, f"{error.message}; start a cluster with `ampd up`, or give --nats-url or AMPD_NATS_URL"
        ) from error
    async with client:
        report = await replay_trace(client, config, plan, out, Console())
    return 0 if report["rounds"]["failed"] == 0 else 1


def run_synth(args: argparse.Namespace) -> int:
    make_folder(args.out.parent)
    num_sessions = write_trace(args.out, synthesise(args.kind, args.sessions, args.seed))
    Console().print(f"wrote {num_sessions} sessions to {args.out}", soft_wrap=True)
    return 0


def run_report(args: argparse.Namespace) -> int:
    report = render_again(args.folder, Console(), args.ttft_slo, args.itl_slo)
    return 0 if report["rounds"]["failed"] == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
