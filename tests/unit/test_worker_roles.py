"""A running worker takes another role: what it has goes on to its end, and what was on its way is carried out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from worker_pair import Conversation, Worker, load_reference, start_pair

from shared import subjects
from shared.engine.model_files import resolve_model
from shared.errors import AmpdError, ErrorCode
from shared.messages import Ack, DropSession, Heartbeat, Role, SetRole, decode, unpack_token_ids


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


async def set_role(commander: Any, worker: Worker, role: Role) -> None:
    reply = await commander.command(worker, SetRole(incarnation=worker.incarnation, role=role))
    assert reply == Ack()
    assert worker.runtime.role == role


async def start(commander: Any, decoder: Worker, prompt: list[int], remote: Worker | None, num_output: int) -> None:
    message = commander.run_round(decoder, [], prompt, remote=remote, max_output_tokens=num_output)
    await commander.start(decoder, message, prompt, remote)


async def end_true(commander: Any, reference: Any, prompt: list[int]) -> Any:
    ended = await commander.end()
    assert ended.error is None
    output = unpack_token_ids(ended.output_token_ids)
    assert output == reference(prompt, len(output))
    return ended


async def test_the_new_role_is_advertised_before_it_is_acknowledged(pair: Any) -> None:
    commander, _, decoder = pair
    beats: list[Heartbeat] = []
    await commander.bus.subscribe_ordered(subjects.heartbeat(decoder.id), lambda m: beats.append(decode(m.data)))
    await set_role(commander, decoder, "prefill")
    assert beats[-1].role == "prefill"
    await set_role(commander, decoder, "both")
    assert beats[-1].role == "both"


async def test_a_round_decodes_to_its_end_and_its_session_moves_on_with_its_kv(pair: Any, reference: Any) -> None:
    commander, other, decoder = pair
    conversation = Conversation(commander, decoder)
    prompt = tokens_of(1, 40)
    await start(commander, decoder, prompt, None, 60)
    await set_role(commander, decoder, "prefill")
    assert decoder.runtime.decode.num_active == 1, "the round is not over"
    ended = await end_true(commander, reference, prompt)
    conversation.tokens, conversation.index = prompt + unpack_token_ids(ended.output_token_ids), 1
    await set_role(commander, other, "decode")
    granted = await conversation.leave_for(other)
    moved = await conversation.play(tokens_of(2, 5), granted=granted)
    assert (moved.usage.num_moved_tokens, moved.usage.moved_from) == (99, decoder.id)
    assert conversation.tokens[-8:] == reference(conversation.tokens[:-8], 8)
    await commander.command(decoder, DropSession(tenant="t", session="s"))
    assert decoder.scheduler.sessions == {}


async def test_prefills_are_handed_over_by_a_worker_that_decodes_now(pair: Any, reference: Any) -> None:
    commander, prefiller, decoder = pair
    prompt = tokens_of(3, 120)
    await start(commander, decoder, prompt, prefiller, 8)
    await set_role(commander, prefiller, "decode")
    ended = await end_true(commander, reference, prompt)
    assert (ended.usage.prefill, ended.usage.prefill_worker) == ("remote", prefiller.id)


async def test_commands_that_were_on_their_way_are_carried_out(pair: Any, reference: Any) -> None:
    """A round and a prefill that reach workers which have taken other roles meanwhile."""
    commander, prefiller, decoder = pair
    await set_role(commander, prefiller, "decode")
    await set_role(commander, decoder, "prefill")
    prompt = tokens_of(4, 50)
    await start(commander, decoder, prompt, prefiller, 8)
    ended = await end_true(commander, reference, prompt)
    assert (ended.usage.prefill_worker, ended.usage.decode_worker) == (prefiller.id, decoder.id)


async def test_a_role_is_refused_by_another_process_and_by_one_that_stops(pair: Any) -> None:
    commander, _, decoder = pair
    message = SetRole(incarnation=decoder.incarnation, role="both")
    with pytest.raises(AmpdError) as refused:
        await commander.command(decoder, msgspec.structs.replace(message, incarnation=decoder.incarnation + 1))
    assert refused.value.code == ErrorCode.WRONG_INCARNATION
    decoder.runtime.context.draining = True
    with pytest.raises(AmpdError) as refused:
        await commander.command(decoder, message)
    assert refused.value.code == ErrorCode.DRAINING
    assert decoder.runtime.role == "decode"
