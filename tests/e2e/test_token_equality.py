"""Whatever the policy, the batch, the memory: every round gives exactly the tokens of plain `generate` in fp32."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest


async def play_all(cluster: Any, planned_sessions: Any, play_session: Callable[..., Awaitable[list[str]]]) -> list[str]:
    async def one(planned: Any) -> list[str]:
        async with await cluster.client.open_session() as session:
            return await play_session(session, planned)

    async with asyncio.timeout(150):
        placements = await asyncio.gather(*(one(planned) for planned in planned_sessions))
    return [placement for session in placements for placement in session]


@pytest.mark.parametrize("policy", ["remote", "local", "ampd"])
async def test_every_policy(policy: str, start_cluster: Any, planned_sessions: Any, play_session: Any) -> None:
    cluster = await start_cluster(policy=policy)
    placements = await play_all(cluster, planned_sessions, play_session)
    num_sessions = len(planned_sessions)
    match policy:
        case "remote":
            assert set(placements) == {"remote"}
        case "local":
            assert placements.count("remote") == num_sessions, "first rounds remote, later rounds local"
        case "ampd":
            assert "remote" in placements
    await cluster.assert_everything_returned()


async def test_small_memory_and_small_chunks(start_cluster: Any, planned_sessions: Any, play_session: Any) -> None:
    """A pool that holds two or three of the ten sessions: rounds are chunked, sessions evicted and preempted."""
    cluster = await start_cluster(
        policy="local", kv_memory_mb=1, worker_arguments=("--chunk-tokens=16", "--max-prefill-tokens=32")
    )
    placements = await play_all(cluster, planned_sessions, play_session)
    assert {"local", "remote"} == set(placements)
    await cluster.assert_everything_returned()


async def test_several_workers_of_each_kind(start_cluster: Any, planned_sessions: Any, play_session: Any) -> None:
    cluster = await start_cluster(policy="remote", num_prefill=2, num_decode=2)
    await play_all(cluster, planned_sessions, play_session)
    await cluster.assert_everything_returned()


async def test_no_prefill_worker_at_all(start_cluster: Any, planned_sessions: Any, play_session: Any) -> None:
    cluster = await start_cluster(policy="ampd", num_prefill=0)
    assert set(await play_all(cluster, planned_sessions, play_session)) == {"local"}
    await cluster.assert_everything_returned()
