"""How a comparison makes one run: simulated in this process, or live, with a cluster of its own in another."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from loadgen.contenders import Contender
from loadgen.records import RoundRecord, RunInfo, read_records, read_run
from loadgen.run import REPORT, ROUNDS, RUN
from loadgen.traces import TraceSession, write_trace
from loadgen.workload import Workload, describe_trace, plan_workload
from shared.child_process import dying_with_this_process
from shared.errors import AmpdError, ErrorCode
from shared.messages import Slo
from shared.policy_flags import build_policy, read_policy_options

TRACE, LOG = "trace.jsonl", "run.log"
STOP_GRACE_S = 45.0  # for `ampd run` to end after a Ctrl-C
QUOTED_LINES = 12
TIMES = ("due_s", "sent_s", "accepted_s", "first_token_s", "finished_s")
STAGES = ("queued_s", "transfer_s", "prefill_s", "decode_s")

MAX_DEADLINE_S = 3_600.0  # wall seconds: the longest that a coordinator takes (CoordinatorConfig.max_deadline_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRunner:
    profile: str
    slo: Slo
    warm_up: float
    trace: Sequence[TraceSession]
    step_model: str = "mixed"
    time_scale: float = 1.0  # of the emulated cluster that it is compared with: our own messages take so much less

    def check(self, contenders: Sequence[Contender]) -> None:
        """Raises AmpdError INVALID_REQUEST before anything is simulated."""
        from planner.simulator.run_simulation import check_setup

        for contender in contenders:
            check_setup(self._setup(contender))

    def __call__(
        self, contender: Contender, workload: Workload, chosen: list[TraceSession], folder: Path
    ) -> tuple[RunInfo, list[RoundRecord]]:
        from planner.simulator.run_simulation import describe_run, simulate_plan

        setup = self._setup(contender)
        plan = plan_workload(chosen, workload)
        records, simulation = simulate_plan(setup, plan)
        trace = describe_trace(self.trace, workload, plan)
        return describe_run(setup, workload, plan, trace, simulation, self.warm_up), records

    def _setup(self, contender: Contender) -> Any:
        from planner.simulator.cluster import WorkerGroup
        from planner.simulator.run_simulation import SimulationSetup

        return SimulationSetup(
            profile=self.profile,
            groups=tuple(
                WorkerGroup(role=one.role, count=one.count, parallel_degree=one.parallel_degree)
                for one in contender.workers
            ),
            policy=contender.policy,
            disabled_parts=contender.disabled_parts,
            policy_options=contender.policy_options,
            slo=self.slo,
            step_model="pause" if self.step_model == "pause" else "mixed",
            control_scale=1.0 / self.time_scale,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRunner:
    """`time_scale`: wall seconds per second of the profile. The run is made slower by it (delays, objectives and
    deadline times it, rates over it), and every measured time is divided by it."""

    slo: Slo
    warm_up: float
    trace: Sequence[TraceSession]
    deadline: float = 600.0
    time_scale: float = 1.0
    engine: str = "torch"
    cluster_flags: tuple[str, ...] = field(default=())  # of `ampd run`, the same for every policy

    def check(self, contenders: Sequence[Contender]) -> None:
        """Raises AmpdError INVALID_REQUEST for what no live cluster can be."""
        for contender in contenders:
            if len({one.parallel_degree for one in contender.workers}) > 1:
                raise AmpdError(
                    ErrorCode.INVALID_REQUEST,
                    f"policy {contender.policy}: a live cluster's workers all have one number of devices, "
                    f"{contender.describe_workers()} do not: give one number, or --simulate",
                )

    def __call__(
        self, contender: Contender, workload: Workload, chosen: list[TraceSession], folder: Path
    ) -> tuple[RunInfo, list[RoundRecord]]:
        for name in (RUN, ROUNDS, REPORT):
            (folder / name).unlink(missing_ok=True)
        write_trace(folder / TRACE, iter([stretch_session(session, self.time_scale) for session in chosen]))
        argv = self.build_command(contender, workload, folder)
        status = run_logged(argv, folder / LOG)
        if status not in (0, 1) or not (folder / REPORT).exists():
            raise AmpdError(
                ErrorCode.INTERNAL,
                f"`ampd run` ended with {status}; the end of {folder / LOG}:\n{_quote(folder / LOG)}",
            )
        records = [rescale_record(record, 1 / self.time_scale) for record in read_records(folder / ROUNDS)]
        return self._describe(read_run(folder / RUN), contender, workload, chosen), records

    def build_command(self, contender: Contender, workload: Workload, folder: Path) -> list[str]:
        scale, python = self.time_scale, [sys.executable, "-m"]
        counts = {one.role: one.count for one in contender.workers}
        cluster = [flag for role in ("prefill", "decode", "both") for flag in (f"--{role}", str(counts.get(role, 0)))]
        if self.engine == "emulated":
            cluster += ["--parallel-degree", str(contender.workers[0].parallel_degree)]
        policy = ["--policy", contender.policy]
        policy += [f"--disable={part}" for part in contender.disabled_parts]
        policy += [f"--policy-option={option}" for option in self.scale_options(contender)]
        replay = ["--rate", repr(workload.rate / scale), "--arrivals", "poisson", "--seed", str(workload.seed)]
        replay += ["--ttft-slo", repr(self.slo.ttft_s * scale), "--itl-slo", repr(self.slo.itl_s * scale)]
        replay += ["--deadline", repr(min(MAX_DEADLINE_S, self.deadline * scale))]
        if workload.max_context is not None:
            replay += ["--max-context", str(workload.max_context)]
        if workload.max_delay is not None:
            replay += ["--max-delay", repr(workload.max_delay * scale)]
        run = [*python, "services.cli", "run", *cluster, *policy, *self.cluster_flags, "--"]
        return [*run, *python, "loadgen", "replay", str(folder / TRACE), *replay, "--out", str(folder)]

    def scale_options(self, contender: Contender) -> tuple[str, ...]:
        """The statistics that `ampd` reads cover `window_s` of the profile's time, as the rest of the run."""
        if self.time_scale == 1.0:
            return contender.policy_options
        options = read_policy_options(contender.policy_options)
        window_s = build_policy(contender.policy, contender.disabled_parts, options).window_s
        others = (text for text in contender.policy_options if not text.startswith("window_s="))
        return (*others, f"window_s={window_s * self.time_scale!r}")

    def _describe(self, run: RunInfo, contender: Contender, workload: Workload, chosen: list[TraceSession]) -> RunInfo:
        trace = describe_trace(self.trace, workload, plan_workload(chosen, workload))
        config = {**asdict(workload), **contender.as_dict(), "engine": self.engine, "time_scale": self.time_scale}
        return msgspec.structs.replace(
            run, slo=self.slo, config=config, trace=trace, warm_up_s=self.warm_up, until_s=workload.duration
        )


def run_logged(argv: Sequence[str], log: Path) -> int:
    """Run to its end with its output in `log`; returns its exit status. A Ctrl-C is waited for."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=dying_with_this_process(),
        )
        try:
            return process.wait()
        except KeyboardInterrupt:  # a terminal's has reached it already
            process.wait(STOP_GRACE_S)
            raise
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _quote(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-QUOTED_LINES:])


def stretch_session(session: TraceSession, factor: float) -> TraceSession:
    """Every delay times `factor`."""
    rounds = tuple(
        one if one.delay_s is None else msgspec.structs.replace(one, delay_s=one.delay_s * factor)
        for one in session.rounds
    )
    return msgspec.structs.replace(session, rounds=rounds)


def rescale_record(record: RoundRecord, factor: float) -> RoundRecord:
    """Every time and duration times `factor`."""
    if factor == 1.0:
        return record
    times = {name: _scaled(getattr(record, name), factor) for name in TIMES}
    usage = record.usage
    if usage is not None:
        usage = msgspec.structs.replace(usage, **{name: getattr(usage, name) * factor for name in STAGES})
    return msgspec.structs.replace(
        record,
        **times,
        delay_s=record.delay_s * factor,
        token_times_s=tuple(time_s * factor for time_s in record.token_times_s),
        gaps=tuple((count, gap_s * factor) for count, gap_s in record.gaps),
        usage=usage,
    )


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
