"""The `ampd` command. Nothing heavy is imported before a command is chosen: `ampd --help` answers at once."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from planner.planning.plan_command import add_plan_command
from planner.profile_command import add_profile_command
from planner.simulator.simulate_command import add_simulate_command
from shared.engine.names import EngineName
from shared.errors import AmpdError, ErrorCode
from shared.policy_flags import add_policy_flags
from shared.transport.names import TRANSPORT_HELP, TransportName

if TYPE_CHECKING:
    from services.cluster_options import ClusterOptions

DEFAULT_URL = "nats://127.0.0.1:4222"
DEFAULT_PORT = 4222
DTYPES = ("auto", "float32", "bfloat16", "float16")
ROLES = ("prefill", "decode", "both")
REPLAN_MODES = ("act", "dry-run", "frozen")
USAGE_ERROR = 2

UP_EXAMPLE = """example:
  ampd up --prefill 1 --decode 2 --model smollm2 --policy ampd --data-dir ~/ampd-data
  ampd up --engine emulated --profile h100-qwen3-32b --time-scale 10 --parallel-degree 2 --prefill 4 --decode 12"""
RUN_EXAMPLE = """example:
  ampd run --model tiny-random -- loadgen replay sessions.jsonl --out out/replay
  ampd run --prefill 0 --decode 1 -- ampd chat"""
STATUS_EXAMPLE = """example:
  ampd status --stats
  ampd status --json | python -m json.tool"""
EXPLAIN_EXAMPLE = """example:
  ampd explain my-session
  ampd explain my-session --tenant team-a --json | python -m json.tool"""
ROLE_EXAMPLE = """example:
  ampd role decode-1 prefill
  ampd role decode-1 both --json | python -m json.tool"""
REPLAN_EXAMPLE = """example:
  ampd replan
  ampd replan --mode frozen"""
CHAT_EXAMPLE = """example:
  ampd chat --system 'Answer in one sentence.'
  printf 'What is the capital of France?\\nAnd of Spain?\\n' | ampd chat"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 when a service or a round failed; 2 for an argument to change; 128 + n for signal n."""
    parser = build_parser()
    own, command_line = split_at_double_dash(sys.argv[1:] if argv is None else list(argv))
    arguments = parser.parse_args(own)
    command: Callable[[argparse.Namespace], int] = arguments.command
    if command is command_run and not command_line:
        parser.error("give the command to run after --, as in: ampd run --prefill 1 -- CMD ARGUMENT ...")
    if command is not command_run and command_line is not None:
        parser.error(f"unexpected arguments after --: {' '.join(command_line)} (only `ampd run` takes a command)")
    arguments.argv = command_line
    try:
        return command(arguments)
    except AmpdError as error:
        print(f"ampd: {error.message}", file=sys.stderr)
        return USAGE_ERROR if error.code is ErrorCode.INVALID_REQUEST else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has gone: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def split_at_double_dash(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """(what is ours, the command after the first `--` or None): a `--` of the command's own stays in it."""
    if "--" not in argv:
        return argv, None
    index = argv.index("--")
    return argv[:index], argv[index + 1 :]


# ----------------------------------------------------------------------------------- commands


def command_up(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from services.up import serve

    port = DEFAULT_PORT if arguments.port is None else arguments.port
    return _run_with_cluster(serve(_cluster_options(arguments, port), Console()))


def command_run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from services.up import run_command

    console = Console(stderr=True)  # standard output is the command's alone
    options = _cluster_options(arguments, arguments.port or 0)
    return _run_with_cluster(run_command(options, arguments.argv, console))


def command_status(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from services.status import show_status

    return asyncio.run(
        show_status(arguments.nats_url, as_json=arguments.json, with_stats=arguments.stats, console=Console())
    )


def command_explain(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from services.explain import show_explanation

    return asyncio.run(
        show_explanation(
            arguments.nats_url,
            tenant=arguments.tenant,
            session=arguments.session,
            as_json=arguments.json,
            console=Console(),
        )
    )


def command_role(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from services.role import change_role

    return asyncio.run(
        change_role(
            arguments.nats_url,
            worker_id=arguments.worker_id,
            role=arguments.role,
            as_json=arguments.json,
            console=Console(),
        )
    )


def command_replan(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from services.replan import replan

    return asyncio.run(replan(arguments.nats_url, mode=arguments.mode, as_json=arguments.json, console=Console()))


def command_chat(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from services.chat import ChatOptions, chat
    from shared.messages import SamplingParams

    options = ChatOptions(
        url=arguments.nats_url,
        session=arguments.session,
        tenant=arguments.tenant,
        system=arguments.system,
        max_output_tokens=arguments.max_output_tokens,
        sampling=SamplingParams(temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed),
    )
    return chat(options, Console())


def _run_with_cluster(work: Coroutine[Any, Any, int]) -> int:
    from services.local import ClusterFailed
    from services.up import StoppedBySignal

    try:
        return asyncio.run(work)
    except StoppedBySignal as stopped:
        return stopped.exit_status
    except ClusterFailed as failure:
        print(f"ampd: {failure}", file=sys.stderr)
        return 1


def _cluster_options(arguments: argparse.Namespace, port: int) -> ClusterOptions:
    from services.cluster_options import ClusterOptions

    if arguments.decode + arguments.both < 1:
        raise AmpdError(ErrorCode.INVALID_REQUEST, "no worker would decode: --decode or --both must be at least 1")
    return ClusterOptions(
        num_prefill=arguments.prefill,
        num_decode=arguments.decode,
        num_both=arguments.both,
        engine=arguments.engine,
        profile=arguments.profile,
        replan=arguments.replan,
        time_scale=arguments.time_scale,
        parallel_degree=arguments.parallel_degree,
        model=arguments.model,
        policy=arguments.policy,
        dtype=arguments.dtype,
        device=arguments.device,
        threads=arguments.threads,
        kv_memory_mb=arguments.kv_memory_mb,
        kv_transport=arguments.kv_transport,
        max_context=arguments.max_context,
        port=port,
        data_dir=arguments.data_dir,
        log_dir=arguments.log_dir,
        disabled_parts=tuple(arguments.disable),
        policy_options=tuple(arguments.policy_option),
    )


# ------------------------------------------------------------------------------------ parsing


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ampd",
        description="Multi-round LLM serving with adaptive prefill/decode disaggregation.",
        epilog="ampd COMMAND --help shows a command's options and an example.",
    )
    parser.add_argument("--version", action=PrintVersion)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    up = _add_command(commands, "up", command_up, "start a cluster on this machine and serve", UP_EXAMPLE)
    _add_cluster_flags(up, f"NATS port on 127.0.0.1, 0 for any free one (default {DEFAULT_PORT})")

    run = _add_command(
        commands, "run", command_run, "start a cluster, run a command with AMPD_NATS_URL set, stop it", RUN_EXAMPLE
    )
    _add_cluster_flags(run, "NATS port on 127.0.0.1 (default: any free one)")
    run.usage = "ampd run [flags as for ampd up] -- CMD [ARGUMENT ...]"

    status = _add_command(commands, "status", command_status, "show workers, queues and sessions", STATUS_EXAMPLE)
    _add_url_flag(status)
    status.add_argument("--json", action="store_true", help="for programs: the same and more as JSON")
    status.add_argument("--stats", action="store_true", help="add what the planner has collected")

    explain = _add_command(
        commands, "explain", command_explain, "show why a session's rounds ran where they did", EXPLAIN_EXAMPLE
    )
    _add_url_flag(explain)
    explain.add_argument("session", help="the session's id: open, or closed a short while ago")
    explain.add_argument("--tenant", default="default", help="(default: %(default)s)")
    explain.add_argument("--json", action="store_true", help="for programs: the same as JSON")

    role = _add_command(commands, "role", command_role, "have a running worker take another role", ROLE_EXAMPLE)
    _add_url_flag(role)
    role.add_argument("worker_id", metavar="WORKER_ID", help="as `ampd status` shows it")
    role.add_argument("role", metavar="ROLE", choices=ROLES, help="prefill, decode or both")
    role.add_argument("--json", action="store_true", help="for programs: the answer as JSON")

    replan = _add_command(commands, "replan", command_replan, "what the planner proposes, and its mode", REPLAN_EXAMPLE)
    _add_url_flag(replan)
    mode_help = "change roles, only propose it, or plan nothing (default: leave it as it is)"
    replan.add_argument("--mode", choices=REPLAN_MODES, help=mode_help)
    replan.add_argument("--json", action="store_true", help="for programs: the answer as JSON")

    chat = _add_command(commands, "chat", command_chat, "talk to the model, one session, many rounds", CHAT_EXAMPLE)
    _add_url_flag(chat)
    chat.add_argument("--session", help="name a session: it stays open, and is come back to (default: a new one)")
    chat.add_argument("--tenant", default="default", help="(default: %(default)s)")
    chat.add_argument("--system", help="a system message before the first line")
    chat.add_argument("--max-output-tokens", type=_integer(1), default=256, help="(default: %(default)s)")
    chat.add_argument("--temperature", type=_number(0.0), default=0.0, help="0 is greedy (default: %(default)s)")
    chat.add_argument("--top-p", type=_number(0.0), default=1.0, help="(default: %(default)s)")
    chat.add_argument("--seed", type=_integer(0), help="makes sampled rounds repeatable")

    add_simulate_command(commands)
    add_plan_command(commands)
    add_profile_command(commands)
    return parser


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    command: Callable[[argparse.Namespace], int],
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    return parser


def _add_cluster_flags(parser: argparse.ArgumentParser, port_help: str) -> None:
    add = parser.add_argument
    add("--prefill", type=_integer(0), default=1, metavar="N", help="prefill workers (default: %(default)s)")
    add("--decode", type=_integer(0), default=1, metavar="N", help="decode workers (default: %(default)s)")
    add("--both", type=_integer(0), default=0, metavar="N", help="workers for both (default: %(default)s)")
    engine_help = "torch computes; emulated keeps the time of a profile (default: %(default)s)"
    add("--engine", choices=get_args(EngineName), default="torch", help=engine_help)
    replan_help = "what the planner does about roles that do not suit the load (default: %(default)s)"
    add("--replan", choices=REPLAN_MODES, default="dry-run", help=replan_help)
    profile_help = "timings of the workers, what the policy predicts with and an emulated engine keeps"
    add("--profile", metavar="NAME|FILE", help=f"{profile_help}: one that ships, or a file")
    scale_help = "emulated: seconds here per second there, 10 keeps our own overhead small (default: %(default)s)"
    add("--time-scale", type=_number(0.0), default=1.0, metavar="X", help=scale_help)
    degree_help = "processes (torch) or devices (emulated) that hold a worker's model together (default: %(default)s)"
    add("--parallel-degree", type=_integer(1), default=1, metavar="T", help=degree_help)
    model_help = "smollm2, tiny-random, or the folder of a Hugging Face model (default: %(default)s)"
    add("--model", default="smollm2", help=model_help)
    add_policy_flags(parser)
    add("--dtype", choices=DTYPES, default="auto", help="of weights and KV; auto: what the CPU multiplies fastest")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--threads", type=_integer(1), default=1, metavar="N", help="per worker (default: %(default)s)")
    add("--kv-memory-mb", type=_integer(1), default=1024, metavar="MB", help="per worker (default: %(default)s)")
    add("--kv-transport", choices=get_args(TransportName), default="auto", help=f"{TRANSPORT_HELP} (default: auto)")
    add("--max-context", type=_integer(1), metavar="TOKENS", help="(default: what the model was made for)")
    add("--port", type=_integer(0, 65535), metavar="P", help=port_help)
    add("--data-dir", type=Path, metavar="D", help="sessions survive here (default: a temporary folder)")
    add("--log-dir", type=Path, metavar="D", help="one log file a process (default: logs in the data dir)")


def _add_url_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nats-url",
        default=os.environ.get("AMPD_NATS_URL", DEFAULT_URL),
        help=f"NATS server of the cluster (default: $AMPD_NATS_URL, else {DEFAULT_URL})",
    )


class PrintVersion(argparse.Action):
    """Reads the version of the installed distribution only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"ampd {version('ampd')}")
        except PackageNotFoundError:
            parser.exit(1, "ampd runs from a source tree that is not installed: pip install -e .\n")
        parser.exit(0)


def _integer(low: int, high: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low or (high is not None and value > high):
            allowed = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{value} must be {allowed}")
        return value

    return parse


def _number(low: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be at least {low:g}")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())
