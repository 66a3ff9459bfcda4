"""Processes that die: sessions go on, with the same tokens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import Any

import pytest

from shared.errors import AmpdError, ErrorCode
from shared.messages import StopConditions


def kill(process: Any) -> int:
    """kill -9, proven: the pid is gone (or another's) when the process object says so."""
    pid: int = process.pid
    os.kill(pid, signal.SIGKILL)
    return pid


async def wait_gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return
            await asyncio.sleep(0.02)


async def test_coordinator_killed_between_rounds(start_cluster: Any, planned_sessions: Any, play_session: Any) -> None:
    cluster = await start_cluster(policy="remote")
    sessions = [await cluster.client.open_session() for _ in range(3)]
    for session, planned in zip(sessions, planned_sessions, strict=False):
        await play_session(session, planned, 0, 2)
    await wait_gone(kill(cluster.local.services["coordinator"]))
    for session, planned in zip(sessions, planned_sessions, strict=False):
        await play_session(session, planned, 2)
        await session.close()
    await cluster.assert_everything_returned()


async def test_coordinator_killed_in_the_middle_of_rounds(
    start_cluster: Any, planned_sessions: Any, play_session: Any, reference: Any
) -> None:
    cluster = await start_cluster(policy="ampd")
    prompts = [list(planned.rounds[0][0]) for planned in planned_sessions[:4]]
    sessions = [await cluster.client.open_session() for _ in prompts]
    streams = [
        await session.submit(prompt, stop=StopConditions(max_output_tokens=300, ignore_eos=True))
        for session, prompt in zip(sessions, prompts, strict=True)
    ]
    await anext(aiter(streams[0]))  # the first token is there: the rounds are running
    await wait_gone(kill(cluster.local.services["coordinator"]))
    for session, prompt, stream in zip(sessions, prompts, streams, strict=True):
        result = await stream.result()
        expected = reference.generate(prompt, 300)
        assert list(result.token_ids) == expected
        follow = await session.submit([9, 8, 7], stop=StopConditions(max_output_tokens=5, ignore_eos=True))
        assert list((await follow.result()).token_ids) == reference.generate([*prompt, *expected, 9, 8, 7], 5)
        await session.close()
    await cluster.assert_everything_returned()


@pytest.mark.parametrize("moment", ["decoding", "idle"])
async def test_decode_worker_killed(moment: str, start_cluster: Any, planned_sessions: Any, reference: Any) -> None:
    """The session is built again from its tokens on the other decode worker; no token is lost or repeated."""
    cluster = await start_cluster(policy="remote", num_decode=2)
    prompt = list(planned_sessions[0].rounds[0][0])
    async with await cluster.client.open_session() as session:
        stream = await session.submit(prompt, stop=StopConditions(max_output_tokens=200, ignore_eos=True))
        await anext(aiter(stream))
        if moment == "idle":
            await stream.result()
        worker = (await session.inspect()).decode_worker
        await wait_gone(kill(cluster.local.workers[worker]))
        expected = reference.generate(prompt, 200)
        assert list((await stream.result()).token_ids) == expected
        follow = await session.submit([5, 6, 7], stop=StopConditions(max_output_tokens=8, ignore_eos=True))
        result = await follow.result()
        assert list(result.token_ids) == reference.generate([*prompt, *expected, 5, 6, 7], 8)
        assert result.usage.decode_worker != worker
    await cluster.assert_everything_returned()


async def test_the_only_prefill_worker_killed_and_another_joins(
    start_cluster: Any, planned_sessions: Any, play_session: Any
) -> None:
    """Rounds then run locally; when a prefill worker joins, remotely again."""
    cluster = await start_cluster(policy="remote")
    planned = planned_sessions[0]
    async with await cluster.client.open_session() as session:
        assert await play_session(session, planned, 0, 1) == ["remote"]
        prefill = cluster.local.workers["prefill-0"]
        await wait_gone(kill(prefill))
        assert await play_session(session, planned, 1, 2) == ["local"]
        with contextlib.suppress(ProcessLookupError):
            await prefill.start()

        async def joined() -> bool:
            return "prefill-0" in await cluster.heartbeats()

        await cluster.wait_until(joined, "the new prefill worker was to join")
        assert await play_session(session, planned, 2, 3) == ["remote"]
    await cluster.assert_everything_returned()


async def test_planner_killed_serving_goes_on(start_cluster: Any, planned_sessions: Any, play_session: Any) -> None:
    cluster = await start_cluster(policy="ampd")
    async with await cluster.client.open_session() as session:
        await play_session(session, planned_sessions[0], 0, 1)
        await wait_gone(kill(cluster.local.services["planner"]))
        await play_session(session, planned_sessions[0], 1, 2)
        await cluster.client.planner_stats(timeout_s=60)  # it was started again
        await play_session(session, planned_sessions[0], 2, 3)

    async def counts_again() -> bool:
        return (await cluster.client.planner_stats()).num_rounds >= 1

    await cluster.wait_until(counts_again, "the new planner was to count rounds")
    await cluster.assert_everything_returned()


async def test_no_decode_worker_is_said_at_once(start_cluster: Any) -> None:
    cluster = await start_cluster(num_decode=0)
    with pytest.raises(AmpdError) as caught:
        await cluster.client.open_session()
    assert caught.value.code is ErrorCode.NO_DECODE_WORKER
    assert caught.value.retry_after_s is not None
