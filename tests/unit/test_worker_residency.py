"""KV kept on prefill workers: it saves exactly its bytes, serves a decode worker that lost its own, is never believed
blindly, and gives way to running work. Every token is that of `generate`."""

from __future__ import annotations

import asyncio
import threading
import zlib
from array import array
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from worker_pair import Conversation, load_reference, start_pair

from services.worker.context import WorkerLimits
from shared.core.policies import find_policy, with_options
from shared.core.resident_key import resident_key
from shared.core.sequences import SessionKv
from shared.core.types import SessionKey
from shared.engine.model_files import resolve_model
from shared.errors import AmpdError, ErrorCode
from shared.messages import (
    Ack,
    CancelRun,
    GrantHistory,
    HistoryGranted,
    KvHeld,
    KvRenew,
    ResidentKv,
    pack_token_ids,
    unpack_token_ids,
)

SESSION = SessionKey("t", "s")


def tokens_of(seed: int, length: int) -> list[int]:
    return [(17 * seed + 7 * index) % 500 + 4 for index in range(length)]


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return resolve_model("tiny-random")


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Any:
    return load_reference(model_dir)


@pytest.fixture
async def pair(model_dir: Path, tmp_path: Path) -> AsyncIterator[Any]:
    async with start_pair(model_dir, tmp_path) as pair:
        yield pair


def assert_true_tokens(conversation: Conversation, ended: Any, reference: Any) -> None:
    output = unpack_token_ids(ended.output_token_ids)
    assert output == reference(conversation.tokens[: -len(output)], len(output))


async def prefill_ended(commander: Any) -> Any:
    return await asyncio.wait_for(commander.prefills.get(), 120)


async def test_the_second_remote_round_moves_exactly_what_is_missing(pair: Any, reference: Any) -> None:
    commander, prefiller, decoder = pair
    conversation = Conversation(commander, decoder)
    await conversation.play(tokens_of(1, 45), prefiller, keep=True)
    first = await prefill_ended(commander)
    assert (first.num_resident_tokens, first.num_reused_tokens, first.num_new_tokens) == (45, 0, 45)
    assert prefiller.runtime.heartbeat().num_resident_tokens == 45
    ended = await conversation.play(tokens_of(2, 20), prefiller, keep=True, resident=conversation.resident(45))
    assert_true_tokens(conversation, ended, reference)
    second = await prefill_ended(commander)
    assert conversation.num_cached == 45 + 8 - 1
    moved = prefiller.runner.layout.bytes_per_token
    assert ended.usage.kv_bytes_read == second.kv_bytes_read == (52 - 45) * moved
    assert ended.usage.kv_bytes_written == (73 - 52) * moved
    assert (second.num_resident_tokens, second.num_reused_tokens, second.num_new_tokens) == (73, 45, 21)


async def test_without_keep_nothing_stays(pair: Any) -> None:
    commander, prefiller, decoder = pair
    await Conversation(commander, decoder).play(tokens_of(1, 45), prefiller)
    assert (await prefill_ended(commander)).num_resident_tokens == 0
    assert prefiller.scheduler.sessions == {}


async def test_a_decode_worker_that_lost_its_kv_gets_it_back(pair: Any, reference: Any) -> None:
    """The second tier: only the new tokens are computed, all of the KV moves from here."""
    commander, prefiller, decoder = pair
    conversation = Conversation(commander, decoder)
    await conversation.play(tokens_of(3, 50), prefiller, keep=True)
    await prefill_ended(commander)
    decoder.scheduler.truncate(decoder.scheduler.sessions[SESSION], 16)
    ended = await conversation.play(tokens_of(4, 10), prefiller, keep=True, resident=conversation.resident(50))
    assert_true_tokens(conversation, ended, reference)
    report = await prefill_ended(commander)
    assert conversation.num_cached == 16
    assert (report.num_reused_tokens, report.num_new_tokens, report.kv_bytes_read) == (50, 18, 0)
    assert ended.usage.kv_bytes_written == (68 - 16) * prefiller.runner.layout.bytes_per_token


@pytest.mark.parametrize("lost", [0, 24])
async def test_a_resident_that_lost_its_tail_is_still_a_prefix(pair: Any, reference: Any, lost: int) -> None:
    commander, prefiller, decoder = pair
    conversation = Conversation(commander, decoder)
    await conversation.play(tokens_of(5, 60), prefiller, keep=True)
    await prefill_ended(commander)
    prefiller.scheduler.truncate(prefiller.scheduler.sessions[resident_key(SESSION)], lost)
    ended = await conversation.play(tokens_of(6, 9), prefiller, keep=True, resident=conversation.resident(60))
    assert_true_tokens(conversation, ended, reference)
    report = await prefill_ended(commander)
    assert report.num_reused_tokens == lost
    assert report.kv_bytes_read == (67 - lost) * prefiller.runner.layout.bytes_per_token


async def test_a_claim_of_other_tokens_is_not_believed(pair: Any, reference: Any) -> None:
    """The worker holds KV of one conversation, the claim is of another: everything is pulled."""
    commander, prefiller, decoder = pair
    conversation = Conversation(commander, decoder)
    await conversation.play(tokens_of(7, 40), prefiller, keep=True)
    await prefill_ended(commander)
    kept = prefiller.scheduler.sessions[resident_key(SESSION)]
    kept.tokens[3] += 1  # as if it had prefilled another prompt
    ended = await conversation.play(tokens_of(8, 9), prefiller, keep=True, resident=conversation.resident(40))
    assert_true_tokens(conversation, ended, reference)
    report = await prefill_ended(commander)
    assert report.num_reused_tokens == 0
    assert report.kv_bytes_read == 47 * prefiller.runner.layout.bytes_per_token


async def test_a_wrong_claim_gives_no_wrong_token(pair: Any, reference: Any) -> None:
    commander, prefiller, decoder = pair
    conversation = Conversation(commander, decoder)
    await conversation.play(tokens_of(9, 40), prefiller, keep=True)
    await prefill_ended(commander)
    wrong = ResidentKv(num_tokens=40, checksum=zlib.crc32(b"other"))
    ended = await conversation.play(tokens_of(10, 9), prefiller, resident=wrong)
    assert_true_tokens(conversation, ended, reference)
    assert (await prefill_ended(commander)).num_reused_tokens == 0


async def test_the_same_prompt_again_computes_one_token(pair: Any, reference: Any) -> None:
    """A new attempt after the decode worker forgot the session: all KV comes from here, the logits need one token."""
    commander, prefiller, decoder = pair
    prompt = tokens_of(11, 48)
    await Conversation(commander, decoder).play(prompt, prefiller, keep=True)
    await prefill_ended(commander)
    for worker in (prefiller, decoder):
        await commander.command(worker, CancelRun(tenant="t", session="s", round=0, attempt=1))
    decoder.scheduler.truncate(decoder.scheduler.sessions[SESSION], 0)
    message = commander.run_round(decoder, [], prompt, attempt=2, remote=prefiller)
    await commander.start(decoder, message, prompt, prefiller, keep=True)
    ended = await commander.end()
    assert unpack_token_ids(ended.output_token_ids) == reference(prompt, 8)
    report = await prefill_ended(commander)
    assert (report.num_reused_tokens, report.num_new_tokens) == (47, 1)


async def test_a_prefill_whose_history_is_nowhere_fails_so_that_it_is_tried_again(pair: Any) -> None:
    commander, prefiller, decoder = pair
    conversation = Conversation(commander, decoder)
    await conversation.play(tokens_of(12, 30))
    prompt = conversation.tokens + tokens_of(13, 5)
    message = commander.run_round(decoder, conversation.tokens, prompt[-5:], round_index=1, remote=prefiller)
    ack = await commander.command(decoder, message)
    task = commander.prefill_task(decoder, message, prompt, prefiller, ack, history=None)
    with pytest.raises(AmpdError) as caught:
        await commander.command(prefiller, task)
    assert caught.value.code is ErrorCode.KV_LEASE_INVALID
    await commander.command(decoder, CancelRun(tenant="t", session="s", round=1, attempt=1))
    await conversation.play(tokens_of(14, 30), prefiller, keep=True)
    await prefill_ended(commander)
    prefiller.scheduler.truncate(prefiller.scheduler.sessions[resident_key(SESSION)], 16)
    prompt = conversation.tokens + tokens_of(13, 5)
    message = commander.run_round(decoder, conversation.tokens, prompt[-5:], round_index=2, remote=prefiller)
    ack = await commander.command(decoder, message)
    task = commander.prefill_task(decoder, message, prompt, prefiller, ack, history=None, keep=True)
    assert isinstance(await commander.command(prefiller, task), Ack)
    report = await prefill_ended(commander)
    assert report.error is not None
    assert report.error.code is ErrorCode.KV_LEASE_INVALID
    await commander.command(decoder, CancelRun(tenant="t", session="s", round=2, attempt=1))


async def test_evicted_residents_are_told_in_a_heartbeat_once(pair: Any) -> None:
    commander, prefiller, decoder = pair
    conversation = Conversation(commander, decoder)
    await conversation.play(tokens_of(15, 40), prefiller, keep=True)
    await prefill_ended(commander)
    prefiller.scheduler.truncate(prefiller.scheduler.sessions[resident_key(SESSION)], 0)
    assert prefiller.runtime.heartbeat().kv_held == (KvHeld(tenant="t", session="s", num_device_tokens=0),)
    assert prefiller.runtime.heartbeat().kv_held == ()
    assert prefiller.scheduler.sessions == {}


# ------------------------------------------------------------------------------------- staging


async def test_after_staging_a_prefill_pulls_nothing(pair: Any, reference: Any) -> None:
    commander, prefiller, decoder = pair
    conversation = Conversation(commander, decoder)
    await conversation.play(tokens_of(20, 45), prefiller, keep=True)
    await prefill_ended(commander)
    await conversation.stage(prefiller, conversation.resident(45))
    staged = await asyncio.wait_for(commander.staged.get(), 120)
    assert staged.error is None
    assert (staged.num_resident_tokens, staged.kv_bytes_read) == (52, 7 * prefiller.runner.layout.bytes_per_token)
    ended = await conversation.play(tokens_of(21, 20), prefiller, keep=True, resident=conversation.resident(52))
    assert_true_tokens(conversation, ended, reference)
    report = await prefill_ended(commander)
    assert (report.kv_bytes_read, report.num_reused_tokens) == (0, 52)


async def test_staging_what_was_never_here_takes_free_blocks_only(pair: Any, reference: Any) -> None:
    commander, prefiller, decoder = pair
    conversation = Conversation(commander, decoder)
    await conversation.play(tokens_of(22, 45))
    await conversation.stage(prefiller, None)
    staged = await asyncio.wait_for(commander.staged.get(), 120)
    assert (staged.num_resident_tokens, staged.error) == (52, None)
    other = Conversation(commander, decoder, "other")
    await other.play(tokens_of(23, 45))
    free = prefiller.scheduler.allocator.num_free
    blocker = prefiller.scheduler.allocator.allocate(free - 1, "test")
    await other.stage(prefiller, None)
    staged = await asyncio.wait_for(commander.staged.get(), 120)
    assert staged.error is not None
    assert (staged.error.code, staged.num_resident_tokens) == (ErrorCode.OUT_OF_BLOCKS, 0)
    assert prefiller.runtime.prefill.residents.num_tokens == 52, "the other session kept what it has"
    prefiller.scheduler.allocator.free(blocker, "test")
    ended = await conversation.play(tokens_of(24, 5), prefiller, resident=conversation.resident(52))
    assert_true_tokens(conversation, ended, reference)


async def test_a_prefill_takes_over_from_a_staging_under_way(pair: Any, reference: Any) -> None:
    """The staging's pull is held up until the prefill is there: it goes on from what the staging brings."""
    commander, prefiller, decoder = pair
    conversation = Conversation(commander, decoder)
    await conversation.play(tokens_of(25, 45), prefiller, keep=True)
    await prefill_ended(commander)
    reading, go_on = asyncio.Event(), threading.Event()
    loop, pool = asyncio.get_running_loop(), decoder.runner.pool
    segment_views = pool.segment_views

    def held_up(*arguments: Any) -> Any:
        loop.call_soon_threadsafe(reading.set)
        go_on.wait(10)
        return segment_views(*arguments)

    pool.segment_views = held_up
    await conversation.stage(prefiller, conversation.resident(45))
    await asyncio.wait_for(reading.wait(), 10)
    playing = asyncio.create_task(
        conversation.play(tokens_of(26, 20), prefiller, keep=True, resident=conversation.resident(45))
    )
    while not prefiller.runtime.prefill.num_active:  # noqa: ASYNC110 - the command is on its way
        await asyncio.sleep(0)
    assert not playing.done()
    go_on.set()
    ended = await playing
    assert_true_tokens(conversation, ended, reference)
    report = await prefill_ended(commander)
    staged = await asyncio.wait_for(commander.staged.get(), 120)
    assert (staged.num_resident_tokens, report.num_reused_tokens, report.kv_bytes_read) == (52, 52, 0)


async def test_a_granted_lease_ends_before_its_blocks_are_used_again(pair: Any) -> None:
    commander, prefiller, decoder = pair
    conversation = Conversation(commander, decoder)
    with pytest.raises(AmpdError):
        await conversation.stage(prefiller, None)  # nothing is held yet
    await conversation.play(tokens_of(27, 45))
    grant = GrantHistory(tenant="t", session="s", incarnation=decoder.incarnation, num_tokens=1000)
    first = await commander.command(decoder, grant)
    granted = await commander.command(decoder, grant)
    assert isinstance(granted, HistoryGranted)
    assert granted.num_tokens == 52
    leases = decoder.runtime.context.leases
    assert len(leases) == 1, "the first one has ended"
    assert first.history.generation != granted.history.generation
    kv = decoder.scheduler.sessions[SESSION]
    decoder.scheduler.truncate(kv, 52)
    assert len(leases) == 1, "nothing that is leased was given up"
    assert decoder.scheduler.reserve(decoder.scheduler.sessions[SESSION], 52)
    filler = decoder.scheduler.sessions.setdefault(resident_key(SESSION), SessionKv(SESSION))
    assert decoder.scheduler.reserve(filler, 16 * 198), "an idle session gives way although it is leased"
    assert len(leases) == 0
    renew = KvRenew(lease_id=granted.history.lease_id, generation=granted.history.generation)
    with pytest.raises(AmpdError) as caught:
        await decoder.runtime.peer(renew)
    assert caught.value.code is ErrorCode.KV_LEASE_INVALID
    decoder.scheduler.drop(resident_key(SESSION))


# ------------------------------------------------------------------------------- several at once


async def test_prefills_are_computed_together(pair: Any, reference: Any) -> None:
    commander, prefiller, decoder = pair
    conversations = [Conversation(commander, decoder, f"s{index}") for index in range(6)]
    widths: list[int] = []
    step = prefiller.runner.step

    def counted(items: Any) -> Any:
        widths.append(len({item.block_table[0] for item in items}))
        return step(items)

    prefiller.runner.step = counted
    prompts = [tokens_of(30 + index, 9 + 3 * index) for index in range(6)]
    messages = [
        commander.run_round(decoder, [], prompt, remote=prefiller, session=one.session)
        for one, prompt in zip(conversations, prompts, strict=True)
    ]
    acks = [await commander.command(decoder, message) for message in messages]
    tasks = [
        commander.prefill_task(decoder, message, prompt, prefiller, ack, keep=True)
        for message, prompt, ack in zip(messages, prompts, acks, strict=True)
    ]
    await asyncio.gather(*(commander.command(prefiller, task) for task in tasks))
    ended = {}
    for _ in tasks:
        one = await commander.end()
        ended[one.session] = unpack_token_ids(one.output_token_ids)
    assert ended == {f"s{index}": reference(prompt, 8) for index, prompt in enumerate(prompts)}
    assert max(widths) > 1, "never two prefills in a step"
    assert len(prefiller.runtime.prefill.residents) == 6


async def test_as_many_residents_as_allowed(model_dir: Path, tmp_path: Path) -> None:
    limits = WorkerLimits(lease_ttl_s=5.0, max_residents=2)
    async with start_pair(model_dir, tmp_path, limits=limits) as (commander, prefiller, decoder):
        for index in range(3):
            await Conversation(commander, decoder, f"s{index}").play(tokens_of(index, 20), prefiller, keep=True)
            await prefill_ended(commander)
        assert len(prefiller.runtime.prefill.residents) == 2
        assert prefiller.runtime.heartbeat().kv_held == (KvHeld(tenant="t", session="s0", num_device_tokens=0),)


def test_checksums_are_of_packed_tokens() -> None:
    """What `ResidentKv` says and what a worker computes are the same number."""
    tokens = tokens_of(1, 33)
    kv = SessionKv(SESSION, tokens=array("i", tokens[20:]), tokens_base=20)
    kv.checksum = zlib.crc32(pack_token_ids(tokens[:20]))
    for num_tokens in (20, 21, 33):
        assert kv.identify(num_tokens) == (num_tokens, zlib.crc32(pack_token_ids(tokens[:num_tokens])))
    assert kv.identify(5)[0] == 20, "less than that is not known"
    assert kv.identify(40)[0] == 33


async def test_a_workers_statistics_cover_the_policys_window(model_dir: Path, tmp_path: Path) -> None:
    policy = with_options(find_policy("ampd"), {"window_s": 3.0})
    async with start_pair(model_dir, tmp_path, policy=policy) as (_, prefiller, decoder):
        for worker in (prefiller, decoder):
            context = worker.runtime.context
            assert context.ttft.stats(0.0).window_s == context.itl.stats(0.0).window_s == 3.0
