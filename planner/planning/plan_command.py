"""`ampd plan`: the command line around the program. Nothing heavy is imported before the command is chosen."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loadgen.argument_types import context, count, count_or_zero, non_negative, positive, seed
from shared.errors import AmpdError, ErrorCode
from shared.policy_flags import add_policy_flags

if TYPE_CHECKING:
    from rich.console import Console

    from loadgen.workload import Workload
    from planner.planning.plan_file import PlanReport
    from planner.planning.plans import SolvedPlan
    from planner.planning.program import Objective, PlanProblem
    from planner.planning.simulated import Setting, Simulated
    from planner.planning.workload_model import WorkloadModel
    from shared.core.profile import Profile
    from shared.messages import Slo

EXAMPLE = """example:
  ampd plan --profile h100-qwen3-32b --trace sessions.jsonl --gpus 32 --ttft-slo 0.5 --itl-slo 0.05 --out out/plan
  ampd plan --profile h100-qwen3-32b --gpu-types h100:16,h200:16 --trace sessions.jsonl --rate 20 \\
    --objective min-gpus --ttft-slo 0.5 --itl-slo 0.05 --out out/plan"""
DEFAULT_PLANS = 4


def add_plan_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds `plan`; the parsed arguments' `command` is `command_plan`."""
    parser = commands.add_parser(
        "plan",
        help="how many workers of each kind for a workload and its objectives",
        description="Plan workers: roles, GPU types, parallel degrees and replicas, by a mixed-integer program; the "
        "best plans are simulated, and the best of them is written.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command_plan)
    add = parser.add_argument
    add("--profile", required=True, metavar="NAME|FILE", help="timings of the workers: one that ships, or a file")
    add("--gpus", type=count, metavar="N", help="how many there are, of the profile's type")
    add("--gpu-types", metavar="T:N,...", help="of several types instead, as h100:16,h200:16; a profile of each ships")
    objectives = ("goodput", "min-gpus", "min-p95")
    objective_help = "most sessions/s; or, at --rate, fewest GPUs or lowest TTFT p95 (default: %(default)s)"
    add("--objective", choices=objectives, default="goodput", help=objective_help)
    add("--target", type=positive, default=0.9, metavar="X", help="share of rounds on time (default: %(default)s)")
    add("--plans", type=count_or_zero, default=DEFAULT_PLANS, metavar="K",
        help="so many of the program's best are simulated; 0: none (default: %(default)s)")  # fmt: skip
    _add_workload_flags(parser)
    add_policy_flags(parser, default="adaptive")
    add(
        "--out", type=Path, required=True, metavar="DIR", help="for plan.json, plan.md, plan.png and a compose override"
    )
    add("--json", action="store_true", help="print plan.json instead of the page")
    return parser


def _add_workload_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--trace", required=True, metavar="FILE", help="JSON lines, as for `loadgen replay`")
    add("--format", choices=("auto", "ampd", "mooncake"), default="auto")
    add("--rate", type=positive, metavar="R", help="sessions per second (default: the trace's own, where it knows it)")
    add("--max-context", type=context, metavar="N", help="cut sessions to N tokens, inputs and outputs together")
    add("--max-delay", type=non_negative, metavar="S", help="cap the delays between rounds")
    unknown_help = "the delay where the trace does not know it (default: 0)"
    add("--unknown-delay", type=non_negative, default=0.0, metavar="S", help=unknown_help)
    add("--ttft-slo", type=positive, metavar="S", help="(default: as for `loadgen replay`)")
    add("--itl-slo", type=positive, metavar="S", help="(default: as for `loadgen replay`)")
    add("--seed", type=seed, default=0, metavar="K", help="of simulated arrivals (default: 0)")


def command_plan(arguments: argparse.Namespace) -> int:
    """0 when there is a plan; raises AmpdError for what the caller must change."""
    from rich.console import Console
    from rich.markdown import Markdown

    from loadgen.run import make_folder
    from planner.planning.plan_file import describe_plan, write_plan

    make_folder(arguments.out)  # before anything that takes long
    console = Console(stderr=True) if arguments.json else Console()
    report = make_plan(arguments, console)
    write_plan(report, arguments.out)
    if arguments.json:
        sys.stdout.write(json.dumps(report.as_dict(), indent=1) + "\n")
        return 0
    console.print(Markdown(describe_plan(report)))
    console.print(f"plan, page, plot and compose override: {arguments.out}", soft_wrap=True)
    return 0


def make_plan(arguments: argparse.Namespace, console: Console) -> PlanReport:
    """Raises AmpdError: INVALID_REQUEST, or what cannot hold where no plan is feasible."""
    from planner.planning.choose import choose_plan, measure_curve, measure_gains
    from planner.planning.infeasible import explain_infeasible
    from planner.planning.plan_file import PlanReport
    from planner.planning.prediction import predict
    from planner.planning.problem import make_problem
    from planner.simulator.simulate_command import read_slo

    if not 0.0 < arguments.target < 1.0:
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"--target must be between 0 and 1, got {arguments.target:g}")
    gpus = read_gpus(arguments)
    profiles = {gpu_type: load_profile_of(arguments.profile, gpu_type) for gpu_type in gpus}
    slo = read_slo(arguments.ttft_slo, arguments.itl_slo)
    workload, model, warm_up_s = read_model(arguments, profiles, slo)
    problem = make_problem(profiles, gpus, model, slo, target=arguments.target)
    setting = make_setting(arguments, profiles, workload, model, warm_up_s, slo)
    choice = choose_plan(
        problem,
        arguments.objective,
        arguments.plans,
        lambda plans: simulate_plans(setting, problem, plans, arguments.objective, console),
    )
    if choice is None:
        raise explain_infeasible(problem, model, slo)
    rate = choice.plan.rate if arguments.objective == "goodput" else problem.rate
    return PlanReport(
        objective=arguments.objective,
        gpus=gpus,
        profiles={gpu_type: profile.name for gpu_type, profile in profiles.items()},
        slo=slo,
        target=arguments.target,
        policy=arguments.policy,
        workload=model,
        plan=choice.plan,
        prediction=predict(problem, choice.plan, choice.simulated[0].rate if choice.simulated else rate, slo),
        simulated=choice.simulated,
        gains=measure_gains(problem),
        curve=measure_curve(problem),
    )


def read_gpus(arguments: argparse.Namespace) -> dict[str, int]:
    """{GPU type: how many}. Raises AmpdError INVALID_REQUEST."""
    if (arguments.gpus is None) == (arguments.gpu_types is None):
        raise AmpdError(ErrorCode.INVALID_REQUEST, "give --gpus N, or --gpu-types TYPE:N,..., and not both")
    if arguments.gpu_types is None:
        return {split_profile_name(arguments.profile)[0]: arguments.gpus}
    gpus: dict[str, int] = {}
    for part in arguments.gpu_types.split(","):
        gpu_type, colon, number = part.strip().partition(":")
        if not colon or not gpu_type or not number.isdecimal() or int(number) < 1 or gpu_type in gpus:
            raise AmpdError(
                ErrorCode.INVALID_REQUEST,
                f"--gpu-types: {part!r} must be a type and how many, each type once, as in h100:16,h200:16",
            )
        gpus[gpu_type] = int(number)
    return gpus


def load_profile_of(name: str, gpu_type: str) -> Profile:
    """`name` itself for its own GPU type; for another the profile of the same model that ships."""
    from shared.profile_files import load_profile

    own, model = split_profile_name(name)
    return load_profile(name if own == gpu_type else f"{gpu_type}-{model}")


def split_profile_name(name: str) -> tuple[str, str]:
    """(GPU type, model) of a shipped profile's name or of a file's. Names have dots: h100-llama-3.1-70b."""
    own, _, model = Path(name).name.removesuffix(".json").partition("-")
    return own, model


def read_model(
    arguments: argparse.Namespace, profiles: Mapping[str, Profile], slo: Slo
) -> tuple[Workload, WorkloadModel, float]:
    """(what is simulated, what is planned for, how long to warm up)."""
    from loadgen.plan import recorded_arrivals
    from loadgen.traces import read_trace
    from loadgen.workload import Workload, choose_workload, plan_workload
    from planner.planning.workload_model import measure_burstiness, model_sessions
    from planner.simulator.scenario import choose_warm_up_s

    longest = min(profile.max_context_tokens for profile in profiles.values())
    workload = Workload(
        file=arguments.trace,
        format=arguments.format,
        rate=arguments.rate or 1.0,
        sample=True,
        max_context=min(longest, arguments.max_context or longest),
        max_delay=arguments.max_delay,
        unknown_delay=arguments.unknown_delay,
        seed=arguments.seed,
    )
    trace = list(read_trace(Path(workload.file), workload.format))
    if not trace:
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"the trace {workload.file} has no session")
    recorded = sorted(one.arrival_s for one in trace if one.arrival_known)
    rate, burstiness = arguments.rate, 1.0
    if len(recorded) == len(trace) and len(trace) > 1 and recorded[-1] > recorded[0]:
        burstiness = measure_burstiness(sorted(recorded_arrivals(trace, rate=None, seed=arguments.seed)))
        rate = rate or (len(trace) - 1) / (recorded[-1] - recorded[0])
    if rate is None:
        if arguments.objective != "goodput":
            raise AmpdError(
                ErrorCode.INVALID_REQUEST,
                f"--objective {arguments.objective} needs --rate: the trace does not know when its sessions arrived",
            )
        rate = 1.0
    planned = plan_workload(choose_workload(trace, workload), workload)
    model = model_sessions(planned.sessions, rate, burstiness=burstiness)
    return workload, model, choose_warm_up_s(planned.sessions, slo)


def make_setting(
    arguments: argparse.Namespace,
    profiles: Mapping[str, Profile],
    workload: Workload,
    model: WorkloadModel,
    warm_up_s: float,
    slo: Slo,
) -> Setting:
    from planner.planning.simulated import Setting
    from shared.policy_flags import build_policy, read_policy_options

    return Setting(
        profiles=profiles,
        workload=workload,
        warm_up_s=warm_up_s,
        rounds_per_session=model.num_rounds / len(model.sessions),
        policy=build_policy(arguments.policy, tuple(arguments.disable), read_policy_options(arguments.policy_option)),
        slo=slo,
        target=arguments.target,
        seed=arguments.seed,
    )


def simulate_plans(
    setting: Setting, problem: PlanProblem, plans: Sequence[SolvedPlan], objective: Objective, console: Console
) -> list[Simulated]:
    from planner.planning.neighbours import list_neighbours
    from planner.planning.simulated import choose_by_attainment, choose_by_goodput

    neighbours = partial(list_neighbours, problem)
    with show_progress(console) as advance:
        if objective == "goodput":
            return choose_by_goodput(setting, plans, neighbours, advance)
        return choose_by_attainment(setting, plans, problem.rate, neighbours, advance)


@contextmanager
def show_progress(console: Console) -> Iterator[Callable[[], None]]:
    """How many plans there will be is not known: those one change away follow."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.completed} plans simulated"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda: progress.advance(task)
