"""A session moves to another worker: exactly its KV moves, the tokens are those of `generate`, and whatever goes wrong
on the way costs the KV and not the round. Also KV that a worker kept of a prefill becomes the session's own there."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from worker_pair import Conversation, load_reference, start_pair

from services.worker.app import build_parser, choose_node
from services.worker.context import WorkerLimits
from shared.core.policies import find_policy, with_options
from shared.core.resident_key import resident_key
from shared.core.sequences import SessionKv
from shared.core.types import SessionKey
from shared.engine.model_files import resolve_model
from shared.errors import AmpdError, ErrorCode
from shared.messages import CancelRun, DropSession, GrantHistory, KvRenew, unpack_token_ids

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
    async with start_pair(model_dir, tmp_path, takes="both") as pair:
        yield pair


async def play_true(conversation: Conversation, reference: Any, new: list[int], *args: Any, **kwargs: Any) -> Any:
    ended = await conversation.play(new, *args, **kwargs)
    output = unpack_token_ids(ended.output_token_ids)
    assert output == reference(conversation.tokens[: -len(output)], len(output))
    return ended


async def drop(commander: Any, worker: Any) -> None:
    await commander.command(worker, DropSession(tenant="t", session="s"))


def fill(worker: Any, num_blocks: int) -> SessionKv:
    """Somebody's KV that cannot be evicted."""
    key = SessionKey("t", "filler")
    kv = worker.scheduler.sessions[key] = SessionKv(key, pinned=True)
    assert worker.scheduler.reserve(kv, 16 * num_blocks)
    return kv


# -------------------------------------------------------------------------------------- moves


async def test_a_move_moves_exactly_the_kv_and_computes_only_what_is_new(pair: Any, reference: Any) -> None:
    commander, there, here = pair
    conversation = Conversation(commander, here)
    await play_true(conversation, reference, tokens_of(1, 45))
    for index in range(3):
        source, target = (here, there) if index % 2 == 0 else (there, here)
        num_held = len(conversation.tokens) - 1
        granted = await conversation.leave_for(target)
        assert granted.num_tokens == num_held
        ended = await play_true(conversation, reference, tokens_of(2 + index, 20), granted=granted)
        usage = ended.usage
        assert conversation.num_cached == usage.num_cached_tokens == usage.num_moved_tokens == num_held
        assert usage.kv_bytes_read == num_held * here.runner.layout.bytes_per_token
        assert (usage.prefill, usage.moved_from, usage.decode_worker) == ("local", source.id, target.id)
        await drop(commander, source)
        assert source.scheduler.sessions == {}
        assert len(source.runtime.context.leases) == 0
    assert ended.usage.kv_bytes_written == 0


async def test_lent_kv_is_not_evicted_until_it_has_been_read(pair: Any) -> None:
    commander, there, here = pair
    conversation = Conversation(commander, here)
    await conversation.play(tokens_of(1, 45))
    granted = await conversation.leave_for(there)
    kv, scheduler = here.scheduler.sessions[SESSION], here.scheduler
    asking = scheduler.sessions.setdefault(SessionKey("t", "asking"), SessionKv(SessionKey("t", "asking")))
    assert not scheduler.reserve(asking, 16 * 199)
    await conversation.play(tokens_of(2, 5), granted=granted)
    while kv.lent:  # noqa: ASYNC110 - the lease's end is on its way from a thread of the transport
        await asyncio.sleep(0)
    assert scheduler.reserve(asking, 16 * 199)
    scheduler.drop(SessionKey("t", "asking"))


async def test_a_repeated_grant_lends_once_and_ends_the_first(pair: Any) -> None:
    commander, there, here = pair
    conversation = Conversation(commander, here)
    await conversation.play(tokens_of(1, 45))
    first = await conversation.leave_for(there)
    conversation.decoder = here
    granted = await conversation.leave_for(there)
    with pytest.raises(AmpdError):
        await here.runtime.peer(KvRenew(lease_id=first.history.lease_id, generation=first.history.generation))
    await asyncio.sleep(0)
    assert here.scheduler.sessions[SESSION].lent, "the end of the first is not the end of the second"
    ended = await conversation.play(tokens_of(2, 5), granted=granted)
    assert ended.usage.num_moved_tokens == 52


@pytest.mark.parametrize("what", ["dropped", "no ticket", "other incarnation"])
async def test_when_the_kv_cannot_be_had_it_is_computed(what: str, pair: Any, reference: Any) -> None:
    commander, there, here = pair
    conversation = Conversation(commander, here)
    await play_true(conversation, reference, tokens_of(1, 45))
    granted = await conversation.leave_for(there)
    if what == "dropped":
        await drop(commander, here)
    else:
        wrong = {"ticket": b"nonsense"} if what == "no ticket" else {"incarnation": 1}
        granted = msgspec.structs.replace(granted, history=msgspec.structs.replace(granted.history, **wrong))
    ended = await play_true(conversation, reference, tokens_of(2, 20), granted=granted)
    usage = ended.usage
    assert (usage.num_cached_tokens, usage.num_moved_tokens, usage.kv_bytes_read) == (0, 0, 0)
    assert usage.moved_from == here.id, "that it was to come along is told"
    await play_true(conversation, reference, tokens_of(3, 5))
    assert conversation.num_cached == 80


async def test_the_source_dies_in_the_middle_of_the_pull(pair: Any, reference: Any) -> None:
    commander, there, here = pair
    conversation = Conversation(commander, here)
    await play_true(conversation, reference, tokens_of(1, 45))
    granted = await conversation.leave_for(there)
    reading, go_on = asyncio.Event(), threading.Event()
    loop, pool = asyncio.get_running_loop(), here.runner.pool
    segment_views = pool.segment_views

    def held_up(*arguments: Any) -> Any:
        loop.call_soon_threadsafe(reading.set)
        go_on.wait(10)
        return segment_views(*arguments)

    pool.segment_views = held_up
    playing = asyncio.create_task(play_true(conversation, reference, tokens_of(2, 20), granted=granted))
    await asyncio.wait_for(reading.wait(), 10)
    await drop(commander, here)  # what its death does to the KV
    assert not playing.done()
    go_on.set()
    ended = await playing
    assert (ended.usage.num_moved_tokens, ended.usage.kv_bytes_read) == (0, 0)
    pool.segment_views = segment_views


@pytest.mark.parametrize("how", ["cancelled", "superseded", "dropped"])
async def test_a_move_that_is_stopped_leaves_nothing_behind(how: str, pair: Any, reference: Any) -> None:
    commander, there, here = pair
    conversation = Conversation(commander, here)
    await play_true(conversation, reference, tokens_of(1, 45))
    granted = await conversation.leave_for(there)
    reading, go_on = asyncio.Event(), threading.Event()
    loop, pool = asyncio.get_running_loop(), here.runner.pool
    segment_views = pool.segment_views

    def held_up(*arguments: Any) -> Any:
        loop.call_soon_threadsafe(reading.set)
        go_on.wait(10)
        return segment_views(*arguments)

    pool.segment_views = held_up
    new = tokens_of(2, 20)
    message = commander.run_round(
        there,
        conversation.tokens,
        new,
        round_index=1,
        source=granted.history,
        num_source_tokens=granted.num_tokens,
    )
    ack = await commander.command(there, message)
    assert ack.num_cached_tokens == 52, "about to be fetched"
    await asyncio.wait_for(reading.wait(), 10)
    match how:
        case "cancelled":
            stopping = commander.command(there, CancelRun(tenant="t", session="s", round=1, attempt=1))
        case "superseded":
            stopping = commander.command(
                there, commander.run_round(there, conversation.tokens, new, round_index=1, attempt=2)
            )
        case _:
            stopping = drop(commander, there)
    task = asyncio.ensure_future(stopping)
    await asyncio.sleep(0)
    go_on.set()
    await task
    pool.segment_views = segment_views
    there.runtime.check_integrity()
    if how == "superseded":
        ended = await commander.end()
        assert unpack_token_ids(ended.output_token_ids) == reference(conversation.tokens + new, 8)
        assert ended.usage.num_moved_tokens == 0
        return
    conversation.index = 2
    if how == "cancelled":
        assert there.scheduler.sessions[SESSION].num_tokens == 53, "the history, and nothing of the round"
    await play_true(conversation, reference, tokens_of(3, 5))


async def test_without_room_the_history_waits_and_then_moves(pair: Any, reference: Any) -> None:
    commander, there, here = pair
    conversation = Conversation(commander, here)
    await play_true(conversation, reference, tokens_of(1, 100))
    granted = await conversation.leave_for(there)
    filler = fill(there, 198)
    playing = asyncio.create_task(play_true(conversation, reference, tokens_of(2, 5), granted=granted))
    while SESSION not in there.scheduler.sessions:  # noqa: ASYNC110 - the command is on its way
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert there.scheduler.sessions[SESSION].num_kv == 0
    there.scheduler.drop(filler.key)
    there.runtime.context.engine.wake()
    ended = await playing
    assert ended.usage.num_moved_tokens == 107
    assert ended.usage.transfer_s >= 0.01


async def test_a_round_runs_where_it_comes_from_after_all(pair: Any, reference: Any) -> None:
    """The attempt at the new worker failed before its first token: the session is back where its KV is."""
    commander, there, here = pair
    conversation = Conversation(commander, here)
    await play_true(conversation, reference, tokens_of(1, 45))
    await conversation.leave_for(there)
    conversation.decoder = here
    ended = await play_true(conversation, reference, tokens_of(2, 20))
    assert ended.usage.num_cached_tokens == 52


async def test_a_lease_of_a_move_is_renewed_while_it_is_read(model_dir: Path, tmp_path: Path, reference: Any) -> None:
    limits = WorkerLimits(lease_ttl_s=0.3)
    async with start_pair(model_dir, tmp_path, takes="both", limits=limits) as (commander, there, here):
        conversation = Conversation(commander, here)
        await play_true(conversation, reference, tokens_of(1, 45))
        granted = await conversation.leave_for(there)
        filler = fill(there, 198)
        playing = asyncio.create_task(play_true(conversation, reference, tokens_of(2, 5), granted=granted))
        await asyncio.sleep(0.7)  # more than two lives of a lease that nobody renews
        there.scheduler.drop(filler.key)
        assert (await playing).usage.num_moved_tokens == 52


# ------------------------------------------------------------------------- host memory, residents

TIERED = with_options(find_policy("local"), {"host_tier": True})


async def test_what_the_source_has_in_host_memory_comes_along(model_dir: Path, tmp_path: Path, reference: Any) -> None:
    async with start_pair(model_dir, tmp_path, policy=TIERED, host_kv_bytes=1 << 30, takes="both") as pair:
        commander, there, here = pair
        conversation = Conversation(commander, here)
        await play_true(conversation, reference, tokens_of(1, 100))
        filler = SessionKv(SessionKey("t", "filler"))
        here.scheduler.sessions[filler.key] = filler
        assert here.scheduler.reserve(filler, 16 * 199)
        assert here.scheduler.sessions[SESSION].num_kv == 0
        with pytest.raises(AmpdError) as refused:
            await commander.command(
                here, GrantHistory(tenant="t", session="s", incarnation=here.incarnation, num_tokens=108)
            )
        assert refused.value.code is ErrorCode.KV_LEASE_INVALID, "reading ahead brings nothing back"
        granted = await conversation.leave_for(there)
        assert granted.num_tokens == 107
        ended = await play_true(conversation, reference, tokens_of(2, 5), granted=granted)
        assert ended.usage.num_moved_tokens == 107
        here.scheduler.drop(filler.key)


async def test_kv_kept_of_a_prefill_becomes_the_sessions_own(pair: Any, reference: Any) -> None:
    commander, there, here = pair
    conversation = Conversation(commander, here)
    await play_true(conversation, reference, tokens_of(1, 60), there, keep=True)
    await commander.prefills.get()
    conversation.decoder = there
    ended = await play_true(conversation, reference, tokens_of(2, 9))
    assert ended.usage.num_cached_tokens == 60, "only what was never here is computed"
    assert len(there.runtime.prefill.residents) == 0
    assert resident_key(SESSION) not in there.scheduler.sessions
    await play_true(conversation, reference, tokens_of(3, 9))
    assert conversation.num_cached == len(conversation.tokens) - 9 - 8 - 1


async def test_a_move_fetches_only_what_was_not_kept(pair: Any, reference: Any) -> None:
    commander, there, here = pair
    conversation = Conversation(commander, here)
    await play_true(conversation, reference, tokens_of(1, 60), there, keep=True)
    await commander.prefills.get()
    granted = await conversation.leave_for(there)
    ended = await play_true(conversation, reference, tokens_of(2, 9), granted=granted)
    assert ended.usage.num_cached_tokens == 67
    assert ended.usage.kv_bytes_read == (67 - 60) * here.runner.layout.bytes_per_token


async def test_kept_kv_of_other_tokens_is_not_taken(pair: Any, reference: Any) -> None:
    commander, there, here = pair
    conversation = Conversation(commander, here)
    await play_true(conversation, reference, tokens_of(1, 60), there, keep=True)
    await commander.prefills.get()
    there.scheduler.sessions[resident_key(SESSION)].tokens[20] += 1
    conversation.decoder = there
    ended = await play_true(conversation, reference, tokens_of(2, 9))
    assert ended.usage.num_cached_tokens == 20, "the part before is the same"


async def test_a_session_that_comes_back_while_it_is_being_dropped_begins_anew(pair: Any, reference: Any) -> None:
    commander, there, here = pair
    conversation = Conversation(commander, here)
    await play_true(conversation, reference, tokens_of(1, 45))
    granted = await conversation.leave_for(there)
    await play_true(conversation, reference, tokens_of(2, 5), granted=granted)
    new = tokens_of(3, 5)
    message = commander.run_round(there, conversation.tokens, new, round_index=2)
    _, ack = await asyncio.gather(drop(commander, there), commander.command(there, message))
    assert ack.state == "started"
    ended = await commander.end()
    assert unpack_token_ids(ended.output_token_ids) == reference(conversation.tokens + new, 8)
    assert SESSION in there.scheduler.sessions, "it lives here, so that its blocks are given back some time"


# --------------------------------------------------------------------- what the coordinator is told


def held_of(worker: Any) -> dict[str, tuple[int, int]]:
    changes = worker.runtime.heartbeat().kv_held
    return {change.session: (change.num_device_tokens, change.num_host_tokens) for change in changes}


async def test_what_a_session_has_lost_is_told_once(pair: Any) -> None:
    commander, _, here = pair
    conversation = Conversation(commander, here)
    await conversation.play(tokens_of(1, 45))
    assert held_of(here) == {}, "the end of its round has told all"
    here.scheduler.truncate(here.scheduler.sessions[SESSION], 20)
    assert held_of(here) == {"s": (20, 0)}
    assert held_of(here) == {}
    await conversation.play(tokens_of(2, 5))
    assert held_of(here) == {}
    message = commander.run_round(here, conversation.tokens, tokens_of(3, 5), round_index=2, max_output_tokens=500)
    await commander.command(here, message)
    await commander.command(here, CancelRun(tenant="t", session="s", round=2, attempt=1))
    assert held_of(here)["s"][0] in (len(conversation.tokens) - 1, len(conversation.tokens)), "what is left is told"


async def test_what_went_to_host_memory_and_came_back_is_told(model_dir: Path, tmp_path: Path) -> None:
    async with start_pair(model_dir, tmp_path, policy=TIERED, host_kv_bytes=1 << 30, takes="both") as pair:
        commander, there, here = pair
        conversation = Conversation(commander, here)
        await conversation.play(tokens_of(1, 100))
        filler = SessionKv(SessionKey("t", "filler"))
        here.scheduler.sessions[filler.key] = filler
        assert here.scheduler.reserve(filler, 16 * 195)
        num_left = here.scheduler.sessions[SESSION].num_kv
        assert 0 <= num_left < 100
        assert held_of(here) == {"s": (num_left, 107 - num_left)}
        here.scheduler.drop(filler.key)
        await conversation.leave_for(there)
        conversation.decoder = here
        assert held_of(here) == {"s": (107, 0)}


async def test_changes_beyond_the_limit_are_told_next_time(pair: Any) -> None:
    commander, _, here = pair
    for index in range(3):
        await Conversation(commander, here, f"s{index}").play(tokens_of(index, 20))
        here.scheduler.truncate(here.scheduler.sessions[SessionKey("t", f"s{index}")], 16)
    changes = here.runtime.context.kv_changes
    told = [change.session for _ in range(3) for change in changes.collect(2)]
    assert sorted(told) == ["s0", "s1", "s2"]


async def test_blocks_of_kept_kv_are_told_as_evictable(pair: Any) -> None:
    commander, there, here = pair
    await Conversation(commander, here).play(tokens_of(1, 45), there, keep=True)
    await commander.prefills.get()
    beat = there.runtime.heartbeat()
    assert (beat.num_evictable_blocks, beat.num_free_blocks) == (3, beat.num_blocks - 3)


def test_workers_of_one_host_are_of_one_node_unless_they_are_told_otherwise() -> None:
    def node(*arguments: str) -> str:
        return choose_node(build_parser("decode").parse_args(arguments))

    assert node() == socket.gethostname()
    assert node("--node", "rack-3") == node("--engine", "emulated", "--node", "rack-3") == "rack-3"
    assert node("--engine", "emulated") == "", "its transfers last as between nodes: it should be predicted so"
