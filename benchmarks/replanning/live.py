"""Re-planning live: real services, bus and sockets; eight emulated workers keep a profile's time, more slowly.

The same sessions three times: roles frozen, re-planned (the planner killed once), and changed by hand at the shift to
those of a planner that knew the traffic. Outputs get longer, so that decoding is what there is too little of. Times
here are wall seconds; divide them by the time scale for the profile's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benchmarks.replanning.recovery import find_recovery, share_by_time
from planner.planning.problem import make_problem
from planner.planning.worker_kinds import MeasuredKind
from planner.planning.workload_model import RoundShape, WorkloadModel
from planner.replanning.roles import assess_roles
from planner.replanning.running import RoleCounts
from services.cluster_options import ClusterOptions
from services.local import LocalCluster
from shared.client import AmpdClient
from shared.core.step_costs import StepCosts
from shared.errors import AmpdError
from shared.messages import Slo, StopConditions
from shared.profile_files import load_profile

How = Literal["frozen", "act", "clairvoyant"]
PROFILE, DEGREE = "h100-qwen3-32b", 2
NUM_PREFILL, NUM_BOTH = 6, 2
NUM_ROUNDS, NEXT_INPUT = 3, 50
DEADLINE_S = 600.0
ITL_ROOM = 1.25
POLL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveSettings:
    """Sessions a wall second, inputs of first rounds and outputs of every round, before and after the shift.

    The rate after it is more than two decoding workers produce within the ITL objective, and less than all do. ttft_s
    and itl_s are of the profile's time. A round is judged by ITL_ROOM times its itl_s: the policy fills steps up to the
    objective, and what this machine needs between two steps comes on top. The time scale is such that this is little.
    """

    time_scale: float = 24.0
    before_s: float = 20.0
    after_s: float = 120.0
    rate: float = 0.6
    rate_after: float = 8.75
    num_input: int = 1_500
    num_input_after: int = 300
    num_output: int = 8
    num_output_after: int = 24
    ttft_s: float = 0.6
    itl_s: float = 0.018
    bucket_s: float = 10.0
    kill_after_s: float = 12.0  # the planner, after the shift
    planner: tuple[str, ...] = ("--interval=3", "--replan-hold=6", "--replan-settle=12", "--replan-window=30")

    @property
    def slo(self) -> Slo:
        return Slo(ttft_s=self.ttft_s * self.time_scale, itl_s=self.itl_s * self.time_scale)


@dataclass(frozen=True, slots=True)
class LiveRound:
    sent_s: float  # since the run began
    attained: bool
    tokens: tuple[int, ...]


@dataclass(slots=True)
class LiveRun:
    how: How
    rounds: dict[tuple[int, int], LiveRound] = field(default_factory=dict)  # by session and index
    errors: list[str] = field(default_factory=list)
    num_due: int = 0
    changes: list[dict[str, Any]] = field(default_factory=list)  # as seen in heartbeats
    reports: list[str] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    killed_at_s: float | None = None
    decoding: int = NUM_BOTH
    restarted: bool = False


def run_live(settings: LiveSettings, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    runs: dict[How, LiveRun] = {}
    ways: tuple[How, ...] = ("frozen", "act", "clairvoyant")
    for how in ways:
        runs[how] = asyncio.run(_run(settings, how))
        advance()
    num_buckets = round((settings.before_s + settings.after_s) / settings.bucket_s)
    buckets = {
        how: share_by_time([(r.sent_s, r.attained) for r in run.rounds.values()], settings.bucket_s, num_buckets)
        for how, run in runs.items()
    }
    recovered_s = find_recovery(buckets["act"], buckets["clairvoyant"], settings.before_s, settings.bucket_s)
    tokens = {how: {key: one.tokens for key, one in run.rounds.items()} for how, run in runs.items()}
    unchanged = tokens["act"] == tokens["frozen"] == tokens["clairvoyant"]
    lost = {how: run.num_due - len(run.rounds) for how, run in runs.items()}
    return {
        "settings": asdict(settings),
        "workers": {"prefill": NUM_PREFILL, "both": NUM_BOTH},
        "shift_at_s": settings.before_s,
        "bucket_s": settings.bucket_s,
        "attainment": buckets,
        "recovered_after_s": recovered_s,
        "tokens_unchanged": unchanged,
        "lost": lost,
        "met": recovered_s is not None and unchanged and not any(lost.values()) and runs["act"].restarted,
        "runs": {
            how: {
                "rounds": len(run.rounds),
                "decoding": run.decoding,
                "changes": run.changes,
                "errors": run.errors[:5],
                "counters": run.counters,
                "planner_killed_at_s": run.killed_at_s,
                "planner_restarted": run.restarted,
            }
            for how, run in runs.items()
        },
    }


async def _run(settings: LiveSettings, how: How) -> LiveRun:
    run = LiveRun(how)
    async with _start_cluster(settings, run) as (local, client):
        began = time.monotonic()
        watching = asyncio.create_task(_watch_roles(client, run, began))
        playing: list[asyncio.Task[None]] = []
        has_shifted = False
        for number, (at_s, is_after) in enumerate(_list_arrivals(settings)):
            await asyncio.sleep(max(0.0, began + at_s - time.monotonic()))
            if is_after and not has_shifted:
                has_shifted = True
                if how == "clairvoyant":
                    playing.append(asyncio.create_task(_change_roles(client, choose_decoding(settings))))
            if how == "act" and run.killed_at_s is None and at_s > settings.before_s + settings.kill_after_s:
                os.kill(local.services["planner"].pid, signal.SIGKILL)
                run.killed_at_s = time.monotonic() - began
            run.num_due += NUM_ROUNDS
            playing.append(asyncio.create_task(_play(client, settings, number, is_after, run, began)))
        await asyncio.gather(*playing)
        watching.cancel()
        status = await client.status()
        run.counters = dict(status.counters)
        run.decoding = sum(worker.heartbeat.role != "prefill" for worker in status.workers if worker.alive)
        run.restarted = any("planner is started again" in report for report in run.reports)
    return run


@contextlib.asynccontextmanager
async def _start_cluster(settings: LiveSettings, run: LiveRun) -> AsyncIterator[tuple[LocalCluster, AmpdClient]]:
    local = LocalCluster(
        ClusterOptions(
            num_prefill=NUM_PREFILL,
            num_decode=0,
            num_both=NUM_BOTH,
            engine="emulated",
            profile=PROFILE,
            parallel_degree=DEGREE,
            time_scale=settings.time_scale,
            policy="adaptive",
            replan="act" if run.how == "act" else "frozen",
            planner_arguments=settings.planner,
        ),
        run.reports.append,
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(local.stop, asyncio.Event())
        await local.start()
        supervisor = asyncio.create_task(local.supervise())
        stack.callback(supervisor.cancel)
        client = await AmpdClient.connect(local.url)
        stack.push_async_callback(client.close)
        yield local, client


def _list_arrivals(settings: LiveSettings) -> list[tuple[float, bool]]:
    """(when, whether it is of the traffic after the shift), evenly spaced: alike in every run."""
    before = [(i / settings.rate, False) for i in range(int(settings.before_s * settings.rate))]
    after = [
        (settings.before_s + i / settings.rate_after, True) for i in range(int(settings.after_s * settings.rate_after))
    ]
    return before + after


async def _play(
    client: AmpdClient, settings: LiveSettings, number: int, is_after: bool, run: LiveRun, began: float
) -> None:
    num_input = settings.num_input_after if is_after else settings.num_input
    num_output = settings.num_output_after if is_after else settings.num_output
    stop = StopConditions(max_output_tokens=num_output, ignore_eos=True)
    slo = settings.slo
    try:
        async with await client.open_session(f"s{number}", slo=slo) as session:
            for index in range(NUM_ROUNDS):
                new = [(7919 * number + 104_729 * index + 31 * i) % 100_000 + 10
                       for i in range(NEXT_INPUT if index else num_input)]  # fmt: skip
                sent = time.monotonic()
                result = await (await session.submit(new, stop=stop, deadline_s=DEADLINE_S)).result()
                times = result.token_times
                tpot_s = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
                attained = times[0] - sent <= slo.ttft_s and tpot_s <= ITL_ROOM * slo.itl_s
                run.rounds[number, index] = LiveRound(sent - began, attained, result.token_ids)
    except AmpdError as error:
        run.errors.append(f"session {number}: {error}")


async def _watch_roles(client: AmpdClient, run: LiveRun, began: float) -> None:
    known: dict[str, str] = {}
    while True:
        with contextlib.suppress(AmpdError):
            for worker in (await client.status(timeout_s=POLL_S)).workers:
                beat = worker.heartbeat
                if known.get(beat.worker_id, beat.role) != beat.role:
                    at_s = round(time.monotonic() - began, 1)
                    run.changes.append({"at_s": at_s, "worker_id": beat.worker_id, "role": beat.role})
                known[beat.worker_id] = beat.role
        await asyncio.sleep(POLL_S)


async def _change_roles(client: AmpdClient, num_decoding: int) -> None:
    for index in range(max(0, num_decoding - NUM_BOTH)):
        await client.change_role(f"prefill-{index}", "both")


def choose_decoding(settings: LiveSettings) -> int:
    """How many workers a planner has decode that knows the traffic after the shift."""
    shapes, history = [], 0
    for index in range(NUM_ROUNDS):
        shape = RoundShape(history, NEXT_INPUT if index else settings.num_input_after, settings.num_output_after, 0.0)
        shapes.append(shape)
        history = shape.num_total_tokens
    profile, kind, total = load_profile(PROFILE), (PROFILE, DEGREE), NUM_PREFILL + NUM_BOTH
    measured = MeasuredKind(settings.time_scale, StepCosts.from_profile(profile, DEGREE).num_kv_tokens)
    model = WorkloadModel(sessions=(tuple(shapes),), sessions_per_s=settings.rate_after)
    problem = make_problem(
        {PROFILE: profile}, {PROFILE: total * DEGREE}, model, settings.slo, measured={kind: measured}
    )
    return assess_roles(problem, RoleCounts({kind: total}, {kind: NUM_BOTH})).decoding[kind]
