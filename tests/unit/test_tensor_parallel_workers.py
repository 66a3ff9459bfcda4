"""Workers of different parallel degrees serve one session: KV moves between them as between equals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from worker_pair import Conversation, load_reference, start_pair

from shared.core.policies import find_policy, with_options
from shared.core.types import SessionKey
from shared.engine.model_files import resolve_model
from shared.messages import unpack_token_ids

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


@pytest.mark.parametrize("degrees", [(1, 2), (2, 1)], ids=["1 to 2", "2 to 1"])
async def test_rounds_over_both_workers_equal_generate(
    degrees: tuple[int, int], model_dir: Path, tmp_path: Path, reference: Any
) -> None:
    """Remote rounds: the history goes to the prefill worker, the increment comes back, layer by layer as computed."""
    async with start_pair(model_dir, tmp_path, parallel_degrees=degrees) as (commander, prefiller, decoder):
        conversation = Conversation(commander, decoder)
        per_token = decoder.runner.layout.bytes_per_token
        for index, (remote, length) in enumerate([(prefiller, 90), (prefiller, 33), (None, 21), (prefiller, 5)]):
            num_history = len(conversation.tokens)
            ended = await play_true(conversation, reference, tokens_of(index, length), remote, max_output_tokens=20)
            cached = max(0, num_history - 1)
            expected = (cached, num_history + length - cached) if remote else (0, 0)
            moved = (ended.usage.kv_bytes_read, ended.usage.kv_bytes_written)
            assert moved == tuple(n * per_token for n in expected), "as many bytes as between equals"


async def test_evicted_kv_of_two_ranks_comes_back(model_dir: Path, tmp_path: Path, reference: Any) -> None:
    """Two sessions take turns in memory for one: each finds its KV in host memory, and computes nothing again."""
    async with start_pair(
        model_dir, tmp_path, policy=TIERED, num_blocks=16, host_kv_bytes=1 << 30, parallel_degrees=(1, 2)
    ) as (commander, _, decoder):
        conversations = [Conversation(commander, decoder, f"s{index}") for index in range(2)]
        tier = decoder.runtime.context.engine.host_tier
        for turn in range(3):
            for seed, conversation in enumerate(conversations):
                await play_true(conversation, reference, tokens_of(10 * turn + seed, 120 if turn == 0 else 15))
                if turn > 0:
                    assert conversation.num_cached == len(conversation.tokens) - 15 - 8 - 1
        assert tier.num_restored_tokens > 0
        assert {SessionKey("t", one.session) for one in conversations} <= decoder.scheduler.sessions.keys()
