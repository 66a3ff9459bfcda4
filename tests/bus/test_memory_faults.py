"""The faults that a MemoryHub injects: they happen, they are counted, and they repeat with the seed."""

from __future__ import annotations

import asyncio

import pytest

from shared.bus import BusMessage
from shared.errors import RequestTimeout
from shared.memory_bus import MemoryHub, MessageRule, matches

LIMIT_S = 20.0


async def send_numbers(hub: MemoryHub, count: int, num_expected: int) -> list[int]:
    """Publish 0..count-1 and return what arrives, once num_expected have."""
    publisher, receiver = await hub.connect("publisher"), await hub.connect("receiver")
    received: list[int] = []
    complete = asyncio.Event()

    def keep(message: BusMessage) -> None:
        received.append(int(message.data))
        if len(received) == num_expected:
            complete.set()

    await receiver.subscribe_ordered("numbers", keep)
    for i in range(count):
        await publisher.publish("numbers", str(i).encode())
    async with asyncio.timeout(LIMIT_S):
        await complete.wait()
    await publisher.close()
    await receiver.close()
    return received


async def test_drops_repeat_with_the_seed() -> None:
    runs = []
    for seed in (1, 1, 2):
        hub = MemoryHub(seed=seed)
        rule = hub.add_rule(MessageRule("numbers", drop=0.3, max_times=20))
        received = await send_numbers(hub, 200, 180)
        assert rule.num_dropped == 20
        assert received == sorted(set(received))
        runs.append(received)
    assert runs[0] == runs[1] != runs[2]


async def test_duplicates_arrive_twice() -> None:
    hub = MemoryHub()
    rule = hub.add_rule(MessageRule("numbers", duplicate=1.0, max_times=3))
    assert await send_numbers(hub, 5, 8) == [0, 0, 1, 1, 2, 2, 3, 4]
    assert rule.num_duplicated == 3


async def test_delays_reorder() -> None:
    hub = MemoryHub(seed=7)
    rule = hub.add_rule(MessageRule("numbers", delay_s=(0.0, 0.05)))
    received = await send_numbers(hub, 50, 50)
    assert sorted(received) == list(range(50)) != received
    assert rule.num_delayed == 50


async def test_a_rule_can_cut_off_one_sender_or_the_replies() -> None:
    hub = MemoryHub()
    near, far, server = await hub.connect("near"), await hub.connect("far"), await hub.connect("server")

    async def echo(message: BusMessage) -> None:
        await message.respond(message.data)

    await server.subscribe("svc", echo)
    cut = hub.add_rule(MessageRule(">", drop=1.0, sender="far"))
    assert await near.request("svc", b"1", timeout_s=LIMIT_S) == b"1"
    with pytest.raises(RequestTimeout):
        await far.request("svc", b"2", timeout_s=0.02)
    assert cut.num_dropped == 1
    hub.rules.remove(cut)
    assert await far.request("svc", b"3", timeout_s=LIMIT_S) == b"3"
    lost_reply = hub.add_rule(MessageRule("_INBOX.>", drop=1.0, sender="server", max_times=1))
    with pytest.raises(RequestTimeout):
        await near.request("svc", b"4", timeout_s=0.02)
    assert lost_reply.num_dropped == 1
    assert await near.request("svc", b"5", timeout_s=LIMIT_S) == b"5"
    for bus in (near, far, server):
        await bus.close()


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.>", "a", False),
        ("a.>", "a.b.c", True),
        (">", "a", True),
        ("*.*.c", "a.b.c", True),
        ("a", "b", False),
    ],
)
def test_wildcards_are_those_of_nats(pattern: str, subject: str, expected: bool) -> None:
    assert matches(pattern, subject) is expected
