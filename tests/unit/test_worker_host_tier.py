"""Evicted KV in host memory: it comes back before the next round, bit for bit, and never for other tokens."""

from __future__ import annotations

import asyncio
import threading
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_pair import Conversation, load_reference, start_pair

from shared.core.batching import Scheduler
from shared.core.kv_blocks import BlockAllocator
from shared.core.policies import find_policy, with_options
from shared.core.resident_key import resident_key
from shared.core.sequences import SessionKv
from shared.core.types import KvLayout, SessionKey
from shared.engine.host_tier import HostTier
from shared.engine.model_files import resolve_model
from shared.messages import CancelRun, KvHeld, unpack_token_ids
from shared.transport.memory import HostKvMemory

BLOCK = 4
TIERED = with_options(find_policy("local"), {"host_tier": True})


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return resolve_model("tiny-random")


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Any:
    return load_reference(model_dir)


def tokens_of(seed: int, length: int) -> list[int]:
    return [(17 * seed + 7 * index) % 500 + 4 for index in range(length)]


async def play_true(conversation: Conversation, reference: Any, new: list[int], *args: Any, **kwargs: Any) -> Any:
    ended = await conversation.play(new, *args, **kwargs)
    output = unpack_token_ids(ended.output_token_ids)
    assert output == reference(conversation.tokens[: -len(output)], len(output))
    return ended


@pytest.mark.parametrize("host_kv_bytes", [1 << 30, 40_000, 0], ids=["roomy", "small", "none"])
async def test_sessions_that_take_turns(host_kv_bytes: int, model_dir: Path, tmp_path: Path, reference: Any) -> None:
    """Three sessions in memory for one and a half: with a host tier their KV is there again, whatever was evicted."""
    async with start_pair(model_dir, tmp_path, policy=TIERED, num_blocks=22, host_kv_bytes=host_kv_bytes) as pair:
        commander, _, decoder = pair
        conversations = [Conversation(commander, decoder, f"s{index}") for index in range(3)]
        tier = decoder.runtime.context.engine.host_tier
        for turn in range(3):
            for seed, conversation in enumerate(conversations):
                await play_true(conversation, reference, tokens_of(10 * turn + seed, 150 if turn == 0 else 15))
                decoder.runtime.check_integrity()
                if turn > 0 and host_kv_bytes == 1 << 30:
                    assert conversation.num_cached == len(conversation.tokens) - 15 - 8 - 1, "nothing computed again"
        assert decoder.scheduler.memory.num_evictions > 0
        if host_kv_bytes == 0:
            assert tier is None
            return
        assert tier is not None
        assert tier.num_restored_tokens > 0
        assert decoder.runtime.heartbeat().num_host_tokens == tier.num_tokens > 0


@pytest.mark.parametrize("order", ["fcfs", "moore_hodgson"])
async def test_rounds_that_take_each_others_room(order: str, model_dir: Path, tmp_path: Path, reference: Any) -> None:
    """Five rounds at once in memory for two: those preempted go to host memory and on from there, token for token."""
    policy = with_options(TIERED, {"order.order": order})
    async with start_pair(model_dir, tmp_path, policy=policy, num_blocks=30, host_kv_bytes=1 << 30) as pair:
        commander, _, decoder = pair
        prompts = {f"s{index}": tokens_of(40 + index, 50 + 10 * index) for index in range(5)}
        for session, prompt in prompts.items():
            message = commander.run_round(decoder, [], prompt, session=session, max_output_tokens=120)
            await commander.command(decoder, message)
        num_preemptions = 0
        for _ in prompts:
            ended = await commander.end()
            decoder.runtime.check_integrity()
            assert unpack_token_ids(ended.output_token_ids) == reference(prompts[ended.session], 120)
            num_preemptions += ended.usage.num_preemptions
        tier = decoder.runtime.context.engine.host_tier
        assert num_preemptions == decoder.scheduler.preemption.num_preemptions > 0
        assert tier.num_restored_tokens > 0


async def test_a_round_that_is_stopped_while_its_kv_comes_back(model_dir: Path, tmp_path: Path, reference: Any) -> None:
    """Stopping waits until nobody writes to its blocks; the next round goes on from what is left."""
    async with start_pair(model_dir, tmp_path, policy=TIERED, host_kv_bytes=1 << 30) as (commander, _, decoder):
        conversation = Conversation(commander, decoder)
        await play_true(conversation, reference, tokens_of(1, 100))
        scheduler, engine = decoder.scheduler, decoder.runtime.context.engine
        filler = scheduler.sessions[SessionKey("t", "filler")] = SessionKv(SessionKey("t", "filler"))
        assert scheduler.reserve(filler, 16 * 199)
        scheduler.drop(SessionKey("t", "filler"))
        reading, go_on = asyncio.Event(), threading.Event()
        loop, read = asyncio.get_running_loop(), engine.host_tier.read

        def held_up(*arguments: Any) -> None:
            loop.call_soon_threadsafe(reading.set)
            go_on.wait(10)
            read(*arguments)

        engine.host_tier.read = held_up
        new = tokens_of(2, 10)
        message = commander.run_round(decoder, conversation.tokens, new, tokens_start=108, round_index=1)
        ack = await commander.command(decoder, message)
        assert ack.num_cached_tokens == 107, "about to be brought back"
        await asyncio.wait_for(reading.wait(), 10)
        cancelling = asyncio.create_task(
            commander.command(decoder, CancelRun(tenant="t", session="s", round=1, attempt=1))
        )
        await asyncio.sleep(0.01)
        assert not cancelling.done()
        go_on.set()
        await cancelling
        decoder.runtime.check_integrity()
        conversation.index = 2
        await play_true(conversation, reference, tokens_of(3, 10))
        assert conversation.num_cached >= 107


async def test_restored_kv_is_bit_identical_and_partial(model_dir: Path, tmp_path: Path, reference: Any) -> None:
    async with start_pair(model_dir, tmp_path, policy=TIERED, host_kv_bytes=1 << 30) as (commander, _, decoder):
        conversation = Conversation(commander, decoder)
        await play_true(conversation, reference, tokens_of(1, 300))
        kv = decoder.scheduler.sessions[SessionKey("t", "s")]
        pool = decoder.runner.pool.tensor

        def held() -> Any:
            return pool[kv.block_table].transpose(0, 1).transpose(1, 2).flatten(2, 3)[:, :, : kv.num_kv].clone().numpy()

        before, num_kv = held(), kv.num_kv
        assert num_kv == 307
        filler = decoder.scheduler.sessions[SessionKey("t", "filler")] = SessionKv(SessionKey("t", "filler"))
        assert decoder.scheduler.reserve(filler, 16 * (199 - 20 + 5))
        assert kv.num_kv == 16 * 12, "eight blocks of the tail have gone, not the session"
        pool[filler.block_table] = -7.0
        decoder.scheduler.drop(SessionKey("t", "filler"))
        assert await decoder.runtime.context.engine.restore(kv, 1000) == 307 - 16 * 12
        assert np.array_equal(held(), before)
        decoder.runtime.check_integrity()
        await play_true(conversation, reference, tokens_of(2, 5))


async def test_a_resident_comes_back_from_host_memory(model_dir: Path, tmp_path: Path, reference: Any) -> None:
    async with start_pair(model_dir, tmp_path, policy=TIERED, host_kv_bytes=1 << 30) as (commander, prefiller, decoder):
        conversation = Conversation(commander, decoder)
        await play_true(conversation, reference, tokens_of(3, 100), prefiller, keep=True)
        await commander.prefills.get()
        scheduler = prefiller.scheduler
        filler = scheduler.sessions[SessionKey("t", "filler")] = SessionKv(SessionKey("t", "filler"))
        assert scheduler.reserve(filler, 16 * 199)
        assert scheduler.sessions[resident_key(SessionKey("t", "s"))].num_kv == 0
        scheduler.drop(SessionKey("t", "filler"))
        told = KvHeld(tenant="t", session="s", num_device_tokens=0, num_host_tokens=100)
        assert prefiller.runtime.heartbeat().kv_held == (told,), "it can come back"
        ended = await play_true(
            conversation, reference, tokens_of(4, 10), prefiller, keep=True, resident=conversation.resident(100)
        )
        assert (await commander.prefills.get()).num_reused_tokens == 100
        assert ended.usage.kv_bytes_read == 7 * prefiller.runner.layout.bytes_per_token


async def test_kv_of_a_conversation_that_went_another_way_is_not_restored(
    model_dir: Path, tmp_path: Path, reference: Any
) -> None:
    async with start_pair(model_dir, tmp_path, policy=TIERED, host_kv_bytes=1 << 30) as (commander, _, decoder):
        conversation = Conversation(commander, decoder)
        await play_true(conversation, reference, tokens_of(5, 100))
        scheduler = decoder.scheduler
        filler = scheduler.sessions[SessionKey("t", "filler")] = SessionKv(SessionKey("t", "filler"))
        assert scheduler.reserve(filler, 16 * 199)
        scheduler.drop(SessionKey("t", "filler"))
        conversation.tokens[50] += 1
        await play_true(conversation, reference, tokens_of(6, 10))
        assert conversation.num_cached == 0


class TierOnMemory:
    """A scheduler and its host tier over plain memory, each position's bytes told apart."""

    def __init__(self, num_blocks: int, num_host_blocks: int) -> None:
        self.memory = HostKvMemory(KvLayout("model", 2, 1, 8, BLOCK, "float32"), num_blocks)
        self.scheduler = Scheduler(BlockAllocator(num_blocks, BLOCK))
        self.tier = self.scheduler.memory.lower_tier = HostTier(self.memory, num_blocks=num_host_blocks)

    def add(self, name: str, num_tokens: int, last_used: float) -> SessionKv:
        key = SessionKey("t", name)
        kv = self.scheduler.sessions[key] = SessionKv(key, last_used=last_used)
        kv.tokens = array("i", range(num_tokens))
        assert self.scheduler.reserve(kv, num_tokens)
        kv.num_kv = num_tokens
        for index, block in enumerate(kv.block_table):
            self.memory.blocks[block] = 10 * ord(name) % 200 + index
        return kv

    def restore(self, kv: SessionKv) -> int:
        entry = self.tier.take(kv)
        if entry is None:
            return kv.num_kv
        assert self.scheduler.reserve(kv, entry.num_tokens)
        self.tier.read(entry, kv.block_table, kv.num_kv, entry.num_tokens)
        kv.num_kv = entry.num_tokens
        self.tier.release(entry)
        self.check(kv)
        return kv.num_kv

    def check(self, kv: SessionKv) -> None:
        for index, block in enumerate(kv.block_table):
            assert (self.memory.blocks[block] == 10 * ord(kv.key.session) % 200 + index).all()
        self.scheduler.check_integrity()


def test_tails_evicted_one_after_the_other_come_back_as_one() -> None:
    on = TierOnMemory(num_blocks=41, num_host_blocks=100)
    kv = on.add("a", 39 * BLOCK + 1, 0.0)
    for wanted in (1, 8, 3):
        on.scheduler.memory.evict(kv, wanted, 0.0)
        on.scheduler.check_integrity()
    assert kv.num_kv == 16 * BLOCK
    assert on.tier.num_tokens == 23 * BLOCK + 1
    assert on.restore(kv) == 39 * BLOCK + 1
    assert on.tier.num_tokens == 0


def test_a_full_tier_gives_up_the_tail_of_the_least_recently_used() -> None:
    on = TierOnMemory(num_blocks=41, num_host_blocks=12)
    old, young = on.add("a", 8 * BLOCK, 0.0), on.add("b", 8 * BLOCK, 1.0)
    on.scheduler.memory.evict(old, 8, 2.0)
    on.scheduler.memory.evict(young, 8, 2.0)
    on.scheduler.check_integrity()
    assert (on.restore(young), on.restore(old)) == (8 * BLOCK, 4 * BLOCK)


def test_more_than_the_tier_holds_is_kept_from_its_start() -> None:
    on = TierOnMemory(num_blocks=41, num_host_blocks=3)
    kv = on.add("a", 8 * BLOCK, 0.0)
    on.scheduler.memory.evict(kv, 8, 0.0)
    assert on.restore(kv) == 3 * BLOCK


def test_a_gap_or_other_tokens_end_an_entry() -> None:
    on = TierOnMemory(num_blocks=41, num_host_blocks=30)
    gap, other = on.add("a", 16 * BLOCK, 0.0), on.add("b", 16 * BLOCK, 0.0)
    on.scheduler.memory.evict(gap, 8, 0.0)
    on.scheduler.truncate(gap, 4 * BLOCK)  # preempted since
    assert on.restore(gap) == 4 * BLOCK
    on.scheduler.memory.evict(other, 8, 0.0)
    other.tokens[-1] += 1
    assert on.restore(other) == 8 * BLOCK
    on.scheduler.memory.evict(other, 8, 0.0)
    on.scheduler.drop(other.key)
    on.scheduler.check_integrity()
    assert on.tier.num_tokens == 0
