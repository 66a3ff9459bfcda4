"""What the planner counts, and what it forgets."""

from __future__ import annotations

import msgspec
import pytest
from heartbeats import make_heartbeat

from planner.collector import MAX_WORKERS, NOTHING_YET, WINDOW_S, WORKER_FORGOTTEN_S, Collector
from shared.errors import ErrorCode
from shared.messages import RoundObserved, Slo, Usage

SLO = Slo(ttft_s=1.0, itl_s=0.1)


def observed(
    *,
    prefill: str | None = "local",
    ttft_s: float | None = 0.5,
    tpot_s: float | None = 0.05,
    delay_s: float | None = None,
    error: ErrorCode | None = None,
) -> RoundObserved:
    usage = None
    if prefill is not None:
        usage = msgspec.convert(
            {
                "num_history_tokens": 10,
                "num_input_tokens": 20,
                "num_cached_tokens": 9,
                "num_output_tokens": 5,
                "prefill": prefill,
                "prefill_worker": "p",
                "decode_worker": "d",
                "kv_bytes_read": 100,
                "kv_bytes_written": 11,
            },
            Usage,
        )
    return RoundObserved(
        tenant="t",
        session="s",
        round=0,
        delay_s=delay_s,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        slo=SLO,
        usage=usage,
        error=error,
    )


def test_rounds_are_counted_by_place_and_outcome() -> None:
    collector = Collector(NOTHING_YET, 0.0)
    collector.on_round(observed(prefill="local"), 1.0)
    collector.on_round(observed(prefill="remote", ttft_s=1.5), 2.0)
    collector.on_round(observed(prefill="remote", tpot_s=0.2), 3.0)
    collector.on_round(observed(prefill=None, ttft_s=None, tpot_s=None, error=ErrorCode.CANCELLED), 4.0)
    stats = collector.stats(10.0)
    assert (stats.num_rounds, stats.num_failed, stats.num_attained) == (4, 1, 1)
    assert (stats.num_local, stats.num_remote, stats.kv_bytes_moved) == (1, 2, 333)
    assert stats.rounds_per_s == pytest.approx(0.4)
    assert stats.ttft_s.count == 3
    assert stats.ttft_s.p50 == 0.5
    assert stats.input_tokens.mean == 20
    assert stats.output_tokens.mean == 5
    assert stats.delay_s.count == 0


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "error", "attains"),
    [
        (1.0, 0.1, None, True),  # at the objective
        (1.0, None, None, True),  # one output token: there is no gap to miss
        (1.01, 0.1, None, False),
        (1.0, 0.11, None, False),
        (None, None, None, False),
        (0.1, 0.01, ErrorCode.WORKER_LOST, False),
    ],
)
def test_attainment(ttft_s: float | None, tpot_s: float | None, error: ErrorCode | None, attains: bool) -> None:
    collector = Collector(NOTHING_YET, 0.0)
    collector.on_round(observed(ttft_s=ttft_s, tpot_s=tpot_s, error=error), 1.0)
    assert collector.stats(1.0).num_attained == attains


def test_windows_forget_and_totals_do_not() -> None:
    collector = Collector(NOTHING_YET, 0.0)
    collector.on_round(observed(delay_s=3.0), 1.0)
    stats = collector.stats(1.0 + WINDOW_S)
    assert stats.delay_s.count == 0
    assert stats.rounds_per_s == 0.0
    assert stats.num_rounds == 1


def test_totals_go_on_from_those_given() -> None:
    before = Collector(NOTHING_YET, 0.0)
    before.on_round(observed(prefill="remote"), 1.0)
    after = Collector(before.totals, 100.0)
    after.on_round(observed(prefill="remote"), 101.0)
    stats = after.stats(102.0)
    assert (stats.num_rounds, stats.num_remote, stats.kv_bytes_moved) == (2, 2, 222)
    assert stats.uptime_s == pytest.approx(2.0)


def test_the_newest_heartbeat_of_each_worker_is_kept() -> None:
    collector = Collector(NOTHING_YET, 0.0)
    collector.on_heartbeat(make_heartbeat(seq=5), 1.0)
    collector.on_heartbeat(make_heartbeat(seq=4), 1.1)  # overtaken on the way
    collector.on_heartbeat(make_heartbeat("prefill-0", seq=1), 1.2)
    assert {worker.worker_id: worker.seq for worker in collector.stats(2.0).workers} == {"decode-0": 5, "prefill-0": 1}
    collector.on_heartbeat(make_heartbeat(incarnation=2, seq=0), 2.0)  # a new life counts from 0
    assert {worker.incarnation for worker in collector.stats(2.0).workers if worker.worker_id == "decode-0"} == {2}


def test_silent_workers_are_forgotten() -> None:
    collector = Collector(NOTHING_YET, 0.0)
    collector.on_heartbeat(make_heartbeat("decode-0"), 0.0)
    collector.on_heartbeat(make_heartbeat("decode-1"), 10.0)
    stats = collector.stats(WORKER_FORGOTTEN_S + 5.0)
    assert [worker.worker_id for worker in stats.workers] == ["decode-1"]


def test_a_flood_of_worker_ids_is_bounded() -> None:
    collector = Collector(NOTHING_YET, 0.0)
    for index in range(MAX_WORKERS + 10):
        collector.on_heartbeat(make_heartbeat(f"decode-{index}"), 1.0)
    assert len(collector.stats(1.0).workers) == MAX_WORKERS
