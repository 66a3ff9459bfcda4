"""Clusters of emulated workers: real services, bus and sockets, durations from a profile, no model anywhere."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from shared.core.step_costs import StepCosts
from shared.errors import AmpdError, ErrorCode
from shared.messages import ChatMessage, StopConditions, Usage
from shared.profile_files import load_profile

TIME_SCALE = 2.0
DEGREE = 2
PROFILE = load_profile("h100-qwen3-32b")


@pytest.fixture
def emulated() -> dict[str, Any]:
    """Options of a cluster that keeps PROFILE's time, twice as slowly."""
    return {
        "engine": "emulated",
        "profile": PROFILE.name,
        "time_scale": TIME_SCALE,
        "parallel_degree": DEGREE,
        "policy": "ampd",
    }


def new_tokens(session: int, round_index: int, num_tokens: int) -> list[int]:
    return [(7919 * session + 104_729 * round_index + 31 * i) % 100_000 + 10 for i in range(num_tokens)]


def has_loaded(library: str, pid: int) -> bool:
    return library in Path(f"/proc/{pid}/maps").read_text()


async def play(cluster: Any, session: int, rounds: list[tuple[int, int]]) -> list[Usage]:
    """Rounds of (input tokens, output tokens), one after the other; the usage of each."""
    usages = []
    async with await cluster.client.open_session(f"s{session}") as opened:
        for index, (num_input, num_output) in enumerate(rounds):
            stream = await opened.submit(
                new_tokens(session, index, num_input), stop=StopConditions(max_output_tokens=num_output)
            )
            result = await stream.result()
            assert (len(result.token_ids), result.finish_reason, result.text) == (num_output, "length", "")
            assert len(set(result.token_ids)) > 1
            usages.append(result.usage)
    return usages


async def test_rounds_end_with_the_tokens_asked_for_and_take_the_profiles_time(
    start_cluster: Any, emulated: dict[str, Any]
) -> None:
    cluster = await start_cluster(**emulated, num_prefill=1, num_decode=2)
    costs, kv_bytes = StepCosts.from_profile(PROFILE, DEGREE), PROFILE.kv_bytes_per_token
    rounds = [(3000, 12), (500, 20), (1, 5)]
    played = await asyncio.gather(*(play(cluster, session, rounds) for session in range(4)))
    for usages in played:
        history = 0
        for (num_input, num_output), usage in zip(rounds, usages, strict=True):
            moved = (usage.kv_bytes_read, usage.kv_bytes_written)
            num_cached, num_new = usage.num_cached_tokens, history + num_input - usage.num_cached_tokens
            if usage.prefill == "remote":
                assert moved == (num_cached * kv_bytes, num_new * kv_bytes)
            else:
                assert moved == (0, 0)
            # nothing can be faster than the profile, less what a step may catch up; slower it may be here
            alone_s = (num_output - 1) * costs.decode_step_s(1, history + num_input)
            assert usage.decode_s >= 0.85 * TIME_SCALE * alone_s
            assert usage.prefill_s >= 0.85 * TIME_SCALE * costs.prefill_s(num_cached, num_new)
            history += num_input + num_output
    assert any(usage.prefill == "remote" for usages in played for usage in usages)
    beats = await cluster.heartbeats()
    assert {beat.model for beat in beats.values()} == {PROFILE.name}
    assert {beat.kv_bytes_per_token for beat in beats.values()} == {kv_bytes}
    assert {beat.num_blocks * beat.block_size for beat in beats.values()} == {costs.num_kv_tokens // 16 * 16}
    await cluster.assert_everything_returned()
    for process in (*cluster.local.workers.values(), *cluster.local.services.values()):
        assert not has_loaded("libtorch", process.pid), process.name
    async with await cluster.client.open_session("text") as session:
        for new_input in ("some text", [ChatMessage(role="user", content="some text")]):
            with pytest.raises(AmpdError) as caught:
                await (await session.submit(new_input)).result()
            assert caught.value.code is ErrorCode.TEXT_UNAVAILABLE
        with pytest.raises(AmpdError) as caught:
            await (await session.submit([5, 6], stop=StopConditions(stop=("END",)))).result()
        assert caught.value.code is ErrorCode.TEXT_UNAVAILABLE


@pytest.mark.timeout(90)
async def test_sixteen_workers_serve_sixteen_sessions(start_cluster: Any, emulated: dict[str, Any]) -> None:
    """Four that prefill, eight that decode, four that do both."""
    cluster = await start_cluster(**emulated, num_prefill=4, num_decode=8, num_both=4)
    beats = await cluster.heartbeats()
    assert sorted(beat.role for beat in beats.values()) == ["both"] * 4 + ["decode"] * 8 + ["prefill"] * 4
    played = await asyncio.gather(*(play(cluster, session, [(2000, 8), (300, 8)]) for session in range(16)))
    assert {len(usages) for usages in played} == {2}
    decoders = {usage.decode_worker for usages in played for usage in usages}
    assert len(decoders) == 12, "sessions are spread over every worker that decodes"
    await cluster.assert_everything_returned()


async def test_a_cluster_of_workers_for_both_needs_no_other(start_cluster: Any, emulated: dict[str, Any]) -> None:
    cluster = await start_cluster(**emulated, num_prefill=0, num_decode=0, num_both=2)
    played = await asyncio.gather(*(play(cluster, session, [(600, 4), (50, 4)]) for session in range(4)))
    assert {usage.num_output_tokens for usages in played for usage in usages} == {4}
    await cluster.assert_everything_returned()
