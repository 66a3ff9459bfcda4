"""Whatever the policy, the batch, the memory: every round gives exactly the tokens of plain `generate` in fp32."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import services.local
from shared.core.policies import POLICIES, find_policy


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


@pytest.mark.parametrize(("transport", "lane"), [("auto", "shm"), ("tcp", "unix"), ("nixl", "nixl")])
async def test_every_way_that_kv_moves(
    transport: str, lane: str, start_cluster: Any, planned_sessions: Any, play_session: Any
) -> None:
    cluster = await start_cluster(policy="remote", kv_transport=transport)
    await play_all(cluster, planned_sessions, play_session)
    await cluster.assert_everything_returned()
    pulled = (await cluster.heartbeats())["decode-0"].kv_pulled
    assert sum(pulled.values()) > 0
    assert {name.split()[0] for name in pulled} == {lane}


async def test_workers_with_no_way_in_common_compute_what_they_cannot_move(
    start_cluster: Any, planned_sessions: Any, play_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = services.local.ServiceProcess

    def start_apart(name: str, argv: list[str], *rest: Any) -> Any:
        return start(name, [*argv, "--kv-transport=nixl"] if name == "prefill-0" else argv, *rest)

    monkeypatch.setattr(services.local, "ServiceProcess", start_apart)
    cluster = await start_cluster(policy="remote", kv_transport="tcp")
    assert set(await play_all(cluster, planned_sessions, play_session)) == {"local"}
    assert not (await cluster.heartbeats())["decode-0"].kv_pulled
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


RUN_SERVICE = Path(__file__).parents[1] / "policies" / "run_service.py"


@pytest.fixture
def forced_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a cluster know the policies of tests/policies; here their names suffice."""
    start = services.local.ServiceProcess

    def start_knowing(name: str, argv: list[str], *rest: Any) -> Any:
        assert argv[1] == "-m"
        return start(name, [sys.executable, str(RUN_SERVICE), *argv[2:]], *rest)

    monkeypatch.setattr(services.local, "ServiceProcess", start_knowing)
    for name in ("moving", "mixed"):
        monkeypatch.setitem(POLICIES, name, find_policy("adaptive"))


@pytest.mark.usefixtures("forced_policies")
@pytest.mark.parametrize(
    "roles", [{"num_prefill": 0, "num_decode": 3}, {"num_prefill": 1, "num_decode": 1, "num_both": 1}]
)
async def test_sessions_that_move(
    roles: dict[str, int], start_cluster: Any, planned_sessions: Any, play_session: Any
) -> None:
    """Every later round elsewhere than the one before, its KV after it; with prefill workers some rounds remote."""
    cluster = await start_cluster(policy="mixed" if roles["num_prefill"] else "moving", **roles)
    placements = await play_all(cluster, planned_sessions, play_session)
    counters = (await cluster.client.status()).counters
    num_later = len(placements) - len(planned_sessions)
    if roles["num_prefill"]:
        assert set(placements) == {"local", "remote"}
        assert 0 < counters["moves"] < num_later
    else:
        assert counters["moves"] == num_later
    assert "moves_without_kv" not in counters
    assert "attempts_failed" not in counters
    await cluster.assert_everything_returned()
