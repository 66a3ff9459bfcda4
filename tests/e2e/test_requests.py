"""The request API as a client meets it: JSON by hand, bad input, cancel, close, clients that go away."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from shared import subjects
from shared.client import AmpdClient
from shared.errors import AmpdError, ErrorCode
from shared.messages import ChatMessage, SamplingParams, StopConditions
from shared.nats_bus import connect_nats_bus

LONG = StopConditions(max_output_tokens=1500, ignore_eos=True)


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def cluster(shared_cluster: Any) -> Any:
    return shared_cluster


async def ask_json(bus: Any, session: str, request: dict[str, Any] | bytes) -> dict[str, Any]:
    data = request if isinstance(request, bytes) else json.dumps(request).encode()
    reply: dict[str, Any] = json.loads(
        await bus.request(subjects.session_request("default", session), data, timeout_s=5.0)
    )
    return reply


async def test_the_whole_conversation_in_plain_json(cluster: Any, reference: Any) -> None:
    """What `nats req` and `nats sub` would do."""
    bus = await connect_nats_bus(cluster.local.url, name="json")
    received: list[dict[str, Any]] = []
    ended = asyncio.Event()

    def on_message(message: Any) -> None:
        received.append(json.loads(message.data))
        if received[-1]["type"] != "tokens":
            ended.set()

    await bus.subscribe_ordered(subjects.session_streams("default", "js"), on_message)
    assert (await ask_json(bus, "js", {"type": "open"}))["type"] == "opened"
    prompt = list(range(20, 60))
    reply = await ask_json(
        bus,
        "js",
        {
            "type": "round",
            "input": {"type": "tokens", "token_ids": prompt},
            "stop": {"max_output_tokens": 6, "ignore_eos": True},
        },
    )
    assert (reply["type"], reply["round"], reply["num_input_tokens"]) == ("accepted", 0, 40)
    await asyncio.wait_for(ended.wait(), 30)
    tokens = [token for message in received[:-1] for token in message["token_ids"]]
    assert tokens == reference.generate(prompt, 6)
    assert received[-1]["type"] == "finished"
    assert received[-1]["usage"]["num_output_tokens"] == 6
    assert (await ask_json(bus, "js", {"type": "close"}))["type"] == "closed"
    await bus.close()
    await cluster.assert_everything_returned()


async def test_bad_requests_are_refused_by_name_and_leave_nothing(cluster: Any) -> None:
    bus = await connect_nats_bus(cluster.local.url, name="bad")
    assert (await ask_json(bus, "s", {"type": "open"}))["type"] == "opened"

    def round_of(**fields: Any) -> dict[str, Any]:
        return {"type": "round", "input": {"type": "tokens", "token_ids": [5, 6]}, **fields}

    cases: list[tuple[str, dict[str, Any] | bytes, str, str]] = [
        ("nobody", round_of(), "unknown_session", "nobody"),
        ("s", round_of(input={"type": "tokens", "token_ids": []}), "empty_input", ""),
        ("s", round_of(input={"type": "text", "text": ""}), "empty_input", ""),
        ("s", round_of(input={"type": "tokens", "token_ids": [5] * 5000}), "context_too_long", "4096"),
        ("s", round_of(stop={"max_output_tokens": 100_000}), "context_too_long", "4096"),
        ("s", round_of(input={"type": "tokens", "token_ids": [1_000_000]}), "invalid_request", "512"),
        ("s", round_of(input={"type": "tokens", "token_ids": "many"}), "malformed_message", "token_ids"),
        ("s", round_of(sampling={"temperature": -1}), "invalid_request", "temperature"),
        ("s", round_of(sampling={"heat": 1}), "malformed_message", "heat"),
        ("s", round_of(deadline_s=-1), "invalid_request", "deadline_s"),
        ("s", {"type": "no_such_thing"}, "malformed_message", "no_such_thing"),
        ("s", b'{"type": "round", "inp', "malformed_message", ""),
        ("s", {"type": "read_round", "round": 7}, "unknown_round", "7"),
    ]
    for session, request, code, named in cases:
        reply = await ask_json(bus, session, request)
        assert (reply["type"], reply["code"]) == ("error", code), (request, reply)
        assert named in reply["message"], (request, reply)
    broken = await bus.request(subjects.session_request("default", "s"), b"\xc1\xff\x00", timeout_s=5.0)
    assert b"malformed_message" in broken
    large = await bus.request(subjects.session_request("default", "s"), b"{" + b" " * (5 << 20), timeout_s=5.0)
    assert b"malformed_message" in large
    assert b"send less" in large
    with pytest.raises(AmpdError, match="exceeds the bus"):
        await bus.publish(subjects.session_request("default", "s"), b"x" * (bus.max_payload + 1))
    assert (await ask_json(bus, "s", {"type": "close"}))["type"] == "closed"
    await bus.close()
    await cluster.assert_everything_returned()


async def test_text_chat_sampling_and_stop_strings(cluster: Any) -> None:
    async with await cluster.client.open_session() as session:
        chat = await session.submit([ChatMessage(role="user", content="What is up?")], max_output_tokens=8)
        first = await chat.result()
        assert 1 <= len(first.token_ids) <= 8
        sampled = [
            await (
                await session.submit(
                    "tell me", max_output_tokens=20, sampling=SamplingParams(temperature=1.0, top_p=0.9, seed=seed)
                )
            ).result()
            for seed in (1, 2)
        ]
        assert sampled[0].token_ids != sampled[1].token_ids
        stopped = await (
            await session.submit("again", stop=StopConditions(max_output_tokens=400, stop=("e",), ignore_eos=True))
        ).result()
        assert "e" not in stopped.text
    await cluster.assert_everything_returned()


async def test_a_second_round_while_one_runs_and_the_same_key_twice(cluster: Any) -> None:
    async with await cluster.client.open_session() as session:
        stream = await session.submit([7, 8, 9], stop=LONG, idempotency_key="one")
        with pytest.raises(AmpdError) as caught:
            await session.submit([1, 2], stop=LONG)
        assert caught.value.code is ErrorCode.ROUND_IN_FLIGHT
        again = await session.submit([7, 8, 9], stop=LONG, idempotency_key="one")
        assert again.round == stream.round
        with pytest.raises(AmpdError) as caught:
            await session.submit([7, 8], stop=LONG, idempotency_key="one")
        assert caught.value.code is ErrorCode.IDEMPOTENCY_CONFLICT
        await stream.cancel()
    await cluster.assert_everything_returned()


@pytest.mark.parametrize("wait_for_token", [True, False])
async def test_cancel_rolls_back_and_the_session_goes_on(wait_for_token: bool, cluster: Any, reference: Any) -> None:
    prompt = list(range(100, 180))
    async with await cluster.client.open_session() as session:
        stream = await session.submit(prompt, stop=LONG)
        if wait_for_token:
            await anext(aiter(stream))
        await stream.cancel()
        with pytest.raises(AmpdError) as caught:
            await stream.result()
        assert caught.value.code is ErrorCode.CANCELLED
        after = await session.submit(prompt, stop=StopConditions(max_output_tokens=6, ignore_eos=True))
        result = await after.result()
        assert list(result.token_ids) == reference.generate(prompt, 6), "the cancelled round left no trace"
    await cluster.assert_everything_returned()


async def test_a_deadline_ends_the_round(cluster: Any) -> None:
    async with await cluster.client.open_session() as session:
        stream = await session.submit(
            [7] * 50, stop=StopConditions(max_output_tokens=4000, ignore_eos=True), deadline_s=1
        )
        with pytest.raises(AmpdError) as caught:
            await stream.result()
        assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED
    await cluster.assert_everything_returned()


async def test_a_client_that_goes_away_leaves_nothing_for_ever(cluster: Any) -> None:
    """It vanishes in the middle of a round: the idle time-out gives everything back."""
    gone = await AmpdClient.connect(cluster.local.url)
    session = await gone.open_session(idle_timeout_s=1.0)
    await session.submit([7] * 50, stop=StopConditions(max_output_tokens=100, ignore_eos=True))
    await gone.close()
    await cluster.assert_everything_returned()
