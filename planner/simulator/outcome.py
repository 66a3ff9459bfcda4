"""What a simulated run amounts to, in a few numbers: for searches over thousands of runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from planner.simulator.rounds import SimRound
from planner.simulator.simulation import Result
from shared.messages import Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Shares are of the rounds (sessions) offered in the measured part of the run."""

    num_rounds: int
    attainment: float
    attainment_p99_itl: float
    attainment_ttft: float
    session_attainment: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    ttft_max_s: float
    tpot_p50_s: float
    tpot_p95_s: float
    tpot_p99_s: float
    local_share: float
    kv_gb_per_round: float
    num_rejected: int
    num_preemptions: int
    num_evicted_tokens: int
    end_s: float

    def as_dict(self) -> dict[str, Any]:
        return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items()}


def summarise(result: Result, slo: Slo, *, warm_s: float = 0.0, until_s: float = float("inf")) -> Outcome:
    """Over the rounds that were sent in [warm_s, until_s); sessions by their arrival in it.

    A session goes on only when a round has ended, so a scheduler that lets a round wait for ever is offered fewer. The
    rounds that such a session owes count as offered, and missed: those that would have been sent before `until_s` had
    its round in flight, and those after it, just met their objectives; and all that follow a failed round. A session
    whose round in flight may still be on time is judged by those before it; that round counts as offered from when
    its last token would have been due.
    """
    measured = [r for r in result.rounds if warm_s <= r.sent_at < until_s]
    waiting = [r for r in result.unfinished if r.sent_at < until_s]
    num_lost = sum(len(r.session.planned.rounds) - r.index - 1 for r in measured if r.error)
    num_lost += sum(_count_owed(r, slo, warm_s, until_s) for r in waiting)
    num_rounds = len(measured) + num_lost
    completed = [r for r in measured if not r.error and r.finished_at >= 0.0]
    started = [*completed, *(r for r in waiting if r.sent_at >= warm_s)]
    ttfts = sorted(r.ttft_s if r.first_token_at >= 0.0 else result.end_s - r.sent_at for r in started)
    tpots = sorted(r.tpot_s for r in completed if r.num_gaps)
    attained = [r for r in completed if attains(r, slo)]
    p99 = sum(r.ttft_s <= slo.ttft_s and r.percentile_gap_s(0.99) <= slo.itl_s for r in completed)
    sessions: dict[int, bool] = {}
    ids = {id(r) for r in attained}
    for r in (*measured, *(r for r in waiting if _is_late(r, slo, result.end_s))):
        if r.session.arrival >= warm_s:
            sessions[r.session.index] = sessions.get(r.session.index, True) and id(r) in ids
    num_prefills = sum(r.decision is not None for r in measured)
    return Outcome(
        num_rounds=num_rounds,
        attainment=len(attained) / max(1, num_rounds),
        attainment_p99_itl=p99 / max(1, num_rounds),
        attainment_ttft=sum(r.ttft_s <= slo.ttft_s for r in completed) / max(1, num_rounds),
        session_attainment=sum(sessions.values()) / max(1, len(sessions)),
        ttft_p50_s=_quantile(ttfts, 0.5),
        ttft_p90_s=_quantile(ttfts, 0.9),
        ttft_p95_s=_quantile(ttfts, 0.95),
        ttft_p99_s=_quantile(ttfts, 0.99),
        ttft_max_s=ttfts[-1] if ttfts else 0.0,
        tpot_p50_s=_quantile(tpots, 0.5),
        tpot_p95_s=_quantile(tpots, 0.95),
        tpot_p99_s=_quantile(tpots, 0.99),
        local_share=sum(r.decision is not None and not r.is_remote for r in measured) / max(1, num_prefills),
        kv_gb_per_round=result.kv_bytes_moved / 1e9 / max(1, len(result.rounds)),
        num_rejected=result.counters.rejected,
        num_preemptions=result.num_preemptions,
        num_evicted_tokens=result.num_evicted_tokens,
        end_s=result.end_s,
    )


def _count_owed(round_: SimRound, slo: Slo, warm_s: float, until_s: float) -> int:
    """Rounds of an unfinished session that are due: the one in flight, and those that should have followed by now."""
    due_at, num_owed = round_.sent_at, 0
    for planned in round_.session.planned.rounds[round_.index :]:
        if num_owed or planned is not round_.planned:
            due_at += planned.delay_s
        if due_at >= until_s:
            break
        last_due_at = due_at + slo.ttft_s + (planned.output_tokens - 1) * slo.itl_s
        if last_due_at >= until_s and planned is round_.planned:
            break  # it may still be on time
        num_owed += due_at >= warm_s
        due_at = last_due_at
    return num_owed


def _is_late(round_: SimRound, slo: Slo, now: float) -> bool:
    """Of a round in flight: whatever comes now, it has missed its objectives."""
    first_at = round_.first_token_at if round_.first_token_at >= 0.0 else now
    last_due_at = first_at + (round_.planned.output_tokens - 1) * slo.itl_s
    return first_at > round_.sent_at + slo.ttft_s or now > last_due_at


def attains(round_: SimRound, slo: Slo) -> bool:
    return round_.ttft_s <= slo.ttft_s and round_.tpot_s <= slo.itl_s


def _quantile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0
