"""`ampd status`: what it shows of the workers, for people and for programs."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from heartbeats import make_heartbeat
from rich.console import Console, Group

from services.status import describe_status, status_for_programs
from shared.messages import ClusterStatus, WindowStats, WorkerStatus


def status_of(**fields: Any) -> ClusterStatus:
    beat = make_heartbeat(**fields)
    return ClusterStatus(
        policy="adaptive",
        model="m",
        workers=(WorkerStatus(alive=True, last_seen_s=0.2, heartbeat=beat),),
        sessions=(),
        num_sessions=0,
        num_rounds_in_flight=0,
        counters={},
    )


@pytest.mark.parametrize(
    ("num_blocks", "num_evictable", "num_free", "percents", "num_used"),
    [(200, 60, 40, "50/30/20", 100), (1000, 0, 1000, "0/0/100", 0), (8, 8, 0, "0/100/0", 0), (0, 0, 0, "0/0/0", 0)],
)
def test_kv_is_shown_as_used_evictable_and_free(
    num_blocks: int, num_evictable: int, num_free: int, percents: str, num_used: int
) -> None:
    status = status_of(num_blocks=num_blocks, num_evictable_blocks=num_evictable, num_free_blocks=num_free)
    console = Console(file=io.StringIO(), width=80)
    console.print(Group(*describe_status(status)))
    row = next(line for line in console.file.getvalue().splitlines() if "decode-0" in line)
    assert row.split()[:4] == ["decode-0", "decode", "alive", percents]
    (worker,) = status_for_programs(status)["workers"]
    assert worker["kv_blocks"] == {"used": num_used, "evictable": num_evictable, "free": num_free}
    assert worker["heartbeat"]["num_free_blocks"] == num_free


def test_which_way_kv_came_is_shown() -> None:
    status = status_of(kv_pulled={"nixl am(tcp/lo cma/memory)": 2_000_000, "unix": 1_500_000})
    console = Console(file=io.StringIO(), width=200)
    console.print(Group(*describe_status(status)))
    shown = "KV pulled: decode-0 2.0 MB by nixl am(tcp/lo cma/memory), decode-0 1.5 MB by unix"
    assert shown in console.file.getvalue()
    (worker,) = status_for_programs(status)["workers"]
    assert worker["heartbeat"]["kv_pulled"]["unix"] == 1_500_000
    console = Console(file=io.StringIO(), width=200)
    console.print(Group(*describe_status(status_of())))
    assert "KV pulled" not in console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100])
def test_nothing_of_a_worker_is_cut_off_at_the_width_of_a_terminal(width: int) -> None:
    status = status_of(
        worker_id="decode-worker-of-compose-17",
        num_blocks=100_000,
        num_evictable_blocks=33_000,
        num_free_blocks=33_000,
        num_sessions=1234,
        num_running=123,
        num_waiting=123,
        queue_num_tokens=123_456,
        ttft=WindowStats(count=1, p95=1.23456),
        itl=WindowStats(count=1, p95=0.04321),
    )
    console = Console(file=io.StringIO(), width=width)
    console.print(Group(*describe_status(status)))
    shown = console.file.getvalue()
    assert "used/evictable/free" in shown
    for whole in ("34/33/33", "1234", "123/123456", "1234.6", "43.2", "ITL"):
        assert re.search(rf"(?<!\S){whole}(?!\S)", shown), shown
    assert "…" not in shown
