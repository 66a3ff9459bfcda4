"""Two workers, a real tiny model and real KV sockets, commanded by hand as the coordinator would."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoModelForCausalLM

from services.worker.context import WorkerContext, WorkerLimits
from services.worker.outbox import Outbox
from services.worker.runtime import WorkerRuntime
from services.worker.streams import StreamPublisher
from shared import subjects
from shared.core.policies import SchedulingPolicy, find_policy
from shared.core.resident_key import resident_key
from shared.core.types import RoundKey, SessionKey
from shared.engine.engine_loop import EngineLoop, build_scheduler
from shared.engine.model_runner import ModelRunner
from shared.errors import NoResponders
from shared.memory_bus import MemoryHub
from shared.messages import (
    Ack,
    CancelRun,
    DropSession,
    GrantHistory,
    HistoryGranted,
    KvSource,
    KvStaged,
    Message,
    PrefillEnded,
    PrefillTask,
    RemotePrefill,
    ResidentKv,
    Role,
    RoundEnded,
    RunRound,
    RunRoundAck,
    SamplingParams,
    Slo,
    StageKv,
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
        self.sessions: set[str] = {"s"}
        self.ended: asyncio.Queue[RoundEnded] = asyncio.Queue()
        self.prefills: asyncio.Queue[PrefillEnded] = asyncio.Queue()
        self.staged: asyncio.Queue[KvStaged] = asyncio.Queue()

    async def listen(self) -> None:
        async def on_event(message: Any) -> None:
            match decode(message.data):
                case RoundEnded() as ended:
                    await self.ended.put(ended)
                case PrefillEnded() as prefilled:
                    await self.prefills.put(prefilled)
                case KvStaged() as staged:
                    await self.staged.put(staged)
            await message.respond(encode(Ack()))

        await self.bus.subscribe(subjects.COORDINATOR_EVENT, on_event)

    async def command(self, worker: Worker, message: Message) -> Message:
        reply = await self.bus.request(subjects.worker_command(worker.id), encode(message), timeout_s=5.0)
        return raise_if_error(decode(reply))

    async def wait_until_listening(self, worker: Worker) -> None:
        while True:
            with contextlib.suppress(NoResponders):
                await self.command(worker, CancelRun(tenant="t", session="nobody", round=0, attempt=1))
                return
            await asyncio.sleep(0)

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
        session: str = "s",
        source: KvSource | None = None,
        num_source_tokens: int = 0,
    ) -> RunRound:
        self.sessions.add(session)
        tokens = history + new + (forced or [])
        key = RoundKey("t", session, round_index, attempt)
        return RunRound(
            tenant="t",
            session=session,
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
            source=source,
            num_source_tokens=num_source_tokens,
            remote=None
            if remote is None
            else RemotePrefill(
                worker_id=remote.id, incarnation=remote.incarnation, ticket=self.ticket(key, remote, decoder)
            ),
        )

    async def start(
        self, decoder: Worker, message: RunRound, tokens: list[int], remote: Worker | None, **task_fields: Any
    ) -> RunRoundAck:
        ack = await self.command(decoder, message)
        assert isinstance(ack, RunRoundAck)
        if remote is not None:
            task = self.prefill_task(decoder, message, tokens, remote, ack, **task_fields)
            assert isinstance(await self.command(remote, task), Ack)
        return ack

    def prefill_task(
        self, decoder: Worker, message: RunRound, tokens: list[int], remote: Worker, ack: RunRoundAck, **fields: Any
    ) -> PrefillTask:
        key = RoundKey("t", message.session, message.round, message.attempt)
        history = None
        if ack.history is not None:
            history = _replace(ack.history, ticket=self.ticket(key, decoder, remote))
        task = PrefillTask(
            tenant="t",
            session=message.session,
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
            prefix_checksum=zlib.crc32(pack_token_ids(tokens[: ack.num_cached_tokens])),
        )
        return _replace(task, **fields)

    async def end(self) -> RoundEnded:
        return await asyncio.wait_for(self.ended.get(), 120)


class Conversation:
    """A session played round by round. `tokens` is all of it so far; `ack` what the decode worker had of it."""

    def __init__(self, commander: Commander, decoder: Worker, session: str = "s") -> None:
        self.commander = commander
        self.decoder = decoder
        self.session = session
        self.tokens: list[int] = []
        self.index = 0
        self.ack: RunRoundAck | None = None

    async def play(
        self,
        new: list[int],
        remote: Worker | None = None,
        *,
        keep: bool = False,
        resident: ResidentKv | None = None,
        max_output_tokens: int = 8,
        granted: HistoryGranted | None = None,
    ) -> RoundEnded:
        """One round to its end, which must be a good one."""
        commander, prompt = self.commander, self.tokens + new
        message = commander.run_round(
            self.decoder,
            self.tokens,
            new,
            round_index=self.index,
            remote=remote,
            max_output_tokens=max_output_tokens,
            session=self.session,
            source=granted.history if granted is not None else None,
            num_source_tokens=granted.num_tokens if granted is not None else 0,
        )
        self.ack = await commander.start(self.decoder, message, prompt, remote, keep=keep, resident=resident)
        ended = await commander.end()
        assert ended.error is None, ended.error
        assert ended.session == self.session
        self.index += 1
        self.tokens = prompt + unpack_token_ids(ended.output_token_ids)
        return ended

    @property
    def num_cached(self) -> int:
        assert self.ack is not None
        return self.ack.num_cached_tokens

    def resident(self, num_tokens: int) -> ResidentKv:
        """The claim that [0, num_tokens) of this conversation is held."""
        return ResidentKv(num_tokens=num_tokens, checksum=zlib.crc32(pack_token_ids(self.tokens[:num_tokens])))

    async def leave_for(self, worker: Worker) -> HistoryGranted:
        """The next round runs at `worker`; what the decode worker lends it, with the ticket to read it."""
        source = self.decoder
        grant = GrantHistory(
            tenant="t",
            session=self.session,
            incarnation=source.incarnation,
            num_tokens=len(self.tokens),
            hold=True,
        )
        granted = await self.commander.command(source, grant)
        assert isinstance(granted, HistoryGranted)
        self.decoder = worker
        ticket = self.commander.ticket(resident_key(SessionKey("t", self.session)), source, worker)
        return _replace(granted, history=_replace(granted.history, ticket=ticket))

    async def stage(self, prefiller: Worker, resident: ResidentKv | None) -> StageKv:
        """Have the decode worker grant its KV, and the prefill worker pull what it lacks of it."""
        commander, decoder = self.commander, self.decoder
        granted = await commander.command(
            decoder,
            GrantHistory(
                tenant="t", session=self.session, incarnation=decoder.incarnation, num_tokens=len(self.tokens)
            ),
        )
        assert isinstance(granted, HistoryGranted)
        ticket = commander.ticket(resident_key(SessionKey("t", self.session)), decoder, prefiller)
        message = StageKv(
            tenant="t",
            session=self.session,
            incarnation=prefiller.incarnation,
            resident=resident,
            num_tokens=granted.num_tokens,
            checksum=zlib.crc32(pack_token_ids(self.tokens[: granted.num_tokens])),
            history=_replace(granted.history, ticket=ticket),
            decode_worker=decoder.id,
            decode_incarnation=decoder.incarnation,
        )
        assert isinstance(await commander.command(prefiller, message), Ack)
        return message


def _replace(struct: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(struct, **changes)


@contextlib.asynccontextmanager
async def start_pair(
    model_dir: Path,
    folder: Path,
    *,
    policy: SchedulingPolicy | None = None,
    num_blocks: int = 200,
    host_kv_bytes: int = 0,
    limits: WorkerLimits | None = None,
    takes: Role | None = None,
    parallel_degrees: tuple[int, int] = (1, 1),
) -> AsyncIterator[tuple[Commander, Worker, Worker]]:
    """(commander, prefill worker, decode worker), or two workers of the role that `takes` says; at the end nothing may
    be left in either of any session started. parallel_degrees: of each; above 1 only one of them may be."""
    hub = MemoryHub()
    commander = Commander(await hub.connect("commander"))
    await commander.listen()
    stop = asyncio.Event()
    workers, serving, closers = [], [], []
    for role, degree in zip(("prefill", "decode"), parallel_degrees, strict=True):
        runner = ModelRunner.load(model_dir, dtype="float32", num_blocks=num_blocks, parallel_degree=degree)
        leases, bus = LeaseTable(time.monotonic), await hub.connect(role)
        incarnation = secrets.randbits(63)
        server = KvServer(
            runner.pool,
            leases,
            worker_id=role,
            incarnation=incarnation,
            secret=SECRET,
            listen=[f"unix://{folder}/{role}.sock", "tcp://127.0.0.1:0"],
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
            policy=policy or find_policy("ampd"),
            host_kv_bytes=host_kv_bytes,
            limits=limits or WorkerLimits(lease_ttl_s=5.0),
        )
        runtime = WorkerRuntime(context, role=takes or role, model="tiny-random")  # type: ignore[arg-type]
        workers.append(Worker(runtime, runner))
        serving.append(asyncio.create_task(runtime.serve(stop, drain_timeout_s=5.0)))
        closers.append((client, server, bus))
    try:
        async with asyncio.timeout(20):
            for worker in workers:
                await commander.wait_until_listening(worker)
        yield commander, workers[0], workers[1]
        for worker in workers:
            worker.runtime.check_integrity()
            for session in sorted(commander.sessions):
                await commander.command(worker, DropSession(tenant="t", session=session))
    finally:
        stop.set()
        await asyncio.wait_for(asyncio.gather(*serving), 20)
        for client, server, bus in closers:
            await client.close()
            server.close()
            await bus.close()
        await commander.bus.close()
        for worker in workers:
            worker.runner.close()
    for worker in workers:
        worker.runtime.check_integrity()
        assert worker.scheduler.allocator.num_free == worker.scheduler.allocator.num_usable
        assert len(worker.runtime.context.leases) == 0
        tier = worker.runtime.context.engine.host_tier
        assert tier is None or tier.num_tokens == 0


def load_reference(model_dir: Path) -> Callable[[list[int], int], list[int]]:
    """What plain `generate` says in fp32: (prompt, number of tokens) -> tokens."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def generate(prompt: list[int], num_tokens: int) -> list[int]:
        inputs = torch.tensor([prompt])
        output: list[int] = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        return output

    return generate
