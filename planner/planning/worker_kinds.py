"""What a worker of one GPU type and parallel degree does with a workload, in numbers that a linear program can use.

A worker spends its time in *operating modes*: a mixed step of B decodes and a chunk of prefill, as large as the ITL
objective leaves room for. What it can do is any mixture of its modes (the convex hull of their rates), so that decode
and prefill share a worker in one linear constraint, and no share between them is assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from planner.planning.workload_model import RoundShape, SessionShape, WorkloadModel
from shared.core.profile import Profile
from shared.core.step_costs import StepCosts
from shared.messages import Slo

PrefillClass = Literal["first", "later", "again"]
PREFILL_CLASSES: tuple[PrefillClass, ...] = ("first", "later", "again")
ITL_SHARE = 0.9  # of the ITL objective that a step may take, as the chunks of `adaptive`
MAX_BATCH = 512  # sequences of a step, as the workers'
BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
FULL_CHUNK = 8_192  # tokens of a step that only prefills


@dataclass(frozen=True, slots=True)
class Mode:
    """`batch` sequences decode in steps of `step_s`; `prefill_share` of the time is left for prefills."""

    batch: int
    step_s: float
    prefill_share: float

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerKind:
    """One GPU type and parallel degree, with the workload's mean costs per session.

    work_s: seconds of a worker whose steps are full, for the prefills of a session: `first` rounds; `later` ones, whose
    history is there; what it takes `again` where it has been dropped. late_share: rounds of each class whose prefill
    alone misses the TTFT objective on such a worker.
    """

    gpu_type: str
    profile: Profile
    parallel_degree: int
    costs: StepCosts
    work_s: dict[PrefillClass, float]
    alone_s: dict[PrefillClass, float]  # of one prefill, mean
    late_share: dict[PrefillClass, float]
    num_kv_tokens: int
    num_host_tokens: int
    can_prefill: bool
    can_decode: bool
    modes: tuple[Mode, ...]  # the one that only prefills comes first

    @property
    def name(self) -> str:
        return f"{self.gpu_type} x {self.parallel_degree}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLoad:
    """What a session needs on the way, whatever serves it. Means over the sessions.

    KV in token-seconds: of rounds that wait for their first token (as long as they may, with room to their end), and of
    those whose tool runs; what decodes is in the modes, with reserved_context each. moved_tokens: KV over the links for
    a remote prefill of each class.
    """

    rounds: dict[PrefillClass, float]  # `again` are rounds of `later` too
    output_tokens: float
    decode_context: float  # mean over the tokens decoded
    reserved_context: float  # of the rounds that these belong to, at their ends: room for it is kept from the start
    waiting_token_s: float
    idle_token_s: float
    moved_tokens: dict[PrefillClass, float]

    @property
    def num_rounds(self) -> float:
        return self.rounds["first"] + self.rounds["later"]


def measure_load(workload: WorkloadModel, slo: Slo) -> SessionLoad:
    """A prefill worker keeps a session's KV: a later round moves what was produced and given since, there and back."""
    mean = workload.mean_per_session
    rounds = [one for session in workload.sessions for one in session]
    first, later = split_rounds(rounds)
    output_tokens = mean([one.num_output_tokens for one in rounds])
    reserved = [one.num_output_tokens * one.num_total_tokens for one in rounds]
    decoded = [one.num_output_tokens * (one.num_prompt_tokens + one.num_output_tokens / 2) for one in rounds]
    return SessionLoad(
        rounds={
            "first": len(first) / len(workload.sessions),
            "later": len(later) / len(workload.sessions),
            "again": len(later) / len(workload.sessions),
        },
        output_tokens=output_tokens,
        decode_context=mean(decoded) / output_tokens if output_tokens else 0.0,
        reserved_context=mean(reserved) / output_tokens if output_tokens else 0.0,
        waiting_token_s=mean([slo.ttft_s * one.num_total_tokens for one in rounds]),
        idle_token_s=mean([one.delay_s * one.num_history_tokens for one in later]),
        moved_tokens={
            "first": mean([one.num_input_tokens for one in first]),
            "later": mean([_count_missing(session, index) for session in workload.sessions
                           for index, one in enumerate(session) if one.num_history_tokens]),
            "again": mean([one.num_history_tokens for one in later]),
        },
    )  # fmt: skip


def split_rounds(rounds: Sequence[RoundShape]) -> tuple[list[RoundShape], list[RoundShape]]:
    """(those that begin a session, those with a history). A session whose beginning was not seen has only these."""
    return [one for one in rounds if not one.num_history_tokens], [one for one in rounds if one.num_history_tokens]


def _count_missing(session: SessionShape, index: int) -> int:
    """Tokens that a worker which prefilled the round before does not have: that round's output (taken to be as long as
    this one's where it was not seen), and the new input."""
    before = session[max(0, index - 1)]
    return before.num_output_tokens + session[index].num_input_tokens


@dataclass(frozen=True, slots=True)
class MeasuredKind:
    """What running workers tell: how long their steps take over the profile's, and how much KV they hold."""

    scale: float
    num_kv_tokens: int


def measure_kind(
    gpu_type: str,
    profile: Profile,
    parallel_degree: int,
    workload: WorkloadModel,
    load: SessionLoad,
    slo: Slo,
    measured: MeasuredKind | None = None,
) -> WorkerKind:
    """Raises AmpdError INVALID_REQUEST for a degree that the profile does not have."""
    costs = StepCosts.from_profile(profile, parallel_degree, scale=measured.scale if measured else 1.0)
    if measured is not None:
        costs.num_kv_tokens = measured.num_kv_tokens
    begun, gone_on = split_rounds([one for session in workload.sessions for one in session])
    first = [(0, one.num_input_tokens) for one in begun]
    later = [(one.num_history_tokens, one.num_input_tokens) for one in gone_on]
    whole = [(0, history + new) for history, new in later]
    mean = workload.mean_per_session
    later_work_s = mean([costs.work_s(*one) for one in later])
    alone = {name: [costs.prefill_s(*one) for one in asked] for name, asked in _classes(first, later, whole)}
    longest = workload.longest_context
    modes = list_modes(costs, load, slo.itl_s)
    return WorkerKind(
        gpu_type=gpu_type,
        profile=profile,
        parallel_degree=parallel_degree,
        costs=costs,
        work_s={
            "first": mean([costs.work_s(*one) for one in first]),
            "later": later_work_s,
            "again": mean([costs.work_s(*one) for one in whole]) - later_work_s,
        },
        alone_s={name: sum(times) / max(1, len(times)) for name, times in alone.items()},
        late_share={name: sum(t > slo.ttft_s for t in times) / max(1, len(times)) for name, times in alone.items()},
        num_kv_tokens=costs.num_kv_tokens,
        num_host_tokens=profile.host_kv_bytes * parallel_degree // profile.kv_bytes_per_token,
        can_prefill=costs.num_kv_tokens >= longest / 2,  # it may have to yield room, and holds one at least
        can_decode=costs.num_kv_tokens >= longest and len(modes) > 1,
        modes=modes,
    )


def _classes(
    first: list[tuple[int, int]], later: list[tuple[int, int]], whole: list[tuple[int, int]]
) -> list[tuple[PrefillClass, list[tuple[int, int]]]]:
    return [("first", first), ("later", later), ("again", whole)]


def list_modes(costs: StepCosts, load: SessionLoad, itl_slo_s: float) -> tuple[Mode, ...]:
    """Only prefill; and for each batch size whose step keeps to the objective: with nothing beside it, and with the
    chunk that fills the step. A decode step of one sequence that is over the objective leaves only the first."""
    limit_s = ITL_SHARE * itl_slo_s
    context = max(1.0, load.decode_context)
    modes = [Mode(0, 1.0, 1.0)]
    for batch in sorted({*BATCHES, _largest_batch(costs, context, limit_s)}):
        if batch < 1 or batch > MAX_BATCH:
            continue
        step_s = costs.decode_step_s(batch, context)
        if step_s > limit_s:
            break
        modes.append(Mode(batch, step_s, 0.0))
        chunk = min(FULL_CHUNK, costs.largest_chunk(batch, context, round(context), limit_s))
        if chunk > 0:
            mixed_s = costs.chunk_step_s(batch, context, round(context), chunk)
            # in seconds of a worker whose steps are full, as work_s
            modes.append(Mode(batch, mixed_s, min(1.0, costs.work_s(round(context), chunk) / mixed_s)))
    return tuple(modes)


def _largest_batch(costs: StepCosts, context: float, limit_s: float) -> int:
    low, high = 0, MAX_BATCH
    while low < high:
        middle = (low + high + 1) // 2
        if costs.decode_step_s(middle, context) <= limit_s:
            low = middle
        else:
            high = middle - 1
    return low
