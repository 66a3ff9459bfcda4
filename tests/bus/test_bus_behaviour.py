"""What every bus must do: one suite, run on MemoryBus and on NatsBus with a real server."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from shared import messages
from shared.bus import BusMessage
from shared.errors import AmpdError, BusError, ErrorCode, NoResponders, RequestTimeout

LIMIT_S = 20.0  # on every wait of this file: only a failure takes that long


async def wait_for(condition: asyncio.Event) -> None:
    async with asyncio.timeout(LIMIT_S):
        await condition.wait()


async def echo(message: BusMessage) -> None:
    await message.respond(message.data)


class Collector:
    """Handlers that keep what arrives; `complete` is set at the num_wanted-th message."""

    def __init__(self, num_wanted: int) -> None:
        self.received: list[tuple[str, bytes]] = []
        self.complete = asyncio.Event()
        self._num_wanted = num_wanted

    def keep(self, message: BusMessage) -> None:
        self.received.append((message.subject, message.data))
        if len(self.received) == self._num_wanted:
            self.complete.set()

    async def keep_async(self, message: BusMessage) -> None:
        self.keep(message)


async def test_request_gets_the_handlers_answer(connect: Any) -> None:
    client, server = await connect("client"), await connect("server")
    await server.subscribe("svc.echo", echo)
    assert await client.request("svc.echo", b"\x00\xffhello", timeout_s=LIMIT_S) == b"\x00\xffhello"
    assert await client.request("svc.echo", b"", timeout_s=LIMIT_S) == b""
    assert client.counters["requests"] == 2


async def test_a_bus_hears_itself(connect: Any) -> None:
    bus = await connect("both")
    await bus.subscribe("svc.echo", echo)
    assert await bus.request("svc.echo", b"x", timeout_s=LIMIT_S) == b"x"


async def test_concurrent_requests_get_their_own_answers(connect: Any) -> None:
    client, server = await connect("client"), await connect("server")
    await server.subscribe("svc.echo", echo)
    payloads = [str(i).encode() for i in range(300)]
    answers = await asyncio.gather(*(client.request("svc.echo", p, timeout_s=LIMIT_S) for p in payloads))
    assert answers == payloads


async def test_no_responders_and_timeout_are_told_apart(connect: Any) -> None:
    client, server = await connect("client"), await connect("server")

    async def keep_silent(message: BusMessage) -> None:
        assert message.expects_reply

    with pytest.raises(NoResponders, match=r"svc\.nobody"):
        await client.request("svc.nobody", b"", timeout_s=LIMIT_S)
    await server.subscribe("svc.silent", keep_silent)
    with pytest.raises(RequestTimeout, match=r"svc\.silent"):
        await client.request("svc.silent", b"", timeout_s=0.05)
    assert (client.counters["no_responders"], client.counters["timeouts"]) == (1, 1)


async def test_a_late_answer_reaches_no_other_request(connect: Any) -> None:
    client, server = await connect("client"), await connect("server")
    release = asyncio.Event()
    answered = asyncio.Event()

    async def answer_late(message: BusMessage) -> None:
        if message.data == b"late":
            await wait_for(release)
        await message.respond(message.data)
        answered.set()

    await server.subscribe("svc.late", answer_late)
    with pytest.raises(RequestTimeout):
        await client.request("svc.late", b"late", timeout_s=0.05)
    release.set()
    await wait_for(answered)
    assert await client.request("svc.late", b"next", timeout_s=LIMIT_S) == b"next"


async def test_a_handlers_ampd_error_crosses_the_bus_in_the_requests_encoding(connect: Any) -> None:
    client, server = await connect("client"), await connect("server")

    async def refuse(message: BusMessage) -> None:
        raise AmpdError(ErrorCode.OVERLOADED, "try later", retry_after_s=1.5)

    await server.subscribe("svc.refuse", refuse)
    packed = await client.request("svc.refuse", messages.encode(messages.GetStatus()), timeout_s=LIMIT_S)
    as_json = await client.request("svc.refuse", b'{"type":"get_status"}', timeout_s=LIMIT_S)
    wanted = messages.ErrorReply(code=ErrorCode.OVERLOADED, message="try later", retry_after_s=1.5)
    assert messages.decode(packed) == messages.decode(as_json) == wanted
    assert json.loads(as_json)["code"] == "overloaded"
    assert server.counters["handler_errors"] == 0


async def test_a_bug_in_a_handler_is_counted_and_its_details_stay_here(connect: Any) -> None:
    client, server = await connect("client"), await connect("server")

    async def crash(message: BusMessage) -> None:
        raise ZeroDivisionError("the secret inside")

    await server.subscribe("svc.crash", crash)
    answer = messages.decode(await client.request("svc.crash", b"", timeout_s=LIMIT_S))
    assert isinstance(answer, messages.ErrorReply)
    assert answer.code == ErrorCode.INTERNAL
    assert "secret" not in answer.message
    assert server.counters["handler_errors"] == 1


async def test_a_failure_after_the_answer_does_not_answer_twice(connect: Any) -> None:
    client, server = await connect("client"), await connect("server")

    async def answer_and_crash(message: BusMessage) -> None:
        await message.respond(b"done")
        raise RuntimeError("afterwards")

    await server.subscribe("svc.twice", answer_and_crash)
    replies = await client.request_many("svc.twice", b"", timeout_s=0.3, enough=lambda replies: len(replies) == 2)
    assert replies == [b"done"]
    assert server.counters["handler_errors"] == 1


async def test_an_ordered_handler_that_fails_goes_on_with_the_next_message(connect: Any) -> None:
    publisher, receiver = await connect("publisher"), await connect("receiver")
    collector = Collector(2)

    def fail_first(message: BusMessage) -> None:
        collector.keep(message)
        if message.data == b"1":
            raise ValueError("first")

    await receiver.subscribe_ordered("t.x", fail_first)
    await publisher.publish("t.x", b"1")
    await publisher.publish("t.x", b"2")
    await wait_for(collector.complete)
    assert receiver.counters["handler_errors"] == 1


async def test_ordered_delivery_over_many_subjects(connect: Any) -> None:
    publisher, receiver = await connect("publisher"), await connect("receiver")
    collector = Collector(5000)
    await receiver.subscribe_ordered("stream.*.tokens", collector.keep)
    for i in range(5000):
        await publisher.publish(f"stream.{i % 7}.tokens", str(i).encode())
    await wait_for(collector.complete)
    assert [int(data) for _, data in collector.received] == list(range(5000))
    assert publisher.counters["published"] == 5000
    assert receiver.counters["slow_consumers"] == 0


@pytest.mark.parametrize(
    ("pattern", "subjects_heard"),
    [
        ("a.*.c", {"a.b.c", "a.x.c"}),
        ("a.>", {"a.b", "a.b.c", "a.x.c", "a.b.c.d"}),
        ("*.b", {"a.b", "z.b"}),
        ("a.b", {"a.b"}),
        (">", {"a", "a.b", "a.b.c", "a.x.c", "a.b.c.d", "z.b"}),
    ],
)
async def test_wildcards(connect: Any, pattern: str, subjects_heard: set[str]) -> None:
    publisher, receiver = await connect("publisher"), await connect("receiver")
    heard: set[str] = set()
    finished = asyncio.Event()
    own = {"a", "a.b", "a.b.c", "a.x.c", "a.b.c.d", "z.b"}

    def note(message: BusMessage) -> None:
        if message.subject in own:
            heard.add(message.subject)

    await receiver.subscribe_ordered(pattern, note)
    await receiver.subscribe_ordered("end.of.test", lambda message: finished.set())
    for subject in sorted(own):
        await publisher.publish(subject, b"")
    await publisher.publish("end.of.test", b"")
    await wait_for(finished)
    await receiver.flush()  # every message sent before has reached its subscription's queue ...
    await receiver.close()  # ... and closing works off what is queued
    assert heard == subjects_heard


async def test_every_plain_subscriber_and_one_of_each_queue_group_gets_a_message(connect: Any) -> None:
    publisher = await connect("publisher")
    seen: Counter[str] = Counter()
    plain = Collector(200)
    everyone = asyncio.Event()

    def counting(name: str) -> Any:
        async def count(message: BusMessage) -> None:
            seen[name] += 1
            if sum(seen.values()) == 400:
                everyone.set()

        return count

    for name in ("red-1", "red-2", "red-3", "blue-1"):
        member = await connect(name)
        await member.subscribe("work.>", counting(name), queue=name.split("-")[0])
    await (await connect("plain")).subscribe("work.>", plain.keep_async)
    for i in range(200):
        await publisher.publish(f"work.{i}", b"")
    await wait_for(everyone)
    await wait_for(plain.complete)
    assert seen["blue-1"] == 200
    assert sum(seen[f"red-{i}"] for i in (1, 2, 3)) == 200
    assert all(seen[f"red-{i}"] > 0 for i in (1, 2, 3))


async def test_a_slow_handler_does_not_hold_up_others_and_the_bound_holds(connect: Any) -> None:
    publisher, receiver = await connect("publisher"), await connect("receiver")
    release = asyncio.Event()
    two_running = asyncio.Event()
    all_done = asyncio.Event()
    running = 0
    most = 0
    started: list[bytes] = []

    async def work(message: BusMessage) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        started.append(message.data)
        if running == 2:
            two_running.set()
        await wait_for(release)
        running -= 1
        if len(started) == 6 and running == 0:
            all_done.set()

    await receiver.subscribe("slow", work, max_in_flight=2)
    await receiver.subscribe("quick", echo)
    for i in range(6):
        await publisher.publish("slow", str(i).encode())
    await wait_for(two_running)
    # the slow ones hold both their slots; another subscription of the same bus still answers
    assert await publisher.request("quick", b"now", timeout_s=LIMIT_S) == b"now"
    assert started == [b"0", b"1"]
    release.set()
    await wait_for(all_done)
    assert most == 2
    assert started == [str(i).encode() for i in range(6)]


async def test_payloads_up_to_the_limit_pass_and_larger_ones_are_refused_here(connect: Any) -> None:
    client, server = await connect("client"), await connect("server")
    await server.subscribe("svc.echo", echo)
    assert client.max_payload == 8 * 1024 * 1024
    largest = bytes(range(256)) * (client.max_payload // 256)
    assert await client.request("svc.echo", largest, timeout_s=LIMIT_S) == largest
    for send in (client.publish, lambda s, d: client.request(s, d, timeout_s=LIMIT_S)):
        with pytest.raises(AmpdError, match="8,388,609 bytes exceeds") as caught:
            await send("svc.echo", largest + b"x")
        assert caught.value.code == ErrorCode.INVALID_REQUEST
    assert await client.request("svc.echo", b"still here", timeout_s=LIMIT_S) == b"still here"


async def test_an_answer_that_is_too_large_becomes_an_error_reply(connect: Any) -> None:
    client, server = await connect("client"), await connect("server")

    async def answer_too_much(message: BusMessage) -> None:
        await message.respond(bytes(server.max_payload + 1))

    await server.subscribe("svc.large", answer_too_much)
    answer = messages.decode(await client.request("svc.large", b"", timeout_s=LIMIT_S))
    assert isinstance(answer, messages.ErrorReply)
    assert answer.code == ErrorCode.INVALID_REQUEST


async def test_unsubscribe_ends_delivery_and_waits_for_running_handlers(connect: Any) -> None:
    client, server = await connect("client"), await connect("server")
    started, release = asyncio.Event(), asyncio.Event()
    finished: list[bytes] = []

    async def work(message: BusMessage) -> None:
        started.set()
        await wait_for(release)
        finished.append(message.data)

    subscription = await server.subscribe("svc.work", work)
    await client.publish("svc.work", b"1")
    await wait_for(started)
    ending = asyncio.create_task(subscription.unsubscribe())
    await server.flush()
    release.set()
    async with asyncio.timeout(LIMIT_S):
        await ending
    assert finished == [b"1"]
    with pytest.raises(NoResponders):
        await client.request("svc.work", b"2", timeout_s=LIMIT_S)
    await subscription.unsubscribe()  # again does nothing


async def test_a_handler_may_unsubscribe_itself(connect: Any) -> None:
    client, server = await connect("client"), await connect("server")
    done = asyncio.Event()

    async def only_once(message: BusMessage) -> None:
        await subscription.unsubscribe()
        await message.respond(b"once")
        done.set()

    subscription = await server.subscribe("svc.once", only_once)
    assert await client.request("svc.once", b"", timeout_s=LIMIT_S) == b"once"
    await wait_for(done)
    with pytest.raises(NoResponders):
        await client.request("svc.once", b"", timeout_s=LIMIT_S)


async def test_close_works_off_what_has_arrived_and_is_idempotent(connect: Any) -> None:
    client, server = await connect("client"), await connect("server")
    arrived, release = asyncio.Event(), asyncio.Event()

    async def answer_when_told(message: BusMessage) -> None:
        arrived.set()
        await wait_for(release)
        await message.respond(message.data)

    await server.subscribe("svc.slow", answer_when_told, max_in_flight=1)
    asked = [asyncio.create_task(client.request("svc.slow", bytes([i]), timeout_s=LIMIT_S)) for i in range(3)]
    await wait_for(arrived)
    await client.flush()
    closing = asyncio.create_task(server.close())
    release.set()
    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(closing, server.close())
    assert await asyncio.gather(*asked) == [b"\x00", b"\x01", b"\x02"]
    await server.close()


async def test_a_closed_bus_refuses_with_a_typed_error(connect: Any) -> None:
    bus = await connect("closed")
    arrived = asyncio.Event()
    await bus.subscribe_ordered("svc.silent", lambda message: arrived.set())
    waiting = asyncio.create_task(bus.request("svc.silent", b"", timeout_s=LIMIT_S))
    await wait_for(arrived)
    await bus.close()
    with pytest.raises(BusError, match="closed"):
        await waiting
    with pytest.raises(BusError):
        await bus.publish("a.b", b"")
    with pytest.raises(BusError):
        await bus.request("a.b", b"", timeout_s=LIMIT_S)
    with pytest.raises(BusError):
        await bus.subscribe("a.b", echo)
    with pytest.raises(BusError):
        await bus.flush()


async def test_programming_errors_are_not_sent(connect: Any) -> None:
    bus = await connect("bus")
    for subject in ("", "a b", "a..b", ".a", "a.", "a.*", ">"):
        with pytest.raises(ValueError, match="not a subject"):
            await bus.publish(subject, b"")
    for subject in ("", "a b", "a..b", "a.>.b", "a*.b"):
        with pytest.raises(ValueError, match="not a subject"):
            await bus.subscribe_ordered(subject, lambda message: None)
    with pytest.raises(TypeError, match="bytes"):
        await bus.publish("a", "text")


async def test_services_answer_discovery(connect: Any) -> None:
    asker, first, second = await connect("asker"), await connect("first"), await connect("second")
    for bus, worker in ((first, "w1"), (second, "w2")):
        await bus.subscribe(f"svc.{worker}.echo", echo, queue="q")
        await bus.register_service("decode-worker", "0.1.0", {"worker_id": worker})
    await asker.request("svc.w1.echo", b"", timeout_s=LIMIT_S)

    replies = await asker.request_many("$SRV.PING", b"", timeout_s=LIMIT_S, enough=lambda replies: len(replies) == 2)
    pings = {ping["metadata"]["worker_id"]: ping for ping in map(json.loads, replies)}
    assert set(pings) == {"w1", "w2"}
    assert pings["w1"]["type"] == "io.nats.micro.v1.ping_response"
    assert (pings["w1"]["name"], pings["w1"]["version"]) == ("decode-worker", "0.1.0")
    assert pings["w1"]["id"] != pings["w2"]["id"]
    assert pings["w1"]["metadata"]["host"]
    assert int(pings["w1"]["metadata"]["pid"]) > 0

    info = json.loads(await asker.request(f"$SRV.INFO.decode-worker.{pings['w1']['id']}", b"", timeout_s=LIMIT_S))
    assert info["type"] == "io.nats.micro.v1.info_response"
    assert info["endpoints"] == [{"name": "svc_w1_echo", "subject": "svc.w1.echo", "queue_group": "q", "metadata": {}}]
    stats = json.loads(await asker.request(f"$SRV.STATS.decode-worker.{pings['w1']['id']}", b"", timeout_s=LIMIT_S))
    assert stats["type"] == "io.nats.micro.v1.stats_response"
    assert stats["started"].endswith("Z")
    [endpoint] = stats["endpoints"]
    assert (endpoint["num_requests"], endpoint["num_errors"]) == (1, 0)
    assert endpoint["processing_time"] == endpoint["average_processing_time"] > 0

    await first.close()
    with pytest.raises(NoResponders):
        await asker.request(f"$SRV.PING.decode-worker.{pings['w1']['id']}", b"", timeout_s=LIMIT_S)


async def test_a_service_registers_once_and_with_a_proper_name(connect: Any) -> None:
    bus = await connect("bus")
    for name, version in (("no spaces", "0.1.0"), ("fine", "one")):
        with pytest.raises(ValueError, match="a service"):
            await bus.register_service(name, version, {})
    await bus.register_service("fine", "0.1.0", {})
    with pytest.raises(RuntimeError, match="registered already"):
        await bus.register_service("fine", "0.1.0", {})
