"""A cluster whose workers differ in parallel degree: prefill on one rank, decode on two, and the other way round."""

from __future__ import annotations

import asyncio
from typing import Any

import psutil
import pytest

import services.local


def give_degrees(monkeypatch: pytest.MonkeyPatch, degrees: dict[str, int]) -> None:
    """Workers of a cluster have one degree; here each gets that of its role."""
    start = services.local.ServiceProcess

    def start_with_degree(name: str, argv: list[str], *rest: Any) -> Any:
        degree = degrees.get(name.split("-")[0])
        return start(name, argv if degree is None else [*argv, f"--parallel-degree={degree}"], *rest)

    monkeypatch.setattr(services.local, "ServiceProcess", start_with_degree)


@pytest.mark.parametrize("degrees", [{"prefill": 1, "decode": 2}, {"prefill": 2, "decode": 1}], ids=str)
async def test_sessions_over_different_degrees(
    degrees: dict[str, int],
    start_cluster: Any,
    planned_sessions: Any,
    play_session: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every round's prefill is remote: its history goes one way and its increment the other, all tokens true."""
    give_degrees(monkeypatch, degrees)
    cluster = await start_cluster(policy="remote")
    beats = await cluster.heartbeats()
    assert {name.split("-")[0]: beat.parallel_degree for name, beat in beats.items()} == degrees

    async def play(planned: Any) -> list[str]:
        async with await cluster.client.open_session() as session:
            placements: list[str] = await play_session(session, planned)
            return placements

    async with asyncio.timeout(200):
        placements = await asyncio.gather(*(play(planned) for planned in planned_sessions[:5]))
    assert {place for session in placements for place in session} == {"remote"}
    assert "attempts_failed" not in (await cluster.client.status()).counters
    await cluster.assert_everything_returned()


async def test_a_worker_whose_rank_is_killed_ends(start_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is idle: its KV is incomplete, so it must not go on announcing itself."""
    give_degrees(monkeypatch, {"decode": 2})
    cluster = await start_cluster(num_prefill=0)
    worker = cluster.local.workers["decode-0"]
    [rank] = psutil.Process(worker.pid).children()
    rank.kill()
    assert await asyncio.wait_for(worker.wait(), 60) == 1
    assert "rank 1 ended between steps with status -9" in worker.log_path.read_text()
