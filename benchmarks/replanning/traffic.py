"""Traffic that shifts: sessions of one kind after another, on 32 GPUs as 16 workers of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.scheduling.cells import make_cell
from loadgen.plan import PlannedSession
from planner.planning.problem import make_problem
from planner.planning.program import PlanProblem
from planner.planning.worker_kinds import MeasuredKind
from planner.planning.workload_model import model_sessions
from planner.replanning.running import RoleCounts
from planner.simulator.cluster import Cluster, WorkerGroup
from planner.simulator.scenario import plan_at
from shared.core.profile import Profile
from shared.core.step_costs import StepCosts
from shared.messages import Slo

PROFILE, DEGREE, NUM_WORKERS = "h100-qwen3-32b", 2, 16
KIND = (PROFILE, DEGREE)
SAMPLE_S = 600.0  # of traffic that a problem is made of
SAMPLE_SEED = 1_000
SLO = Slo(ttft_s=6.9, itl_s=0.047)  # of chat, in the scheduling benchmark


@dataclass(frozen=True, slots=True)
class Traffic:
    """`workload`: a cell's of the scheduling benchmark. Inputs are so many times as long as in the trace."""

    workload: str
    rate: float
    input_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Phase:
    traffic: Traffic
    since_s: float
    until_s: float


def make_sessions(phases: Sequence[Phase], traces: Path, seed: int) -> list[PlannedSession]:
    """Those that arrive, numbered in order of arrival."""
    sessions: list[PlannedSession] = []
    for place, phase in enumerate(phases):
        arriving = _draw(phase.traffic, phase.until_s - phase.since_s, traces, 100 * seed + place)
        sessions += [replace(one, arrival_s=one.arrival_s + phase.since_s) for one in arriving]
    in_order = sorted((one for one in sessions if one.arrival_s < phases[-1].until_s), key=lambda one: one.arrival_s)
    return [replace(one, index=index) for index, one in enumerate(in_order)]


def make_traffic_problem(traffic: Traffic, traces: Path) -> PlanProblem:
    """What a planner that knew the traffic would solve. As many sessions as the sample of a planner holds."""
    sample = _draw(replace(traffic, rate=1.0), SAMPLE_S, traces, SAMPLE_SEED)
    profile = load_cell_profile(traces)
    num_kv_tokens = StepCosts.from_profile(profile, DEGREE).num_kv_tokens
    return make_problem(
        {PROFILE: profile},
        {PROFILE: NUM_WORKERS * DEGREE},
        model_sessions(sample, traffic.rate),
        SLO,
        measured={KIND: MeasuredKind(1.0, num_kv_tokens)},
    )


def load_cell_profile(traces: Path) -> Profile:
    return make_cell(PROFILE, "mooncake", traces).profile


def make_cluster(profile: Profile, num_decoding: int) -> Cluster:
    groups = (
        WorkerGroup(role="prefill", count=NUM_WORKERS - num_decoding, parallel_degree=DEGREE),
        WorkerGroup(role="both", count=num_decoding, parallel_degree=DEGREE),
    )
    return Cluster(profile=profile, groups=tuple(group for group in groups if group.count))


def count_decoding(num_decoding: int) -> RoleCounts:
    return RoleCounts({KIND: NUM_WORKERS}, {KIND: num_decoding})


def _draw(traffic: Traffic, duration_s: float, traces: Path, seed: int) -> list[PlannedSession]:
    cell = make_cell(PROFILE, traffic.workload, traces)
    sessions = plan_at(replace(cell.workload, duration=duration_s), traffic.rate, seed).sessions
    if traffic.input_factor == 1.0:
        return list(sessions)
    longest = cell.workload.max_context or cell.profile.max_context_tokens
    return [_lengthen(one, traffic.input_factor, longest) for one in sessions]


def _lengthen(session: PlannedSession, factor: float, max_context: int) -> PlannedSession:
    """Every input times `factor`; rounds that would go beyond `max_context` are dropped, a first one is cut."""
    rounds, num_tokens = [], 0
    for one in session.rounds:
        num_input = max(1, round(factor * one.input_tokens))
        if not rounds:
            num_input = min(num_input, max_context - one.output_tokens)
        num_tokens += num_input + one.output_tokens
        if num_tokens > max_context:
            break
        rounds.append(replace(one, input_tokens=num_input))
    return replace(session, rounds=tuple(rounds))
