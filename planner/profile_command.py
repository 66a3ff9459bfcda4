"""`ampd profile`: the command line around measure_profile."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import AmpdError, ErrorCode

if TYPE_CHECKING:
    from rich.console import Console

    from planner.measure_profile import Progress
    from shared.core.profile import Profile

EXAMPLE = """example:
  ampd profile --model smollm2 --dtype float32 --threads 1 --workers 2 --out cpu-smollm2.json"""
LONGEST_BY_DEFAULT = 8192  # tokens
FULL_REPEATS, QUICK_REPEATS = 5, 3
FULL_TIME_LIMIT_S, QUICK_TIME_LIMIT_S = 600.0, 60.0


def add_profile_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds `profile`; the parsed arguments' `command` is `command_profile`."""
    parser = commands.add_parser(
        "profile",
        help="measure this engine on this machine and write a profile file",
        description="Measure this engine on this machine and write a profile file. Takes minutes; --quick seconds.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_profile_flags(parser)
    parser.set_defaults(command=command_profile)
    return parser


def add_profile_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2, tiny-random or a folder (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="FILE", help="where to write the profile (JSON)")
    add("--name", help="of the profile (default: cpu-MODEL)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="(default: %(default)s)")
    add("--threads", type=_positive, default=1, metavar="N", help="per worker (default: %(default)s)")
    workers_help = "on this machine: N - 1 more engines are busy while one is measured (default: %(default)s)"
    add("--workers", type=_positive, default=1, metavar="N", help=workers_help)
    add("--kv-memory-mb", type=_positive, default=1024, metavar="MB", help="per worker (default: %(default)s)")
    add(
        "--host-kv-mb",
        type=_not_negative,
        default=0,
        metavar="MB",
        help="host memory for KV, a second tier (default: 0)",
    )
    context_help = f"(default: {LONGEST_BY_DEFAULT}, or what the model was made for if that is less)"
    add("--max-context", type=_positive, metavar="TOKENS", help=context_help)
    add("--quick", action="store_true", help="fewer points and repeats: seconds, less exact")
    add("--time-limit", type=_positive, metavar="S", help="for the steps; the first repeat is always completed")
    add("--seed", type=_not_negative, default=0, help="of the order and the held-out points (default: 0)")
    add("--json", action="store_true", help="print predicted against measured as JSON instead of a table")


def command_profile(arguments: argparse.Namespace) -> int:
    """0; raises AmpdError for what the caller must change."""
    from rich.console import Console

    from planner.fit_summary import summarise_fit
    from planner.measure_profile import measure_profile
    from planner.step_meter import ProfileOptions, read_longest_context
    from shared.engine.model_files import resolve_model

    console = Console(stderr=True)
    _check_target(arguments.out)
    model_dir = resolve_model(arguments.model, progress=console.print)
    options = ProfileOptions(
        name=arguments.name or f"cpu-{Path(arguments.model).name}",
        model=Path(arguments.model).name,
        model_dir=model_dir,
        dtype=arguments.dtype,
        threads=arguments.threads,
        kv_memory_mb=arguments.kv_memory_mb,
        host_kv_mb=arguments.host_kv_mb,
        max_context=arguments.max_context or min(LONGEST_BY_DEFAULT, read_longest_context(model_dir)),
        quick=arguments.quick,
        repeats=QUICK_REPEATS if arguments.quick else FULL_REPEATS,
        time_limit_s=arguments.time_limit or (QUICK_TIME_LIMIT_S if arguments.quick else FULL_TIME_LIMIT_S),
        seed=arguments.seed,
        workers=arguments.workers,
    )
    with _show_progress(console) as progress:
        profile = measure_profile(options, describe_origin(arguments, options.max_context), progress)
    write_profile(profile, arguments.out)
    summary = summarise_fit(profile)
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        print_fit(summary, Console())
    return 0


def write_profile(profile: Profile, path: Path) -> None:
    """Write the file in one step, after reading back what will be written. Raises AmpdError for an invalid profile."""
    import msgspec

    from shared.core.profile import decode_profile

    data = format_profile(msgspec.to_builtins(profile))
    decode_profile(data, profile.name)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(data)
    draft.replace(path)


def format_profile(content: dict[str, Any]) -> bytes:
    """JSON, a measured point or a row of times a line: readable, and a re-measurement makes a readable difference."""

    def render(value: Any, indent: str) -> str:
        flat = json.dumps(value)
        if not isinstance(value, dict | list | tuple) or (len(flat) + len(indent) <= 160 and not _has_rows(value)):
            return flat
        inner = indent + "  "
        if isinstance(value, dict):
            lines = [f"{inner}{json.dumps(key)}: {render(item, inner)}" for key, item in value.items()]
            return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
        if all(isinstance(item, int | float) for item in value):
            return flat
        return "[\n" + ",\n".join(inner + render(item, inner) for item in value) + f"\n{indent}]"

    return (render(content, "") + "\n").encode()


def _has_rows(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, dict) for item in value.values())


def describe_origin(arguments: argparse.Namespace, max_context: int) -> dict[str, Any]:
    """Provenance: the command without folders, the machine, versions."""
    flags = ["--model", Path(arguments.model).name, "--dtype", arguments.dtype, "--threads", str(arguments.threads)]
    flags += ["--kv-memory-mb", str(arguments.kv_memory_mb), "--host-kv-mb", str(arguments.host_kv_mb)]
    flags += ["--workers", str(arguments.workers)] if arguments.workers > 1 else []
    flags += ["--max-context", str(max_context), "--seed", str(arguments.seed)]
    flags += ["--quick"] if arguments.quick else []
    return {
        "command": shlex.join(["ampd", "profile", *flags, "--out", arguments.out.name]),
        "machine": {
            "cpu": _read_cpu_name(),
            "num_cpus": os.cpu_count(),
            "architecture": platform.machine(),
            "kernel": platform.release(),
            "load_average_before": round(os.getloadavg()[0], 2),
        },
        "threads": arguments.threads,
        "workers": arguments.workers,
        "seed": arguments.seed,
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in ("torch", "numpy", "transformers")},
        },
    }


def print_fit(summary: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    table = Table(title=f"{summary['name']}: held-out steps, predicted against measured")
    for column in ("kind", "decodes", "mean context", "chunks (history + new)", "measured ms", "predicted ms", "error"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for row in sorted((row for row in summary["rows"] if row["held_out"]), key=lambda row: row["kind"]):
        chunks = ", ".join(f"{history} + {chunk}" for history, chunk in row["chunks"])
        table.add_row(
            row["kind"],
            str(row["batch"] or ""),
            f"{row['mean_context']:.0f}" if row["batch"] else "",
            chunks,
            f"{row['measured_s'] * 1e3:.1f}",
            f"{row['predicted_s'] * 1e3:.1f}",
            f"{row['error']:+.1%}",
        )
    console.print(table)
    for what in ("fitted", "held_out"):
        errors = summary[what]
        if errors["num_points"]:
            console.print(
                f"{what}: {errors['num_points']} steps, absolute error median {errors['median']:.1%}, "
                f"p90 {errors['p90']:.1%}, largest {errors['max']:.1%}"
            )
    verdict = "met" if summary["target_met"] else "not met"
    console.print(
        f"target for held-out steps: median {summary['target_median']:.0%}, p90 {summary['target_p90']:.0%}: {verdict}"
    )


@contextmanager
def _show_progress(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ProgressBar(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("loading the model", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield show


def _check_target(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise AmpdError(
            ErrorCode.INVALID_REQUEST, f"--out {path} must name a file in a folder that exists, not a folder itself"
        )


def _read_cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _positive(text: str) -> int:
    return _integer(text, 1)


def _not_negative(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, low: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < low:
        raise argparse.ArgumentTypeError(f"{value} must be at least {low}")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ampd", description="The planner's commands.")
    add_profile_command(parser.add_subparsers(required=True))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except AmpdError as error:
        print(f"ampd: {error.message}", file=sys.stderr)
        return 2 if error.code is ErrorCode.INVALID_REQUEST else 1


if __name__ == "__main__":
    sys.exit(main())
