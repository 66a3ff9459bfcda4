"""What is compared: cells (profile x workload), their objectives, and the clusters each policy may choose from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from loadgen.plan import PlannedSession
from loadgen.workload import Workload
from planner.simulator.cluster import Cluster, WorkerGroup
from planner.simulator.scenario import Scenario, choose_warm_up_s, plan_at
from shared.core.policies import SchedulingPolicy, find_policy, with_options
from shared.core.profile import Profile
from shared.core.step_costs import StepCosts
from shared.messages import Role, Slo
from shared.profile_files import load_profile

NUM_DEVICES = 32
MODELS = ("qwen3-32b", "llama-3.1-70b", "mixtral-8x7b")
WORKLOADS = ("claude_code", "mooncake", "hotpotqa", "toolbench")
TTFT_FACTOR = 5.0  # TTFT objective: times the workload's unloaded 90th percentile
ITL_FACTOR = 3.5  # ITL objective: times an unloaded decode step of one sequence at 4,096 tokens
NUM_SLO_SESSIONS = 400.0
MAX_DELAY_S = 60.0
SMALLEST_ROOM = 100_000  # KV tokens of a worker for the degree that objectives refer to
CHUNKS = (512, 256, 1_024, 2_048)
PREFILL_SHARES = (0.5, 0.25, 0.375, 0.625, 0.75)

MAX_ROUNDS = 10_000.0  # measured, at the rate where searches begin

MIN_TTFT_OBJECTIVES = 9.0  # measured at least, of which rounds of the last do not count: in less, a queue that grows
# may stay below one

# duration: what is measured, after a warm-up as long as sessions take; shorter where that has MAX_ROUNDS already,
# longer where it has not MIN_TTFT_OBJECTIVES
_TRACES: dict[str, dict[str, Any]] = {
    "claude_code": {"file": "claude_code_kvct.jsonl", "duration": 1_000.0},
    "mooncake": {"file": "mooncake_conversation.jsonl", "duration": 120.0},
    # no tool times are known for these two: one second, a search or an API call
    "hotpotqa": {"file": "hotpotqa_react.jsonl", "duration": 12.0, "unknown_delay": 1.0},
    "toolbench": {"file": "toolbench.jsonl", "duration": 20.0, "unknown_delay": 1.0},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    profile: Profile
    workload_name: str
    workload: Workload
    warm_up_s: float
    slo: Slo
    lowest_rate: float
    first_rate: float  # where searches begin
    longest_context: int  # of a session, tokens

    @property
    def name(self) -> str:
        return f"{self.profile.name}.{self.workload_name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to run a policy: a cluster and options."""

    policy: SchedulingPolicy
    cluster: Cluster
    options: dict[str, Any]

    def scenario(self, cell: Cell, **changes: Any) -> Scenario:
        return Scenario(
            workload=cell.workload,
            warm_up_s=cell.warm_up_s,
            cluster=self.cluster,
            policy=self.policy,
            slo=cell.slo,
            **changes,
        )

    def describe(self) -> str:
        options = ", ".join(f"{key.split('.')[-1]}={value}" for key, value in self.options.items())
        return self.cluster.describe() + (f" ({options})" if options else "")


def make_cell(profile_name: str, workload_name: str, traces: Path, *, ttft_factor: float = TTFT_FACTOR) -> Cell:
    profile = load_profile(profile_name)
    fields = dict(_TRACES[workload_name])
    workload = Workload(
        file=str(traces / fields.pop("file")),
        rate=1.0,  # of each run its own
        max_context=min(131_072, profile.max_context_tokens),
        max_delay=MAX_DELAY_S,
        **fields,
    )
    sessions = plan_at(replace(workload, duration=NUM_SLO_SESSIONS), 1.0, 0).sessions
    slo, mean_work_s = choose_slo(profile, sessions, ttft_factor)
    warm_up_s = choose_warm_up_s(sessions, slo)
    degree = smallest_degree(profile)
    saturation = NUM_DEVICES / degree / mean_work_s  # sessions a second of prefill alone
    first_rate = saturation / 3
    mean_rounds = sum(len(session.rounds) for session in sessions) / len(sessions)
    measured_s = min(fields["duration"], ceil(MAX_ROUNDS / mean_rounds / first_rate))
    measured_s = max(measured_s, ceil(MIN_TTFT_OBJECTIVES * slo.ttft_s))
    workload = replace(workload, duration=warm_up_s + measured_s)
    return Cell(
        profile=profile,
        workload_name=workload_name,
        workload=workload,
        warm_up_s=warm_up_s,
        slo=slo,
        lowest_rate=saturation / 300,
        first_rate=first_rate,
        longest_context=max(session.num_tokens for session in sessions),
    )


def smallest_degree(profile: Profile) -> int:
    return next(one.parallel_degree for one in profile.degrees if one.num_kv_tokens >= SMALLEST_ROOM)


def choose_slo(profile: Profile, sessions: Sequence[PlannedSession], ttft_factor: float) -> tuple[Slo, float]:
    """(objectives, seconds of prefill a session): multiples of what an idle worker of the smallest fitting degree
    does."""
    costs = StepCosts.from_profile(profile, smallest_degree(profile))
    times: list[float] = []
    for session in sessions:
        history = 0
        for planned in session.rounds:
            times.append(costs.prefill_s(history, planned.input_tokens))
            history += planned.input_tokens + planned.output_tokens
    times.sort()
    ttft_s = ttft_factor * times[int(0.9 * len(times))]
    itl_s = ITL_FACTOR * costs.decode_step_s(1, 4_096)
    slo = Slo(ttft_s=float(f"{ttft_s:.2g}"), itl_s=float(f"{itl_s:.2g}"))
    return slo, sum(times) / len(sessions)


def list_clusters(cell: Cell, policy_name: str) -> list[tuple[WorkerGroup, ...]]:
    """The clusters a policy is tuned over: every parallel degree whose workers hold the longest session, several splits
    where it splits, with different degrees for the two kinds too, and zero prefill workers for all that can."""
    decode = [one.parallel_degree for one in cell.profile.degrees if one.num_kv_tokens >= cell.longest_context]
    prefill = [one.parallel_degree for one in cell.profile.degrees if one.num_kv_tokens >= cell.longest_context / 2]
    together = [_together(degree) for degree in decode]
    splits = list(
        dict.fromkeys(  # of few large workers, near shares are the same split
            split
            for decode_degree in decode
            for prefill_degree in prefill
            if prefill_degree <= decode_degree
            for share in PREFILL_SHARES
            for split in _split(prefill_degree, decode_degree, share, "decode")
        )
    )
    match policy_name:
        case "colocated-untuned":
            return [_together(smallest_degree(cell.profile))]
        case "colocated" | "colocated-host" | "continuum":
            return together
        case "remote" | "ampd-split":
            return splits
        case "adaptive":  # its roles are fluid: workers that are not dedicated to prefill take both
            return [*together, *(tuple(replace(g, role=_fluid(g.role)) for g in split) for split in splits)]
        case _:
            return [*splits, *together]


def list_options(policy_name: str) -> list[dict[str, Any]]:
    """What is tuned on the best cluster; the first is what clusters are compared with."""
    chunks = [{"routing.chunk.chunk_tokens": chunk} for chunk in CHUNKS]
    match policy_name:
        case "colocated-untuned":
            return [{"routing.chunk.chunk_tokens": 2_048}]
        case "colocated" | "continuum" | "local":
            return chunks
        case "colocated-host":  # with the second tier that `adaptive` has too
            return [{"host_tier": True, **chunk} for chunk in chunks]
        case "threshold":
            return [{}, *({"routing.local_tokens": n} for n in (512, 8_192)), *chunks[1:]]
        case "ampd":
            return chunks
        case "ampd-best" | "ampd-split":
            live = {"routing.live_terms": True}
            return [
                live,
                *({**live, "routing.alpha": alpha} for alpha in (0.2, 0.5)),
                *({"routing.alpha": alpha, "routing.beta": beta} for alpha, beta in ((0.3, 0.5), (0.3, 0.8))),
                *({**live, **chunk} for chunk in chunks[1:]),
            ]
        case "adaptive":  # two leave batches more of their slack, where decode is what is short
            return [
                {},
                {"routing.crowd_price": 0.5},
                {"routing.crowd_price": 1.0, "routing.crowd_share": 0.5, "routing.congestion_price": 0.1},
                {"routing.congestion_price": 3.0},
                {"routing.chunk.itl_share": 0.7},
            ]
        case _:
            return [{}]


def make_candidate(cell: Cell, policy_name: str, groups: tuple[WorkerGroup, ...], options: dict[str, Any]) -> Candidate:
    base = find_policy(policy_name.split("-")[0])
    cluster = Cluster(profile=cell.profile, groups=groups)
    return Candidate(policy=with_options(base, options), cluster=cluster, options=options)


POLICY_NAMES = (
    "adaptive",
    "colocated",
    "colocated-untuned",
    "colocated-host",
    "continuum",
    "remote",
    "local",
    "threshold",
    "ampd",
    "ampd-best",
    "ampd-split",
)


def _fluid(role: Role) -> Role:
    return "prefill" if role == "prefill" else "both"


def _together(degree: int) -> tuple[WorkerGroup, ...]:
    return (WorkerGroup(role="both", count=NUM_DEVICES // degree, parallel_degree=degree),)


def _split(prefill_degree: int, decode_degree: int, share: float, rest: Role) -> Iterator[tuple[WorkerGroup, ...]]:
    num_prefill = round(share * NUM_DEVICES / prefill_degree)
    num_rest = (NUM_DEVICES - num_prefill * prefill_degree) // decode_degree
    if num_prefill < 1 or num_rest < 1:
        return
    yield (
        WorkerGroup(role="prefill", count=num_prefill, parallel_degree=prefill_degree),
        WorkerGroup(role=rest, count=num_rest, parallel_degree=decode_degree),
    )
