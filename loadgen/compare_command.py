"""`loadgen compare`: the command line around compare. Nothing heavy is imported before the command is chosen."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loadgen.argument_types import context, count, count_or_zero, names, non_negative, positive, positives, seeds
from shared.errors import AmpdError, ErrorCode

if TYPE_CHECKING:
    from rich.console import Console

    from loadgen.compare import CompareConfig
    from loadgen.compare_runners import LiveRunner, SimulatedRunner
    from loadgen.contenders import Contender, WorkerSpec
    from loadgen.traces import TraceSession
    from loadgen.workload import Workload

TABLE_WIDTH = 120
EXAMPLES = """examples:
  loadgen compare trace.jsonl --simulate --profile h100-qwen3-32b --policies remote,ampd,adaptive --rates 20,40,80 \\
    --cluster prefill:8x2,decode:8x2 --cluster adaptive=both:16x2 --duration 60 --ttft-slo 0.5 --itl-slo 0.05 \\
    --out out/simulated
  loadgen compare trace.jsonl --policies remote,adaptive --rates 0.2,0.4 --prefill 1 --decode 1 --out out/live"""


def add_compare_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds `compare`; the parsed arguments' `run` is `run_compare`."""
    parser = commands.add_parser(
        "compare",
        help="the same sessions and arrivals under several policies, simulated or live",
        description="The same sessions and arrivals under several policies: a table, plots and compare.json.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run_compare)
    _add_what(parser)
    _add_workload(parser)
    _add_cluster(parser)
    add = parser.add_argument
    add(
        "--plot-rate",
        type=positive,
        metavar="R",
        help="of distributions and lanes (default: the best policy's goodput)",
    )
    add("--out", type=Path, required=True, metavar="DIR")
    add("--json", action="store_true", help="print compare.json instead of the table")
    return parser


def _add_what(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", help="trace, JSON lines")
    add("--policies", type=names, required=True, metavar="P,P", help="as for `ampd up --policy`")
    add("--rates", type=positives, required=True, metavar="R,R", help="mean Poisson arrivals, sessions per second")
    add("--seeds", type=seeds, default=(0,), metavar="K,K", help="a run each (default: 0)")
    part_help = "switch off a part of a policy, repeatable"
    add("--disable", action="append", default=[], metavar="POLICY:PART", help=part_help)
    option_help = "a parameter of a policy, repeatable: colocated:routing.chunk.chunk_tokens=512"
    add("--policy-option", action="append", default=[], metavar="POLICY:PATH=VALUE", help=option_help)
    add("--ttft-slo", type=positive, metavar="S", help="(default: as for `loadgen replay`)")
    add("--itl-slo", type=positive, metavar="S", help="(default: as for `loadgen replay`)")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--format", choices=("auto", "ampd", "mooncake"), default="auto")
    add("--sessions", type=count, metavar="N", help="(default: all of the trace); a shorter trace is repeated")
    add("--duration", type=positive, metavar="S", help="rate x S sessions instead; later rounds are not reported")
    add("--warm-up", type=non_negative, default=0.0, metavar="S", help="nor are rounds sent before S (default: 0)")
    add("--sample", action="store_true", help="sessions drawn from the whole trace by the seed, not the first ones")
    add("--max-context", type=context, metavar="N", help="cut sessions to N tokens, inputs and outputs together")
    add("--max-delay", type=non_negative, metavar="S", help="cap the delays between rounds")
    unknown_help = "the delay where the trace does not know it (default: 0)"
    add("--unknown-delay", type=non_negative, default=0.0, metavar="S", help=unknown_help)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prefill", type=count_or_zero, metavar="N", help="workers of every policy without a --cluster of its own")
    add("--decode", type=count_or_zero, metavar="N")
    add("--both", type=count_or_zero, metavar="N")
    add("--parallel-degree", type=count, default=1, metavar="T", help="devices of each of these workers (default: 1)")
    cluster_help = "workers of a policy (or of all): remote=prefill:8x2,decode:8x2; repeatable"
    add("--cluster", action="append", default=[], metavar="[POLICY=]SPEC", help=cluster_help)
    add("--profile", metavar="NAME|FILE", help="timings of simulated or emulated workers")
    simulated = parser.add_argument_group("simulated")
    simulated.add_argument("--simulate", action="store_true", help="no cluster is started: see `ampd simulate`")
    simulated.add_argument("--step-model", choices=("mixed", "pause"), default="mixed", help="(default: %(default)s)")
    live = parser.add_argument_group("live: a cluster for every run, as `ampd run` starts it")
    live.add_argument("--engine", choices=("torch", "emulated"), default="torch", help="(default: %(default)s)")
    live.add_argument("--model", metavar="M", help="as for `ampd run`")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    live.add_argument("--dtype", choices=dtypes, help="as for `ampd run`")
    live.add_argument("--threads", type=count, metavar="N", help="per worker, as for `ampd run`")
    live.add_argument("--kv-memory-mb", type=count, metavar="MB", help="per worker, as for `ampd run`")
    scale_help = (
        "emulated: wall seconds per second of the profile, and everything is reported in the profile's; simulated: of "
        "the emulated cluster to compare with, whose own messages take so much less (default: 1)"
    )
    live.add_argument("--time-scale", type=positive, default=1.0, metavar="X", help=scale_help)
    live.add_argument("--deadline", type=positive, default=600.0, metavar="S", help="of a round (default: %(default)g)")


def run_compare(args: argparse.Namespace) -> int:
    """0 when every run was made, 1 when not; raises AmpdError INVALID_REQUEST for what the caller must change."""
    from rich.console import Console

    from loadgen.compare import COMPARE, compare_policies
    from loadgen.compare_plot import save_plots
    from loadgen.compare_table import print_comparison
    from loadgen.traces import read_trace

    console = Console(stderr=args.json)
    if not console.is_terminal:  # a file or pipe has no width: the table is not to be squeezed into 80 columns
        console = Console(stderr=args.json, width=TABLE_WIDTH)
    config = read_config(args)
    trace = list(read_trace(Path(args.file), args.format))
    runner = make_runner(args, config, trace)
    runner.check(config.contenders)
    num_runs = len(config.contenders) * len(config.rates) * len(config.seeds)
    with _show_progress(console, num_runs) as on_run:
        comparison = compare_policies(config, trace, runner, args.out, on_run)
    if comparison["runs"]:
        paths = save_plots(comparison, args.out, args.plot_rate)
        print_comparison(comparison, console)
        console.print("\n".join(map(str, [args.out / COMPARE, *paths])), soft_wrap=True, highlight=False)
    for failure in comparison["failures"]:
        which = f"{failure['policy']}, rate {failure['rate']:g}, seed {failure['seed']}"
        console.print(f"not made: {which}: {failure['message']}", style="red", markup=False, soft_wrap=True)
    if args.json:
        sys.stdout.write((args.out / COMPARE).read_text())
    return 1 if comparison["failures"] else 0


def read_config(args: argparse.Namespace) -> CompareConfig:
    """Raises AmpdError INVALID_REQUEST that says what to change."""
    from loadgen.compare import CompareConfig
    from loadgen.contenders import make_contenders
    from loadgen.workload import count_sessions
    from shared.messages import Slo

    workload = _read_workload(args)
    count_sessions(workload)
    if args.duration is not None and args.warm_up >= args.duration:
        raise AmpdError(ErrorCode.INVALID_REQUEST, "--warm-up must end before --duration: nothing would be measured")
    if args.plot_rate is not None and args.plot_rate not in args.rates:
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"--plot-rate {args.plot_rate:g} is none of --rates")
    return CompareConfig(
        kind="simulated" if args.simulate else "live",
        contenders=make_contenders(args.policies, _read_workers(args), args.cluster, args.disable, args.policy_option),
        workload=workload,
        rates=tuple(sorted(args.rates)),
        seeds=args.seeds,
        slo=Slo(
            ttft_s=Slo().ttft_s if args.ttft_slo is None else args.ttft_slo,
            itl_s=Slo().itl_s if args.itl_slo is None else args.itl_slo,
        ),
        warm_up=args.warm_up,
    )


def _read_workload(args: argparse.Namespace) -> Workload:
    from loadgen.workload import Workload

    return Workload(
        file=args.file,
        format=args.format,
        rate=max(args.rates),
        sessions=args.sessions,
        duration=args.duration,
        sample=args.sample,
        max_context=args.max_context,
        max_delay=args.max_delay,
        unknown_delay=args.unknown_delay,
        seed=args.seeds[0],
    )


def _read_workers(args: argparse.Namespace) -> tuple[WorkerSpec, ...] | None:
    """--prefill, --decode and --both as a cluster; live, `ampd run`'s one prefill and one decode worker."""
    from loadgen.contenders import WorkerSpec

    counts = {"prefill": args.prefill, "decode": args.decode, "both": args.both}
    if all(number is None for number in counts.values()):
        if args.simulate:
            return None
        counts = {"prefill": 1, "decode": 1, "both": None}
    workers = tuple(
        WorkerSpec(role=role, count=number, parallel_degree=args.parallel_degree)  # type: ignore[arg-type]
        for role, number in counts.items()
        if number
    )
    if all(one.role == "prefill" for one in workers):
        raise AmpdError(ErrorCode.INVALID_REQUEST, "no worker would decode: --decode or --both must be at least 1")
    return workers


def make_runner(
    args: argparse.Namespace, config: CompareConfig, trace: list[TraceSession]
) -> SimulatedRunner | LiveRunner:
    from loadgen.compare_runners import LiveRunner, SimulatedRunner

    needs_profile = args.simulate or args.engine == "emulated"
    if needs_profile and args.profile is None:
        flag = "--simulate" if args.simulate else "--engine emulated"
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"{flag} needs --profile: the name of one, or a profile's file")
    if args.simulate:
        if args.engine != "torch" or args.model is not None or args.dtype is not None:
            raise AmpdError(
                ErrorCode.INVALID_REQUEST, "--engine, --model and --dtype are of live clusters, not of --simulate"
            )
        return SimulatedRunner(
            profile=args.profile,
            slo=config.slo,
            warm_up=args.warm_up,
            trace=trace,
            step_model=args.step_model,
            time_scale=args.time_scale,
        )
    if args.time_scale != 1.0 and args.engine != "emulated":
        raise AmpdError(ErrorCode.INVALID_REQUEST, "--time-scale is of the emulated engine: --engine emulated")
    options = {
        "--engine": args.engine,
        "--profile": args.profile,
        "--model": args.model,
        "--dtype": args.dtype,
        "--threads": args.threads,
        "--kv-memory-mb": args.kv_memory_mb,
    }
    flags = [text for flag, value in options.items() if value is not None for text in (flag, str(value))]
    if args.engine == "emulated":
        flags += ["--time-scale", repr(args.time_scale)]
    return LiveRunner(
        slo=config.slo,
        warm_up=args.warm_up,
        trace=trace,
        deadline=args.deadline,
        time_scale=args.time_scale,
        engine=args.engine,
        cluster_flags=tuple(flags),
    )


@contextmanager
def _show_progress(console: Console, num_runs: int) -> Iterator[Callable[[Contender, Workload], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as progress:
        task = progress.add_task("", total=num_runs)
        num_started = 0

        def on_run(contender: Contender, workload: Workload) -> None:
            nonlocal num_started
            what = f"{contender.policy}, rate {workload.rate:g}, seed {workload.seed}"
            progress.update(task, completed=num_started, description=what)
            num_started += 1
            if not console.is_terminal:
                console.print(f"run {num_started} of {num_runs}: {what}", highlight=False)

        yield on_run
