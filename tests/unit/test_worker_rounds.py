"""Rounds on two workers: every token is that of `generate`, exactly the KV that is missing moves, nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from worker_pair import load_reference, start_pair

from shared import subjects
from shared.core.types import RoundKey, SessionKey
from shared.engine.model_files import resolve_model
from shared.errors import AmpdError, ErrorCode
from shared.messages import (
    Ack,
    CancelRun,
    Message,
    NeedTokens,
    PrefillTask,
    RemotePrefill,
    RunRoundAck,
    decode,
    unpack_token_ids,
)


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return resolve_model("tiny-random")


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Any:
    return load_reference(model_dir)


@pytest.fixture
async def cluster(model_dir: Path, tmp_path: Path) -> AsyncIterator[Any]:
    async with start_pair(model_dir, tmp_path) as pair:
        yield pair


async def test_local_then_remote_then_remote_equal_generate(cluster: Any, reference: Any) -> None:
    commander, prefiller, decoder = cluster
    conversation: list[int] = []
    for index, (remote, length) in enumerate([(None, 40), (prefiller, 21), (prefiller, 3)]):
        new = [(7 * index + 3 * i) % 500 + 4 for i in range(length)]
        message = commander.run_round(
            decoder, conversation, new, tokens_start=len(conversation), round_index=index, remote=remote
        )
        ack = await commander.start(decoder, message, conversation + new, remote)
        assert ack.num_cached_tokens == max(0, len(conversation) - 1)
        ended = await commander.end()
        assert ended.error is None, ended.error
        conversation += new
        output = unpack_token_ids(ended.output_token_ids)
        assert output == reference(conversation, 8)
        conversation += output
        assert ended.usage is not None
        layout = decoder.runner.layout
        cached = ack.num_cached_tokens
        expected = (cached, len(conversation) - 8 - cached) if remote else (0, 0)
        moved = (ended.usage.kv_bytes_read, ended.usage.kv_bytes_written)
        assert moved == tuple(n * layout.bytes_per_token for n in expected), "exactly what the receiver lacked"


async def test_kv_moved_is_bit_identical(cluster: Any) -> None:
    """What the decode worker holds after a remote prefill is, bit for bit, what the prefill worker computed."""
    commander, prefiller, decoder = cluster
    computed: dict[int, np.ndarray] = {}
    step = prefiller.runner.step

    def step_and_copy(items: Any) -> Any:
        tokens = step(items)
        for item in items:
            stop = item.start_position + len(item.token_ids)
            for position in range(item.start_position, stop):
                block, slot = item.block_table[position // 16], position % 16
                computed[position] = prefiller.runner.pool.tensor[block, :, :, slot].clone().numpy()
        return tokens

    prefiller.runner.step = step_and_copy
    new = list(range(30, 100))
    message = commander.run_round(decoder, [], new, remote=prefiller, max_output_tokens=1)
    await commander.start(decoder, message, new, prefiller)
    ended = await commander.end()
    assert ended.error is None
    kv = decoder.scheduler.sessions[SessionKey("t", "s")]
    assert sorted(computed) == list(range(70))
    for position, expected in computed.items():
        block, slot = kv.block_table[position // 16], position % 16
        held = decoder.runner.pool.tensor[block, :, :, slot].numpy()
        assert held.tobytes() == expected.tobytes(), f"position {position}"


async def test_repeated_and_stale_commands_run_nothing_twice(cluster: Any, reference: Any) -> None:
    commander, _, decoder = cluster
    new = list(range(50, 90))
    message = commander.run_round(decoder, [], new, attempt=2)
    await commander.start(decoder, message, new, None)
    repeated = await commander.command(decoder, message)
    assert isinstance(repeated, RunRoundAck)
    assert repeated.state in ("running", "finished")
    with pytest.raises(AmpdError) as caught:
        await commander.command(decoder, commander.run_round(decoder, [], new, attempt=1))
    assert caught.value.code is ErrorCode.STALE_ATTEMPT
    ended = await commander.end()
    assert unpack_token_ids(ended.output_token_ids) == reference(new, 8)
    assert commander.ended.empty()
    finished = await commander.command(decoder, message)
    assert isinstance(finished, RunRoundAck)
    assert (finished.state, unpack_token_ids(finished.output_token_ids)) == ("finished", reference(new, 8))
    assert await commander.end() == ended, "asked again, the worker tells the end again"
    assert commander.ended.empty()


async def test_tokens_the_worker_lacks_or_has_otherwise_are_asked_for(cluster: Any, reference: Any) -> None:
    commander, _, decoder = cluster
    history, new = list(range(10, 40)), [5, 6, 7]
    lacking = await commander.command(decoder, commander.run_round(decoder, history, new, tokens_start=30))
    assert lacking == NeedTokens(num_known_tokens=0)
    await commander.start(decoder, commander.run_round(decoder, history, new), history + new, None)
    first = unpack_token_ids((await commander.end()).output_token_ids)
    other = [9] * 30
    differing = await commander.command(
        decoder, commander.run_round(decoder, other, new, tokens_start=30, round_index=1)
    )
    assert differing == NeedTokens(num_known_tokens=0)
    await commander.start(decoder, commander.run_round(decoder, other, new, round_index=1), other + new, None)
    assert unpack_token_ids((await commander.end()).output_token_ids) == reference(other + new, 8) != first


async def test_a_new_attempt_resumes_from_the_forced_tokens(cluster: Any, reference: Any) -> None:
    commander, prefiller, decoder = cluster
    new = list(range(60, 130))
    expected = reference(new, 8)
    received: list[int] = []
    await commander.bus.subscribe_ordered(
        subjects.round_stream("t", "s", 0),
        lambda m: received.extend(unpack_token_ids(getattr(decode(m.data), "token_ids", b""))),
    )
    message = commander.run_round(decoder, [], new, attempt=2, forced=expected[:3], remote=prefiller)
    await commander.start(decoder, message, new + expected[:3], prefiller)
    ended = await commander.end()
    assert unpack_token_ids(ended.output_token_ids) == expected
    assert received == expected[3:], "what was delivered before is not streamed again"


@pytest.mark.parametrize("remote", [True, False])
async def test_cancel_rolls_back_whatever_runs(remote: bool, cluster: Any, reference: Any) -> None:
    commander, prefiller, decoder = cluster
    new = list(range(4, 300))
    helper = prefiller if remote else None
    await commander.start(
        decoder, commander.run_round(decoder, [], new, remote=helper, max_output_tokens=400), new, helper
    )
    for worker in (prefiller, decoder):
        await commander.command(worker, CancelRun(tenant="t", session="s", round=0, attempt=1))
    assert decoder.runtime.decode.num_active == 0
    assert decoder.scheduler.sessions[SessionKey("t", "s")].block_table == []
    with contextlib.suppress(asyncio.QueueEmpty):
        commander.ended.get_nowait()
    await commander.start(decoder, commander.run_round(decoder, [], [8, 9], round_index=1), [8, 9], None)
    assert unpack_token_ids((await commander.end()).output_token_ids) == reference([8, 9], 8)


async def test_a_foreign_ticket_moves_no_byte_and_the_round_fails_typed(cluster: Any) -> None:
    commander, prefiller, decoder = cluster
    new = list(range(4, 60))
    message = commander.run_round(decoder, [], new, remote=prefiller)
    assert message.remote is not None
    forged = RemotePrefill(
        worker_id=prefiller.id,
        incarnation=prefiller.incarnation,
        ticket=commander.ticket(RoundKey("t", "other", 0, 1), prefiller, decoder),
    )
    forged_message = msgspec.structs.replace(message, remote=forged)
    await commander.start(decoder, forged_message, new, prefiller)
    ended = await commander.end()
    assert ended.error is not None
    assert ended.output_token_ids == b""


async def test_cancel_while_a_refused_prefill_waits_for_its_step(cluster: Any, reference: Any) -> None:
    """The decode worker refuses the offer while the forward pass runs; the cancel comes before the pass has ended."""
    commander, prefiller, decoder = cluster
    in_step, go_on = asyncio.Event(), threading.Event()
    loop, step = asyncio.get_running_loop(), prefiller.runner.step

    def slow_step(items: Any) -> Any:
        loop.call_soon_threadsafe(in_step.set)
        go_on.wait(10)
        return step(items)

    prefiller.runner.step = slow_step
    message = commander.run_round(decoder, [], [5, 6, 7], remote=prefiller)
    task = PrefillTask(
        tenant="t",
        session="s",
        round=0,
        attempt=1,
        incarnation=prefiller.incarnation,
        num_cached_tokens=0,
        token_ids=message.token_ids,
        num_forced_tokens=0,
        sampling=message.sampling,
        slo=message.slo,
        waited_s=0.0,
        deadline_s=30.0,
        history=None,
        decode_worker=decoder.id,  # which knows nothing of this round
        decode_incarnation=decoder.incarnation,
    )
    refused = asyncio.Event()
    ask_peer = prefiller.runtime.context.ask_peer

    async def ask_and_tell(worker_id: str, peer_message: Any) -> Message:
        try:
            return await ask_peer(worker_id, peer_message)
        finally:
            refused.set()

    prefiller.runtime.context.ask_peer = ask_and_tell
    await commander.command(prefiller, task)
    await in_step.wait()
    await refused.wait()
    cancelling = asyncio.create_task(
        commander.command(prefiller, CancelRun(tenant="t", session="s", round=0, attempt=1))
    )
    for _ in range(20):  # let the cancel reach the job, which waits for the step
        await asyncio.sleep(0)
    go_on.set()
    assert isinstance(await cancelling, Ack)
    assert prefiller.runtime.prefill.num_active == 0
    prefiller.runner.step = step
    await commander.start(
        decoder, commander.run_round(decoder, [], [8, 9], round_index=1, remote=prefiller), [8, 9], prefiller
    )
    assert unpack_token_ids((await commander.end()).output_token_ids) == reference([8, 9], 8)


async def test_steps_are_full_while_prefills_wait(cluster: Any) -> None:
    """Enough of them are off the queue, however much of the first is computed already."""
    commander, prefiller, decoder = cluster
    runner = prefiller.runtime.context.engine.runner
    compute, may_go, begun = runner.step, threading.Semaphore(0), asyncio.Queue[int]()
    loop = asyncio.get_running_loop()

    def step(items: Any) -> Any:
        loop.call_soon_threadsafe(begun.put_nowait, sum(len(item.token_ids) for item in items))
        assert may_go.acquire(timeout=10)
        return compute(items)

    runner.step = step
    for index in range(12):  # 13 tokens each, where a step has 32
        new = [(5 * index + i) % 500 + 4 for i in range(13)]
        message = commander.run_round(decoder, [], new, remote=prefiller, session=f"s{index}", max_output_tokens=1)
        await commander.start(decoder, message, new, prefiller)
    sizes: list[int] = []
    while sum(sizes) < 12 * 13:
        sizes.append(await asyncio.wait_for(begun.get(), 10))
        for _ in range(100):  # whoever may leave the queue does
            await asyncio.sleep(0)
        may_go.release()
    for _ in range(12):
        assert (await commander.end()).error is None
    assert sum(sizes) == 12 * 13
    assert min(sizes[1:-1]) >= 32, "the first begins with whoever came first"
