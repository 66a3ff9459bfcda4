"""The commands behind the command line: replay a trace into a folder, and render the folder again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import signal
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.console import Console

from loadgen.plan import Arrivals, Plan, make_plan
from loadgen.plot import save_plot
from loadgen.progress import ReplayProgress
from loadgen.records import RoundRecord, RunInfo, encode_record, encode_run, find_missing, read_records, read_run
from loadgen.replay import ReplayOptions, replay
from loadgen.report import Report, build_report, encode_report
from loadgen.table import print_report
from loadgen.traces import TraceFormat, read_trace
from shared.client import AmpdClient
from shared.errors import AmpdError, ErrorCode
from shared.messages import SessionOpened, Slo, StepTimes

RUN, ROUNDS, REPORT, PLOT = "run.json", "rounds.jsonl", "report.json", "report.png"


@dataclass(frozen=True)
class ReplayConfig:
    """The options of `loadgen replay`; they are written into the report as they are."""

    file: str
    format: TraceFormat | Literal["auto"] = "auto"
    sessions: int | None = None
    sample: bool = False
    rate: float | None = None
    arrivals: Arrivals | None = None
    ttft_slo: float = Slo().ttft_s
    itl_slo: float = Slo().itl_s
    max_context: int | None = None
    max_delay: float | None = None
    max_in_flight: int = 1024
    deadline: float = 600.0
    seed: int = 0

    @property
    def slo(self) -> Slo:
        return Slo(ttft_s=self.ttft_slo, itl_s=self.itl_slo)

    def make_options(self) -> ReplayOptions:
        """Of one replay: its sessions have names of their own."""
        return ReplayOptions(seed=self.seed, slo=self.slo, max_in_flight=self.max_in_flight, deadline_s=self.deadline)


def plan_replay(config: ReplayConfig) -> Plan:
    """Read the trace and decide what to send. Raises AmpdError INVALID_REQUEST that says what to change."""
    return make_plan(
        read_trace(Path(config.file), config.format),
        num_sessions=config.sessions,
        sample=config.sample,
        rate=config.rate,
        arrivals=config.arrivals,
        max_context=config.max_context,
        max_delay_s=config.max_delay,
        seed=config.seed,
    )


async def replay_trace(client: AmpdClient, config: ReplayConfig, plan: Plan, out: Path, console: Console) -> Report:
    """Replay, and write run.json, rounds.jsonl, report.json and report.png into `out`; returns the report.

    Ctrl-C or SIGTERM stops the replay: what is left counts as failed, and the report is written all the same.
    Raises AmpdError when it cannot start.
    """
    options = config.make_options()
    opened = await _probe(client)
    _check_context(plan, opened)
    run = await _describe_run(client, config, plan, opened)
    make_folder(out)
    (out / RUN).write_bytes(encode_run(run))
    console.print(
        f"replaying {len(plan.sessions)} sessions, {plan.num_rounds} rounds, {plan.arrivals} arrivals, "
        f"policy {run.policy}, model {run.model}"
    )
    progress = ReplayProgress(plan.num_rounds, len(plan.sessions), config.slo, console)
    records: list[RoundRecord] = []
    with (out / ROUNDS).open("wb", buffering=0) as file:

        def on_record(record: RoundRecord) -> None:
            records.append(record)
            file.write(encode_record(record))
            progress.count(record)

        async with progress.show():
            stopped = await _run_until_stopped(client, plan, options, on_record, progress)
            for record in find_missing(plan.sessions, records, options.name_session, interrupted=stopped):
                on_record(record)
    run = msgspec.structs.replace(run, step_times=await _read_step_times(client))
    (out / RUN).write_bytes(encode_run(run))
    return render(run, records, out, console)


def render_again(out: Path, console: Console, ttft_slo_s: float | None, itl_slo_s: float | None) -> Report:
    """Make the report of a finished (or killed) replay from its run.json and rounds.jsonl, with another SLO if given.

    With another SLO the files are left as they are and only the table is printed.
    """
    run = read_run(out / RUN)
    records = read_records(out / ROUNDS)
    if ttft_slo_s is None and itl_slo_s is None:
        return render(run, records, out, console)
    slo = Slo(
        ttft_s=run.slo.ttft_s if ttft_slo_s is None else ttft_slo_s,
        itl_s=run.slo.itl_s if itl_slo_s is None else itl_slo_s,
    )
    report = build_report(msgspec.structs.replace(run, slo=slo), records)
    print_report(report, console)
    return report


def render(run: RunInfo, records: Sequence[RoundRecord], out: Path, console: Console) -> Report:
    report = write_report(run, records, out)
    print_report(report, console)
    console.print(f"report: {out / REPORT}\nrounds: {out / ROUNDS}\nplot:   {out / PLOT}", soft_wrap=True)
    return report


def write_run(run: RunInfo, records: Iterable[RoundRecord], out: Path) -> None:
    """run.json and rounds.jsonl of a run that has ended: what `loadgen report` reads."""
    make_folder(out)
    (out / RUN).write_bytes(encode_run(run))
    with (out / ROUNDS).open("wb") as file:
        file.writelines(map(encode_record, records))


def write_report(run: RunInfo, records: Sequence[RoundRecord], out: Path, *, with_plot: bool = True) -> Report:
    report = build_report(run, records)
    (out / REPORT).write_bytes(encode_report(report))
    if with_plot:
        save_plot(run, records, report, out / PLOT)
    return report


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST, f"cannot make the folder {out}: {error.strerror}; give another --out"
        ) from error


async def _probe(client: AmpdClient) -> SessionOpened:
    """Open and close a session: is the cluster there, and what model does it serve?"""
    async with await client.open_session(f"loadgen-probe-{uuid.uuid4().hex[:8]}") as session:
        return session.opened


def _check_context(plan: Plan, opened: SessionOpened) -> None:
    longest = max((session.num_tokens for session in plan.sessions if not session.has_content), default=0)
    if longest > opened.max_context_tokens:
        raise AmpdError(
            ErrorCode.CONTEXT_TOO_LONG,
            f"the trace has a session of {longest} tokens, and {opened.model} takes {opened.max_context_tokens}: "
            f"give --max-context {opened.max_context_tokens} to cut sessions to size, or choose another trace",
        )


async def _describe_run(client: AmpdClient, config: ReplayConfig, plan: Plan, opened: SessionOpened) -> RunInfo:
    status = await client.status()
    return RunInfo(
        kind="live",
        policy=status.policy,
        model=opened.model,
        seed=config.seed,
        slo=config.slo,
        rounds_offered=plan.num_rounds,
        sessions_offered=len(plan.sessions),
        config=asdict(config),
        trace={
            "file": Path(config.file).name,
            "selection": "all" if config.sessions is None else "sample" if config.sample else "first",
            "arrivals": plan.arrivals,
            "rate": plan.rate,
            "cuts": asdict(plan.cuts),
            "max_context_tokens": opened.max_context_tokens,
        },
        machine=describe_machine(),
    )


async def _read_step_times(client: AmpdClient) -> dict[str, StepTimes] | None:
    """What the workers' steps took, beside what their profiles say; None where no profile or no cluster is left."""
    try:
        status = await client.status()
    except AmpdError:
        return None
    beats = [worker.heartbeat for worker in status.workers]
    times = {beat.worker_id: beat.step_times for beat in beats if beat.step_times != StepTimes()}
    return times or None


def describe_machine() -> dict[str, Any]:
    """The machine that loadgen runs on (in the embedded cluster, also the cluster's)."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # not Linux: the line above has to do
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


async def _run_until_stopped(
    client: AmpdClient,
    plan: Plan,
    options: ReplayOptions,
    on_record: Callable[[RoundRecord], None],
    progress: ReplayProgress,
) -> bool:
    """True if a signal ended the replay early."""
    task = asyncio.create_task(replay(client, plan, options, on_record, progress.sessions))
    with _call_on_signal(task.cancel):
        await asyncio.wait([task])
    if task.cancelled():
        return True
    await task  # raises what went wrong in it
    return False


@contextlib.contextmanager
def _call_on_signal(stop: Callable[[], object]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM calls `stop`; the second has its usual effect."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def on_signal() -> None:
        restore()
        stop()

    def restore() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        restore()
