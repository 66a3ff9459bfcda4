"""From round records to the report: pure functions, the same for live and simulated runs.

Definitions (docs/glossary.md): a round attains its SLO when TTFT <= ttft_slo_s and TPOT <= itl_slo_s; attainment is
over the rounds *offered*, so that failed, rejected and unsent rounds count against it. A round of one token has no
TPOT and cannot miss it. Percentiles interpolate linearly; a distribution of nothing has count 0 and null values.
A run with a warm-up or an end is reported for the rounds sent between the two, and for the sessions that arrived then.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import numpy as np

from loadgen.measured import MeasuredPart, select_measured
from loadgen.percentiles import collect_runs, percentile_of_runs, weighted_percentiles
from loadgen.records import INTERRUPTED, RoundRecord, RunInfo
from shared.messages import Slo, Usage

SCHEMA = "ampd-report/1"

Report = dict[str, Any]


def build_report(run: RunInfo, records: Sequence[RoundRecord]) -> Report:
    """The content of report.json. Rounds offered that have no record (the run was killed) count as failed."""
    part = select_measured(run, records)
    completed = [record for record in part.rounds if record.state == "completed"]
    usages = [record.usage for record in completed if record.usage is not None]
    attained = sum(attains(record, run.slo) for record in part.rounds)
    return {
        "schema": SCHEMA,
        "kind": run.kind,
        "policy": run.policy,
        "model": run.model,
        "seed": run.seed,
        "rounds": {
            "offered": part.rounds_offered,
            "completed": len(completed),
            "failed": part.rounds_offered - len(completed),
            "attained": attained,
        },
        "sessions": {
            "offered": part.sessions_offered,
            "completed": len(_sessions_all(part.of_sessions, lambda record: record.state == "completed")),
        },
        "measured": {
            "from_s": run.warm_up_s,
            "until_s": run.until_s,
            "rounds_left_out": run.rounds_offered - part.rounds_offered,
        },
        "slo": _rate_attainment(run.slo, part, attained),
        "ttft_s": summarise(record.ttft_s for record in completed),
        "itl_s": summarise_runs(itl_run for record in completed for itl_run in record.itl_runs),
        "tpot_s": summarise(record.tpot_s for record in completed),
        "round_s": summarise(_duration(record) for record in completed),
        "ttft_by": _split_ttft(completed),
        "stages_s": {
            stage: summarise(getattr(usage, f"{stage}_s") for usage in usages)
            for stage in ("queued", "transfer", "prefill", "decode")
        },
        "lag_s": summarise(_lag(record) for record in part.rounds),
        "prefill": _count_prefills(usages),
        "kv": _sum_kv(usages),
        "tokens": _sum_tokens(usages),
        "throughput": _measure_throughput(completed),
        "recoveries": sum(record.num_recoveries for record in part.rounds),
        "errors": _count_errors(run, records, part.rounds),
        "trace": run.trace,
        "config": run.config,
        "machine": run.machine,
        **({} if run.simulation is None else {"simulation": run.simulation}),
    }


def attains(record: RoundRecord, slo: Slo) -> bool:
    """TTFT and TPOT of a completed round are within the SLO."""
    return _attains_ttft(record, slo) and (record.tpot_s is None or record.tpot_s <= slo.itl_s)


def attains_p99_itl(record: RoundRecord, slo: Slo) -> bool:
    """The stricter reading: the 99th percentile of the round's own token gaps instead of their mean."""
    return _attains_ttft(record, slo) and percentile_of_runs(record.itl_runs, 0.99) <= slo.itl_s


def summarise(values: Iterable[float | None]) -> dict[str, float | int | None]:
    return summarise_runs((1, value) for value in values if value is not None)


def summarise_runs(runs: Iterable[tuple[int, float]]) -> dict[str, float | int | None]:
    """Of values that come in runs of equal ones: (how many, the value)."""
    values, counts = collect_runs(runs)
    if not len(values):
        return {"count": 0, "mean": None, "p50": None, "p90": None, "p99": None, "max": None}
    p50, p90, p99 = weighted_percentiles(values, counts, (0.5, 0.9, 0.99))
    mean = np.average(values, weights=counts)
    summary = {"mean": mean, "p50": p50, "p90": p90, "p99": p99, "max": values.max()}
    return {"count": int(counts.sum()), **{name: round(float(value), 6) for name, value in summary.items()}}


def _attains_ttft(record: RoundRecord, slo: Slo) -> bool:
    return record.state == "completed" and record.ttft_s is not None and record.ttft_s <= slo.ttft_s


def _rate_attainment(slo: Slo, part: MeasuredPart, num_attained: int) -> Report:
    def share(count: int, offered: int) -> float | None:
        return round(count / offered, 6) if offered else None

    sessions = _sessions_all(part.of_sessions, lambda record: attains(record, slo))
    p99 = sum(attains_p99_itl(record, slo) for record in part.rounds)
    return {
        "ttft_slo_s": slo.ttft_s,
        "itl_slo_s": slo.itl_s,
        "attainment": share(num_attained, part.rounds_offered),
        "session_attainment": share(len(sessions), part.sessions_offered),
        "p99_itl_attainment": share(p99, part.rounds_offered),
        "ttft_attainment": share(sum(_attains_ttft(record, slo) for record in part.rounds), part.rounds_offered),
    }


def _sessions_all(records: Sequence[RoundRecord], holds: Callable[[RoundRecord], bool]) -> set[int]:
    """Sessions of whose recorded rounds every one `holds`."""
    by_session: dict[int, bool] = {}
    for record in records:
        by_session[record.session_index] = by_session.get(record.session_index, True) and holds(record)
    return {session for session, all_hold in by_session.items() if all_hold}


def _split_ttft(completed: Sequence[RoundRecord]) -> Report:
    """TTFT of first and later rounds, and of rounds prefilled here and there."""
    groups: dict[str, list[float | None]] = defaultdict(list)
    for record in completed:
        groups["first_round" if record.round == 0 else "later_rounds"].append(record.ttft_s)
        if record.usage is not None:
            groups[record.usage.prefill].append(record.ttft_s)
    return {name: summarise(groups[name]) for name in ("first_round", "later_rounds", "local", "remote")}


def _duration(record: RoundRecord) -> float | None:
    if record.sent_s is None or record.finished_s is None:
        return None
    return record.finished_s - record.sent_s


def _lag(record: RoundRecord) -> float | None:
    """How late the round was sent: large values mean that the load generator, not the service, was the limit."""
    if record.sent_s is None or record.due_s is None:
        return None
    return max(0.0, record.sent_s - record.due_s)


def _count_prefills(usages: Sequence[Usage]) -> Report:
    num_local = sum(usage.prefill == "local" for usage in usages)
    return {
        "local": num_local,
        "remote": len(usages) - num_local,
        "local_share": round(num_local / len(usages), 6) if usages else None,
    }


def _sum_kv(usages: Sequence[Usage]) -> Report:
    bytes_read = sum(usage.kv_bytes_read for usage in usages)
    bytes_written = sum(usage.kv_bytes_written for usage in usages)
    return {"bytes_moved": bytes_read + bytes_written, "bytes_read": bytes_read, "bytes_written": bytes_written}


def _sum_tokens(usages: Sequence[Usage]) -> Report:
    return {
        "input": sum(usage.num_input_tokens for usage in usages),
        "output": sum(usage.num_output_tokens for usage in usages),
        "history": sum(usage.num_history_tokens for usage in usages),
        "cached": sum(usage.num_cached_tokens for usage in usages),
        "preemptions": sum(usage.num_preemptions for usage in usages),
        "extra_attempts": sum(usage.num_attempts - 1 for usage in usages),
    }


def _measure_throughput(completed: Sequence[RoundRecord]) -> Report:
    """Over the time from the first round sent to the last one finished."""
    sent = [record.sent_s for record in completed if record.sent_s is not None]
    ended = [record.finished_s for record in completed if record.finished_s is not None]
    duration_s = max(ended) - min(sent) if sent and ended else 0.0
    num_tokens = sum(record.num_output_tokens for record in completed)
    return {
        "duration_s": round(duration_s, 6),
        "rounds_per_s": round(len(completed) / duration_s, 6) if duration_s > 0 else None,
        "output_tokens_per_s": round(num_tokens / duration_s, 6) if duration_s > 0 else None,
    }


def _count_errors(run: RunInfo, records: Sequence[RoundRecord], measured: Sequence[RoundRecord]) -> dict[str, int]:
    codes = Counter(record.error.code for record in measured if record.error is not None)
    if run.rounds_offered > len(records):
        codes[INTERRUPTED] += run.rounds_offered - len(records)
    return dict(sorted(codes.items()))


def encode_report(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"
