"""Re-planning of a live, emulated cluster: traffic shifts to long outputs, and workers change role while rounds run.
Nothing is lost, no token changes, and a planner that is killed goes on from what it finds."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from shared.engine.emulated import choose_token
from shared.engine.step import StepItem
from shared.messages import ReplanMode, Role, SamplingParams, Slo, StopConditions
from shared.profile_files import load_profile

PROFILE = load_profile("h100-qwen3-32b")
TIME_SCALE = 10.0
SLO = Slo(ttft_s=3.0 * TIME_SCALE, itl_s=0.018 * TIME_SCALE)
SHORT, LONG = (3_000, 2), (300, 24)  # input of the first round, outputs of every one
NUM_ROUNDS, NEXT_INPUT = 3, 50
GAP_S = 0.06  # between sessions of the long kind: about twice what one worker decodes in time
NUM_LONG = 200
PLANNER = ("--interval=1", "--replan-hold=1", "--replan-settle=2", "--replan-window=8")


def new_tokens(session: int, index: int, num_tokens: int) -> list[int]:
    return [(7919 * session + 104_729 * index + 31 * i) % 100_000 + 10 for i in range(num_tokens)]


def expected_tokens(last: int, position: int, num_output: int) -> list[int]:
    """What any emulated worker answers to a conversation that ends with `last` at `position`."""
    tokens: list[int] = []
    for index in range(num_output):
        item = StepItem([last], position + index, [], SamplingParams(), index)
        last = choose_token(item, PROFILE.vocab_size)
        tokens.append(last)
    return tokens


async def play(cluster: Any, number: int, num_input: int, num_output: int) -> int:
    """A session's rounds, each compared with what must come; how many ended."""
    history = 0
    async with await cluster.client.open_session(f"s{number}", slo=SLO) as session:
        for index in range(NUM_ROUNDS):
            new = new_tokens(number, index, NEXT_INPUT if index else num_input)
            history += len(new)
            stop = StopConditions(max_output_tokens=num_output, ignore_eos=True)
            result = await (await session.submit(new, stop=stop)).result()
            assert list(result.token_ids) == expected_tokens(new[-1], history - 1, num_output), f"{number}, {index}"
            history += num_output
    return NUM_ROUNDS


@pytest.fixture
def start_replanned(start_cluster: Any) -> Callable[[ReplanMode], Awaitable[Any]]:
    async def start(mode: ReplanMode) -> Any:
        return await start_cluster(
            engine="emulated", profile=PROFILE.name, time_scale=TIME_SCALE, parallel_degree=2, policy="adaptive",
            num_prefill=3, num_decode=0, num_both=1, replan=mode, planner_arguments=PLANNER,
        )  # fmt: skip

    return start


async def count_roles(cluster: Any) -> dict[Role, int]:
    roles = [beat.role for beat in (await cluster.heartbeats()).values()]
    return {role: roles.count(role) for role in ("prefill", "both")}


@pytest.mark.timeout(120)
async def test_workers_take_the_roles_that_a_shifted_load_needs(start_replanned: Any) -> None:
    """The planner is killed when the load has shifted: serving goes on, and its successor changes the roles."""
    cluster = await start_replanned("act")
    before = await cluster.heartbeats()
    numbers = itertools.count()
    assert sum(await asyncio.gather(*(play(cluster, next(numbers), *SHORT) for _ in range(10)))) == 10 * NUM_ROUNDS
    assert await count_roles(cluster) == {"prefill": 3, "both": 1}, "the first load suits the roles"

    playing = []
    for index in range(NUM_LONG):
        playing.append(asyncio.create_task(play(cluster, next(numbers), *LONG)))
        if index == 20:
            os.kill(cluster.local.services["planner"].pid, signal.SIGKILL)
        await asyncio.sleep(GAP_S)
    assert sum(await asyncio.gather(*playing)) == NUM_LONG * NUM_ROUNDS, "no round is lost"

    state = await cluster.client.replan()
    assert state.num_changed >= 1, state
    assert (await count_roles(cluster))["both"] == 1 + state.num_changed
    after = await cluster.heartbeats()
    assert {w: b.incarnation for w, b in after.items()} == {w: b.incarnation for w, b in before.items()}, "no restart"
    counters = (await cluster.client.status()).counters
    assert counters["role_changes"] == state.num_changed
    assert "rounds_failed" not in counters
    assert any("planner is started again" in report for report in cluster.reports)
    await cluster.assert_everything_returned()


@pytest.mark.timeout(120)
async def test_dry_run_proposes_and_changes_nothing(start_replanned: Any) -> None:
    cluster = await start_replanned("dry-run")
    proposals: list[str] = []

    async def listen() -> None:
        while True:
            state = await cluster.client.replan()
            proposals.extend(change.worker_id for change in state.changes if change.outcome is None)
            await asyncio.sleep(0.3)

    listening = asyncio.create_task(listen())
    playing = []
    for number in range(NUM_LONG // 2):
        playing.append(asyncio.create_task(play(cluster, number, *LONG)))
        await asyncio.sleep(GAP_S)
    await asyncio.gather(*playing)
    listening.cancel()
    assert proposals, await cluster.client.replan()
    assert set(proposals) <= {"prefill-0", "prefill-1", "prefill-2"}
    assert await count_roles(cluster) == {"prefill": 3, "both": 1}
    assert "role_changes" not in (await cluster.client.status()).counters
