"""The report against numbers computed by hand."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from loadgen.plan import make_plan
from loadgen.plot import save_plot
from loadgen.records import (
    RoundError,
    RoundRecord,
    RunInfo,
    encode_record,
    find_missing,
    read_records,
)
from loadgen.report import attains, attains_p99_itl, build_report, encode_report, summarise
from loadgen.table import print_report
from loadgen.traces import TraceRound, TraceSession
from shared.errors import AmpdError
from shared.messages import Slo, Usage

SLO = Slo(ttft_s=1.0, itl_s=0.125)  # and times that floats hold exactly: the bounds are inclusive


def record(
    session: int, index: int, sent_s: float, *gaps_s: float, prefill: str = "local", state: str = "completed"
) -> RoundRecord:
    """A round sent at sent_s whose tokens come gaps_s after each other, the first one after sent_s."""
    times: list[float] = []
    for gap_s in gaps_s:
        times.append((times[-1] if times else sent_s) + gap_s)
    usage = Usage(
        num_history_tokens=20 * index,
        num_input_tokens=10,
        num_cached_tokens=19 * index,
        num_output_tokens=len(times),
        prefill=prefill,  # type: ignore[arg-type]
        prefill_worker="w",
        decode_worker="d",
        kv_bytes_read=100 if prefill == "remote" else 0,
        kv_bytes_written=300 if prefill == "remote" else 0,
        queued_s=0.25,
    )
    return RoundRecord(
        session_index=session,
        session_id=f"s{session}",
        round=index,
        planned_input_tokens=10,
        planned_output_tokens=len(times),
        delay_s=0.0,
        state=state,  # type: ignore[arg-type]
        due_s=sent_s - 0.5,
        sent_s=sent_s,
        first_token_s=times[0] if times else None,
        finished_s=times[-1] if times else sent_s,
        token_times_s=tuple(times),
        usage=usage if state == "completed" else None,
        error=None if state == "completed" else RoundError("worker_lost", "gone"),
    )


RECORDS = [
    record(0, 0, 1.0, 1.0, 0.125, 0.125),  # TTFT and TPOT exactly at the SLO
    record(0, 1, 3.0, 0.5, 0.05, prefill="remote"),
    record(1, 0, 2.0, 1.5, 0.05),  # TTFT missed
    record(2, 0, 4.0, 0.5, 0.01, 0.375),  # TPOT missed
    record(3, 0, 5.0, 0.4),  # one token: no TPOT to miss
    record(4, 0, 5.0, 0.3, state="failed"),
]


def run_info(rounds: int, sessions: int) -> RunInfo:
    return RunInfo(
        kind="live",
        policy="ampd",
        model="tiny",
        seed=3,
        slo=SLO,
        rounds_offered=rounds,
        sessions_offered=sessions,
        config={"file": "f"},
        trace={},
        machine={"cpu": "c", "cores": 2},
    )


def test_round_metrics() -> None:
    one = record(0, 0, 1.0, 0.5, 0.1, 0.3)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.itls_s == pytest.approx([0.1, 0.3])
    assert one.tpot_s == pytest.approx(0.2)
    assert record(0, 0, 1.0, 0.5).tpot_s is None


def test_attainment_counts_failed_and_unsent_rounds() -> None:
    report = build_report(run_info(rounds=8, sessions=5), RECORDS)  # two rounds of session 4 left no record
    assert report["rounds"] == {"offered": 8, "completed": 5, "failed": 3, "attained": 3}
    assert report["slo"]["attainment"] == pytest.approx(3 / 8)
    assert report["slo"]["session_attainment"] == pytest.approx(2 / 5)  # sessions 0 and 3
    assert report["slo"]["ttft_attainment"] == pytest.approx(4 / 8)
    assert report["sessions"] == {"offered": 5, "completed": 4}
    assert report["errors"] == {"interrupted": 2, "worker_lost": 1}


def test_attaining_is_inclusive_and_p99_is_stricter() -> None:
    assert attains(record(0, 0, 0.0, 1.0, 0.125), SLO)
    assert not attains(record(0, 0, 0.0, 1.001, 0.125), SLO)
    uneven = record(0, 0, 0.0, 0.5, *[0.01] * 9, 0.5)  # mean 0.059, worst 0.5
    assert attains(uneven, SLO)
    assert not attains_p99_itl(uneven, SLO)
    assert not attains(record(0, 0, 0.0, 0.1, 0.01, state="failed"), SLO)


def test_sums_and_distributions() -> None:
    report = build_report(run_info(6, 5), RECORDS)
    assert report["ttft_s"] == {"count": 5, "mean": 0.78, "p50": 0.5, "p90": 1.3, "p99": 1.48, "max": 1.5}
    assert report["itl_s"]["count"] == 6
    assert report["itl_s"]["mean"] == pytest.approx((0.125 + 0.125 + 0.05 + 0.05 + 0.01 + 0.375) / 6, abs=1e-6)
    assert report["tpot_s"]["count"] == 4
    assert report["prefill"] == {"local": 4, "remote": 1, "local_share": 0.8}
    assert report["kv"] == {"bytes_moved": 400, "bytes_read": 100, "bytes_written": 300}
    assert report["tokens"]["output"] == 11
    assert report["lag_s"]["mean"] == pytest.approx(0.5)
    assert report["stages_s"]["queued"]["p50"] == pytest.approx(0.25)
    assert report["ttft_by"]["later_rounds"]["count"] == report["ttft_by"]["remote"]["count"] == 1
    duration_s = 5.4 - 1.0
    assert report["throughput"]["duration_s"] == pytest.approx(duration_s)
    assert report["throughput"]["rounds_per_s"] == pytest.approx(5 / duration_s, abs=1e-6)
    assert report["throughput"]["output_tokens_per_s"] == pytest.approx(11 / duration_s, abs=1e-6)
    assert (report["policy"], report["seed"], report["config"]) == ("ampd", 3, {"file": "f"})


def test_summary_of_nothing_has_nulls() -> None:
    assert summarise([]) == summarise([None]) == dict.fromkeys(("mean", "p50", "p90", "p99", "max")) | {"count": 0}


def test_a_run_in_which_nothing_completed_can_be_reported(tmp_path: Path) -> None:
    run, records = run_info(1, 1), [RECORDS[5]]
    report = build_report(run, records)
    assert report["slo"]["attainment"] == 0.0
    assert report["throughput"]["rounds_per_s"] is None
    encode_report(report)
    save_plot(run, records, report, tmp_path / "r.png")
    print_report(report, Console(quiet=True))


def test_table_and_plot(tmp_path: Path) -> None:
    run = run_info(6, 5)
    report = build_report(run, RECORDS)
    save_plot(run, RECORDS, report, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    console = Console(record=True, width=110, file=io.StringIO())
    print_report(report, console)
    text = console.export_text()
    for expected in ("5 of 6 completed, 1 failed", "50.0 % of rounds", "4 local, 1 remote", "400 B", "worker_lost 1"):
        assert expected in text


def test_records_read_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(b"".join(map(encode_record, RECORDS)))
    assert read_records(path) == RECORDS
    path.write_bytes(path.read_bytes() + b'{"round": 1}\n')
    with pytest.raises(AmpdError, match=f"line {len(RECORDS) + 1}"):
        read_records(path)


def test_missing_rounds_are_found() -> None:
    rounds = (TraceRound(input_tokens=1, output_tokens=1),) * 3
    plan = make_plan([TraceSession(session_id="s0", arrival_s=0.0, rounds=rounds)])
    done = [record(0, 0, 1.0, 0.5), record(0, 1, 2.0, 0.5, state="failed")]
    (missing,) = find_missing(plan.sessions, done, "run-{}".format, interrupted=False)
    assert (missing.round, missing.state, missing.session) == (2, "not_sent", "run-0")
    assert missing.error is not None
    assert missing.error.code == "not_sent"
