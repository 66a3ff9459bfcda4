"""Workers of a running cluster take other roles while sessions play: no round is lost, no token differs from plain
`generate`, and nothing stays behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from shared.client import ClientSession
from shared.errors import AmpdError, ErrorCode
from shared.messages import Role

Play = Callable[..., Awaitable[list[str]]]


async def play_between(
    cluster: Any, planned_sessions: Any, play_session: Play, changes: list[tuple[str, Role]]
) -> None:
    """Each of `changes` happens while a round of every session is played."""
    client = cluster.client
    opened: list[ClientSession] = [await client.open_session() for _ in planned_sessions]

    async def play(first: int, last: int | None) -> None:
        await asyncio.gather(
            *(
                play_session(session, planned, min(first, len(planned.rounds)), last)
                for session, planned in zip(opened, planned_sessions, strict=True)
                if first < len(planned.rounds)
            )
        )

    async with asyncio.timeout(150):
        await play(0, 1)
        for index, (worker_id, role) in enumerate(changes):
            _, changed = await asyncio.gather(play(index + 1, index + 2), client.change_role(worker_id, role))
            assert changed.role == role
            await cluster.wait_until(lambda worker_id=worker_id, role=role: tells(cluster, worker_id, role), "a role")
        await play(len(changes) + 1, None)
        await asyncio.gather(*(session.close() for session in opened))


async def tells(cluster: Any, worker_id: str, role: Role) -> bool:
    workers = {w.heartbeat.worker_id: w for w in (await cluster.client.status()).workers}
    return bool(workers[worker_id].heartbeat.role == role and workers[worker_id].wanted_role is None)


@pytest.mark.parametrize("policy", ["adaptive", "ampd", "remote"])
async def test_workers_take_other_roles_under_load(
    policy: str, start_cluster: Any, planned_sessions: Any, play_session: Play
) -> None:
    """A decode worker becomes a prefill worker and comes back, a prefill worker becomes one that decodes."""
    cluster = await start_cluster(policy=policy, num_prefill=1, num_decode=2)
    before = await cluster.heartbeats()
    changes: list[tuple[str, Role]] = [("decode-0", "prefill"), ("prefill-0", "decode"), ("decode-0", "decode")]
    assert {worker_id for worker_id, _ in changes} < set(before)
    await play_between(cluster, planned_sessions, play_session, changes)
    counters = (await cluster.client.status()).counters
    assert counters["role_changes"] == 3
    assert "role_changes_given_up" not in counters
    assert "rounds_failed" not in counters
    assert counters["moves" if policy == "adaptive" else "rebinds"] > 0, "the sessions of decode-0 went elsewhere"
    await cluster.assert_everything_returned()
    after = await cluster.heartbeats()
    assert {w: b.incarnation for w, b in after.items()} == {w: b.incarnation for w, b in before.items()}, "no restart"
    assert {w: b.role for w, b in after.items()} == {"decode-0": "decode", "decode-1": "decode", "prefill-0": "decode"}


async def test_the_last_worker_that_decodes_stays_one(start_cluster: Any) -> None:
    cluster = await start_cluster(policy="ampd", num_prefill=1, num_decode=1)
    with pytest.raises(AmpdError) as refused:
        await cluster.client.change_role("decode-0", "prefill")
    assert refused.value.code == ErrorCode.NO_DECODE_WORKER
    await cluster.client.change_role("prefill-0", "both")
    await cluster.wait_until(lambda: tells(cluster, "prefill-0", "both"), "a role")
    assert (await cluster.client.change_role("decode-0", "prefill")).previous == "decode"
