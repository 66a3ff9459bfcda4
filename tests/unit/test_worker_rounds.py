"""Two workers, a real tiny model and real KV sockets, commanded by hand as the coordinator would."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.worker.context import WorkerContext, WorkerLimits
from services.worker.outbox import Outbox
from services.worker.runtime import WorkerRuntime
from services.worker.streams import StreamPublisher
from shared import subjects
from shared.core.types import RoundKey, SessionKey
from shared.engine.engine_loop import EngineLoop, build_scheduler
from shared.engine.model_files import resolve_model
from shared.engine.model_runner import ModelRunner
from shared.errors import AmpdError, ErrorCode
from shared.memory_bus import MemoryHub
from shared.messages import (
    Ack,
    CancelRun,
    DropSession,
    Message,
    NeedTokens,
    PrefillTask,
    RemotePrefill,
    RoundEnded,
    RunRound,
    RunRoundAck,
    SamplingParams,
    Slo,
    StopConditions,
    decode,
    encode,
    pack_token_ids,
    raise_if_error,
    unpack_token_ids,
)
from shared.text import TextCodec
from shared.transport.client import KvClient
from shared.transport.leases import LeaseTable
from shared.transport.server import KvServer
from shared.transport.tickets import TicketClaims, mint

SECRET = b"0123456789abcdef"


class Worker:
    def __init__(self, runtime: WorkerRuntime, runner: ModelRunner) -> None:
        self.runtime = runtime
        self.runner = runner
        self.id = runtime.context.worker_id
        self.incarnation = runtime.context.incarnation
        self.scheduler = runtime.context.engine.scheduler


class Commander:
    """Stands in for the coordinator: signs tickets, sends commands, acknowledges and keeps events."""

    def __init__(self, bus: Any) -> None:
        self.bus = bus
        self.ended: asyncio.Queue[RoundEnded] = asyncio.Queue()
        self.prefills: asyncio.Queue[Message] = asyncio.Queue()

    async def listen(self) -> None:
        async def on_event(message: Any) -> None:
            event = decode(message.data)
            await (self.ended if isinstance(event, RoundEnded) else self.prefills).put(event)
            await message.respond(encode(Ack()))

        await self.bus.subscribe(subjects.COORDINATOR_EVENT, on_event)

    async def command(self, worker: Worker, message: Message) -> Message:
        reply = await self.bus.request(subjects.worker_command(worker.id), encode(message), timeout_s=5.0)
        return raise_if_error(decode(reply))

    def ticket(self, key: RoundKey, source: Worker, destination: Worker) -> bytes:
        claims = TicketClaims(
            key=key,
            source=source.id,
            source_incarnation=source.incarnation,
            destination=destination.id,
            destination_incarnation=destination.incarnation,
            max_bytes=1 << 30,
            ttl_s=60.0,
            nonce=secrets.token_bytes(16),
        )
        return mint(SECRET, claims)

    def run_round(
        self,
        decoder: Worker,
        history: list[int],
        new: list[int],
        *,
        tokens_start: int = 0,
        round_index: int = 0,
        attempt: int = 1,
        forced: list[int] | None = None,
        remote: Worker | None = None,
        max_output_tokens: int = 8,
    ) -> RunRound:
        tokens = history + new + (forced or [])
        key = RoundKey("t", "s", round_index, attempt)
        return RunRound(
            tenant="t",
            session="s",
            round=round_index,
            attempt=attempt,
            incarnation=decoder.incarnation,
            tokens_start=tokens_start,
            prefix_checksum=zlib.crc32(pack_token_ids(tokens[:tokens_start])),
            token_ids=pack_token_ids(tokens[tokens_start:]),
            num_history_tokens=len(history),
            num_input_tokens=len(new),
            num_forced_tokens=len(forced or []),
            sampling=SamplingParams(),
            stop=StopConditions(max_output_tokens=max_output_tokens, ignore_eos=True),
            slo=Slo(),
            deadline_s=30.0,
            stream_encoding="msgpack",
            remote=None
            if remote is None
            else RemotePrefill(
                worker_id=remote.id, incarnation=remote.incarnation, ticket=self.ticket(key, remote, decoder)
            ),
        )

    async def start(self, decoder: Worker, message: RunRound, tokens: list[int], remote: Worker | None) -> RunRoundAck:
        ack = await self.command(decoder, message)
        assert isinstance(ack, RunRoundAck)
        if remote is not None:
            key = RoundKey("t", "s", message.round, message.attempt)
            history = ack.history and ack.history.__class__(
                **{**_fields(ack.history), "ticket": self.ticket(key, decoder, remote)}
            )
            task = PrefillTask(
                tenant="t",
                session="s",
                round=message.round,
                attempt=message.attempt,
                incarnation=remote.incarnation,
                num_cached_tokens=ack.num_cached_tokens,
                token_ids=pack_token_ids(tokens[ack.num_cached_tokens :]),
                num_forced_tokens=message.num_forced_tokens,
                sampling=message.sampling,
                slo=message.slo,
                waited_s=0.0,
                deadline_s=30.0,
                history=history,
                decode_worker=decoder.id,
                decode_incarnation=decoder.incarnation,
            )
            assert isinstance(await self.command(remote, task), Ack)
        return ack

    async def end(self) -> RoundEnded:
        return await asyncio.wait_for(self.ended.get(), 30)


def _fields(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return resolve_model("tiny-random")


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def generate(prompt: list[int], num_tokens: int) -> list[int]:
        inputs = torch.tensor([prompt])
        return model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()

    return generate


@pytest.fixture
async def cluster(model_dir: Path, tmp_path: Path) -> AsyncIterator[tuple[Commander, Worker, Worker]]:
    """(commander, prefill worker, decode worker); at the end nothing may be left in either."""
    hub = MemoryHub()
    commander = Commander(await hub.connect("commander"))
    await commander.listen()
    stop = asyncio.Event()
    workers, serving, closers = [], [], []
    for role in ("prefill", "decode"):
        runner = ModelRunner.load(model_dir, dtype="float32", num_blocks=200)
        leases, bus = LeaseTable(time.monotonic), await hub.connect(role)
        incarnation = secrets.randbits(63)
        server = KvServer(
            runner.pool,
            leases,
            worker_id=role,
            incarnation=incarnation,
            secret=SECRET,
            listen=[f"unix://{tmp_path}/{role}.sock", "tcp://127.0.0.1:0"],
        )
        client = KvClient(runner.pool, worker_id=role, incarnation=incarnation)
        context = WorkerContext(
            worker_id=role,
            incarnation=incarnation,
            bus=bus,
            engine=EngineLoop(
                runner,
                build_scheduler(runner, chunk_tokens=16, max_prefill_tokens=32, max_batch=8),
                clock=time.monotonic,
            ),
            leases=leases,
            kv_client=client,
            kv_endpoints=server.start(),
            codec=TextCodec.load(model_dir),
            outbox=Outbox(bus),
            streams=StreamPublisher(bus),
            clock=time.monotonic,
            max_context_tokens=runner.max_context_tokens,
            limits=WorkerLimits(lease_ttl_s=5.0),
        )
        runtime = WorkerRuntime(context, role=role, model="tiny-random")  # type: ignore[arg-type]
        workers.append(Worker(runtime, runner))
        serving.append(asyncio.create_task(runtime.serve(stop, drain_timeout_s=5.0)))
        closers.append((client, server, bus))
    yield commander, workers[0], workers[1]
    await commander.command(workers[1], DropSession(tenant="t", session="s"))
    await commander.command(workers[0], DropSession(tenant="t", session="s"))
    stop.set()
    await asyncio.wait_for(asyncio.gather(*serving), 20)
    for worker in workers:
        worker.scheduler.check_integrity()
        assert worker.scheduler.allocator.num_free == worker.scheduler.allocator.num_usable
        assert len(worker.runtime.context.leases) == 0
    for client, server, bus in closers:
        await client.close()
        server.close()
        await bus.close()
    await commander.bus.close()


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
    forged_message = RunRound(**{**_fields(message), "remote": forged})
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
