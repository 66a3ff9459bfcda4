"""`ampd simulate`: the command line around run_simulation. Nothing heavy is imported before the command is chosen."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loadgen.argument_types import context, count, count_or_zero, non_negative, positive, seed
from shared.errors import AmpdError, ErrorCode
from shared.policy_flags import add_policy_flags

if TYPE_CHECKING:
    from rich.console import Console

    from loadgen.report import Report
    from loadgen.workload import Workload
    from planner.simulator.run_simulation import SimulationSetup
    from shared.messages import Slo

EXAMPLE = """example:
  ampd simulate --profile h100-qwen3-32b --trace sessions.jsonl --both 8 --both-tp 2 --policy adaptive \\
    --rate 20 --duration 60 --ttft-slo 0.5 --itl-slo 0.05 --out out/simulated"""


def add_simulate_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds `simulate`; the parsed arguments' `command` is `command_simulate`."""
    parser = commands.add_parser(
        "simulate",
        help="simulate a cluster of profiled workers serving a trace",
        description="Simulate a cluster of profiled workers serving a trace; writes what `loadgen replay` writes.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command_simulate)
    _add_cluster_flags(parser)
    _add_workload_flags(parser)
    _add_model_flags(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="for run.json, rounds.jsonl, report.json and report.png")
    add("--json", action="store_true", help="print the report as JSON instead of a table")
    return parser


def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--profile", required=True, metavar="NAME|FILE", help="timings of the workers: one that ships, or a file")
    for role, what in (("prefill", "prefill workers"), ("decode", "decode workers"), ("both", "workers for both")):
        add(f"--{role}", type=count_or_zero, default=0, metavar="N", help=f"{what} (default: %(default)s)")
        add(f"--{role}-tp", type=count, default=1, metavar="T", help="devices of each (default: %(default)s)")
    add_policy_flags(parser)


def _add_workload_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--trace", required=True, metavar="FILE", help="JSON lines, as for `loadgen replay`")
    add("--format", choices=("auto", "ampd", "mooncake"), default="auto")
    add("--rate", type=positive, required=True, metavar="R", help="mean Poisson arrivals, sessions per second")
    add("--sessions", type=count, metavar="N", help="(default: all of the trace); a shorter trace is repeated")
    add("--duration", type=positive, metavar="S", help="R x S sessions instead; later rounds are not reported")
    add("--warm-up", type=non_negative, default=0.0, metavar="S", help="nor are rounds sent before S (default: 0)")
    add("--sample", action="store_true", help="sessions drawn from the whole trace by the seed, not the first ones")
    add("--max-context", type=context, metavar="N", help="cut sessions to N tokens, inputs and outputs together")
    add("--max-delay", type=non_negative, metavar="S", help="cap the delays between rounds")
    unknown_help = "the delay where the trace does not know it (default: 0)"
    add("--unknown-delay", type=non_negative, default=0.0, metavar="S", help=unknown_help)
    add("--ttft-slo", type=positive, metavar="S", help="(default: as for `loadgen replay`)")
    add("--itl-slo", type=positive, metavar="S", help="(default: as for `loadgen replay`)")
    add("--seed", type=seed, default=0, metavar="K", help="of arrivals, sample and repetition (default: 0)")


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    step_help = "mixed: a local prefill runs in the decode steps; pause: it stops them (default: %(default)s)"
    add("--step-model", choices=("mixed", "pause"), default="mixed", help=step_help)
    add("--predicted-scale", type=positive, default=1.0, metavar="X", help="the scheduler takes X times the true costs")
    add("--gap-factor", type=positive, default=1.0, metavar="X", help="and X times the true tool times")
    add("--bandwidth-scale", type=positive, default=1.0, metavar="X", help="links X times as fast (default: 1)")
    fail_help = "a worker dies, and comes back after DOWN_S if given; numbered from 0: prefill, decode, both"
    add("--fail", action="append", default=[], metavar="INDEX@SECONDS[:DOWN_S]", help=fail_help)


def command_simulate(arguments: argparse.Namespace) -> int:
    """0 when the simulation ran, whatever became of its rounds; raises AmpdError for what the caller must change."""
    from rich.console import Console

    from loadgen.report import encode_report
    from loadgen.table import print_report

    console = Console(stderr=True) if arguments.json else Console()
    setup, workload = read_setup(arguments), read_workload(arguments)
    report = simulate_into(arguments.out, setup, workload, arguments.warm_up, console)
    if arguments.json:
        sys.stdout.write(encode_report(report).decode())
        return 0
    print_report(report, console)
    console.print(f"report, rounds and plot: {arguments.out}", soft_wrap=True)
    return 0


def simulate_into(out: Path, setup: SimulationSetup, workload: Workload, warm_up_s: float, console: Console) -> Report:
    """Simulate, and write run.json, rounds.jsonl, report.json and report.png. Raises AmpdError INVALID_REQUEST."""
    from loadgen.run import make_folder, write_report, write_run
    from loadgen.traces import read_trace
    from loadgen.workload import choose_workload, describe_trace, plan_workload
    from planner.simulator.run_simulation import check_setup, describe_run, simulate_plan

    check_setup(setup)
    if workload.duration is not None and warm_up_s >= workload.duration:
        raise AmpdError(ErrorCode.INVALID_REQUEST, "--warm-up must end before --duration: nothing would be measured")
    trace = list(read_trace(Path(workload.file), workload.format))
    plan = plan_workload(choose_workload(trace, workload), workload)
    make_folder(out)
    with show_progress(console, plan.num_rounds) as on_progress:
        records, simulation = simulate_plan(setup, plan, on_progress)
    run = describe_run(setup, workload, plan, describe_trace(trace, workload, plan), simulation, warm_up_s)
    write_run(run, records, out)
    return write_report(run, records, out)


@contextmanager
def show_progress(console: Console, num_rounds: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("rounds", total=num_rounds)
        yield lambda num_ended: progress.update(task, completed=num_ended)


def read_setup(arguments: argparse.Namespace) -> SimulationSetup:
    from planner.simulator.cluster import WorkerGroup
    from planner.simulator.failures import Failure
    from planner.simulator.run_simulation import SimulationSetup

    groups = (
        WorkerGroup(role="prefill", count=arguments.prefill, parallel_degree=arguments.prefill_tp),
        WorkerGroup(role="decode", count=arguments.decode, parallel_degree=arguments.decode_tp),
        WorkerGroup(role="both", count=arguments.both, parallel_degree=arguments.both_tp),
    )
    return SimulationSetup(
        profile=arguments.profile,
        groups=groups,
        policy=arguments.policy,
        disabled_parts=tuple(arguments.disable),
        policy_options=tuple(arguments.policy_option),
        slo=read_slo(arguments.ttft_slo, arguments.itl_slo),
        step_model=arguments.step_model,
        predicted_scale=arguments.predicted_scale,
        gap_factor=arguments.gap_factor,
        bandwidth_scale=arguments.bandwidth_scale,
        failures=tuple(Failure(*parse_failure(text)) for text in arguments.fail),
    )


def read_workload(arguments: argparse.Namespace) -> Workload:
    from loadgen.workload import Workload

    return Workload(
        file=arguments.trace,
        format=arguments.format,
        rate=arguments.rate,
        sessions=arguments.sessions,
        duration=arguments.duration,
        sample=arguments.sample,
        max_context=arguments.max_context,
        max_delay=arguments.max_delay,
        unknown_delay=arguments.unknown_delay,
        seed=arguments.seed,
    )


def read_slo(ttft_s: float | None, itl_s: float | None) -> Slo:
    from shared.messages import Slo

    default = Slo()
    return Slo(ttft_s=default.ttft_s if ttft_s is None else ttft_s, itl_s=default.itl_s if itl_s is None else itl_s)


def parse_failure(text: str) -> tuple[int, float, float | None]:
    """INDEX@SECONDS[:DOWN_S]. Raises AmpdError INVALID_REQUEST."""
    index, at_sign, times = text.partition("@")
    at, colon, down = times.partition(":")
    try:
        if not at_sign:
            raise argparse.ArgumentTypeError
        return count_or_zero(index), non_negative(at), positive(down) if colon else None
    except argparse.ArgumentTypeError:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST, f"--fail {text!r} must be INDEX@SECONDS or INDEX@SECONDS:DOWN_S, as in 3@20:5"
        ) from None
