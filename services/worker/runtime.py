"""A worker: one runtime in which the role is a setting. It answers commands, keeps the engine running, reports."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from services.worker.context import WorkerContext
from services.worker.decode import DecodeRole
from services.worker.prefill import PrefillRole
from shared import subjects
from shared.bus import BusMessage
from shared.core.types import SessionKey
from shared.errors import AmpdError, BusError, ErrorCode
from shared.messages import (
    Ack,
    CancelRun,
    DropSession,
    GrantHistory,
    Heartbeat,
    KvOffer,
    KvRenew,
    Message,
    PrefillDone,
    PrefillTask,
    Role,
    RunRound,
    SetRole,
    StageKv,
    WorkerLeaving,
    decode,
    encode,
)

log = structlog.get_logger(__name__)

HEARTBEAT_S = 0.5
MAX_CHANGES_TOLD = 256  # of sessions' KV in one heartbeat; the others are told in the next


class WorkerRuntime:
    """Both roles are always there, and every command is carried out. `role` is what is advertised, and so what new work
    the coordinator sends: it can change while work of the other kind is under way."""

    def __init__(self, context: WorkerContext, *, role: Role, model: str) -> None:
        self.context = context
        self.role: Role = role
        self._model = model
        context.engine.follow(
            context.policy, context.costs, host_kv_bytes=context.host_kv_bytes, host_read_s=context.host_read_s
        )
        self.prefill = PrefillRole(context)
        self.decode = DecodeRole(context, self.prefill.hand_back)
        self._heartbeat_seq = 0

    # -------------------------------------------------------------------------------- lifecycle

    async def serve(self, stop: asyncio.Event, *, drain_timeout_s: float) -> None:
        """Run until `stop` is set, then drain and leave. A failed internal task ends the worker with its exception."""
        context = self.context
        for coroutine, name in (
            (context.engine.run(), "engine"),
            (context.streams.run(), "streams"),
            (self.prefill.run(), "prefills"),
            (self._every(HEARTBEAT_S, self.send_heartbeat), "heartbeats"),
            (self._every(context.limits.lease_ttl_s / 3, self.prefill.renew_leases), "renewals"),
            (self._every(context.limits.lease_ttl_s / 3, self.decode.renew_leases), "move renewals"),
            (self._every(0.25, self._expire), "deadlines"),
        ):
            context.spawn(coroutine, name)
        commands = await context.bus.subscribe(subjects.worker_command(context.worker_id), self._answer(self.command))
        peers = await context.bus.subscribe(subjects.worker_peer(context.worker_id), self._answer(self.peer))
        await context.bus.register_service(
            f"ampd-{self.role}-worker",
            "0.1.0",
            {"worker_id": context.worker_id, "role": self.role, "incarnation": str(context.incarnation)},
        )
        log.info("worker_ready", worker_id=context.worker_id, role=self.role, endpoints=list(context.kv_endpoints))
        try:
            await self._watch(stop)
            await self._drain(drain_timeout_s)
        finally:
            await commands.unsubscribe()
            await self.prefill.close()
            await self.decode.close()
            await peers.unsubscribe()
            await context.outbox.close()
            await self._cancel_tasks()

    async def _watch(self, stop: asyncio.Event) -> None:
        """Wait for `stop`, or raise what ended one of the worker's tasks."""
        stopping = asyncio.create_task(stop.wait())
        try:
            while not stopping.done():
                tasks = self.context.tasks
                done, _ = await asyncio.wait({stopping, *tasks}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                for task in done & tasks:
                    tasks.discard(task)
                    if not task.cancelled():
                        task.result()
        finally:
            stopping.cancel()

    async def _drain(self, timeout_s: float) -> None:
        """No new rounds; those that run may finish; then say goodbye."""
        context = self.context
        context.draining = True
        log.info("worker_draining", worker_id=context.worker_id, rounds=self.decode.num_active)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.send_heartbeat()
                while self.decode.num_active or self.prefill.num_active:  # noqa: ASYNC110 - bounded by the timeout
                    await asyncio.sleep(0.02)
                await context.streams.drain()
                await context.outbox.drain(timeout_s)
        leaving = WorkerLeaving(worker_id=context.worker_id, incarnation=context.incarnation)
        with contextlib.suppress(BusError):
            await context.bus.request(subjects.COORDINATOR_EVENT, encode(leaving), timeout_s=1.0)

    async def _cancel_tasks(self) -> None:
        tasks = list(self.context.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _every(self, period_s: float, action: Callable[[], Awaitable[None]]) -> None:
        while True:
            await action()
            await asyncio.sleep(period_s)

    async def _expire(self) -> None:
        self.context.leases.expire()
        self.prefill.expire_deadlines()
        await self.decode.expire_deadlines()

    # --------------------------------------------------------------------------------- messages

    def _answer(self, handle: Callable[[Message], Awaitable[Message]]) -> Callable[[BusMessage], Awaitable[None]]:
        async def answer(message: BusMessage) -> None:
            await message.respond(encode(await handle(decode(message.data))))

        return answer

    async def command(self, message: Message) -> Message:
        """Carry out a WorkerCommand; an AmpdError is answered as ErrorReply by the bus."""
        match message:
            case RunRound():
                return await self.decode.run_round(message)
            case PrefillTask():
                return await self.prefill.prefill_task(message)
            case GrantHistory():
                return await self.decode.grant_history(message)
            case StageKv():
                return await self.prefill.stage_kv(message)
            case CancelRun():
                await self.prefill.cancel_run(message)
                return await self.decode.cancel_run(message)
            case DropSession():
                session = SessionKey(message.tenant, message.session)
                jobs = self.prefill.list_jobs(session)
                reply = await self.decode.drop_session(message)
                await self.prefill.drop_session(session, jobs)
                return reply
            case SetRole():
                return await self._set_role(message)
            case _:
                raise AmpdError(ErrorCode.MALFORMED_MESSAGE, f"{type(message).__name__} is no worker command")

    async def peer(self, message: Message) -> Message:
        """Answer another worker."""
        match message:
            case KvOffer():
                return await self.decode.kv_offer(message)
            case PrefillDone():
                return await self.decode.prefill_done(message)
            case KvRenew():
                self.context.leases.renew(message.lease_id, message.generation)
                return Ack()
            case _:
                raise AmpdError(ErrorCode.MALFORMED_MESSAGE, f"{type(message).__name__} is no message between workers")

    async def _set_role(self, message: SetRole) -> Message:
        """Advertise the role, at once. Rounds, prefills and KV that are here stay until they end or are dropped."""
        context = self.context
        if message.incarnation != context.incarnation:
            raise AmpdError(
                ErrorCode.WRONG_INCARNATION, f"this is incarnation {context.incarnation} of {context.worker_id}"
            )
        if context.draining:
            raise AmpdError(ErrorCode.DRAINING, "the worker is stopping: it takes no other role")
        if message.role != self.role:
            log.info("role_changed", worker_id=context.worker_id, role=message.role, previous=self.role)
            self.role = message.role
        await self.send_heartbeat()
        return Ack()

    # ------------------------------------------------------------------------------- heartbeats

    async def send_heartbeat(self) -> None:
        try:
            await self.context.bus.publish(subjects.heartbeat(self.context.worker_id), encode(self.heartbeat()))
        except AmpdError as error:
            log.debug("heartbeat_lost", error=error.message)

    def heartbeat(self) -> Heartbeat:
        context = self.context
        runner, scheduler = context.engine.runner, context.engine.scheduler
        now = context.clock()
        queue, queue_num_tokens = self.prefill.queue_metadata()
        residents = self.prefill.residents
        residents.drop_empty()
        self._heartbeat_seq += 1
        return Heartbeat(
            worker_id=context.worker_id,
            incarnation=context.incarnation,
            role=self.role,
            seq=self._heartbeat_seq,
            model=self._model,
            max_context_tokens=context.max_context_tokens,
            vocab_size=runner.vocab_size,
            layout_hash=runner.layout.layout_hash,
            kv_endpoints=context.kv_endpoints,
            num_blocks=scheduler.allocator.num_usable,
            num_free_blocks=scheduler.allocator.num_free,
            block_size=runner.layout.block_size,
            kv_bytes_per_token=runner.layout.bytes_per_token,
            num_sessions=self.decode.num_sessions,
            num_running=self.decode.num_active,
            num_waiting=self.prefill.num_waiting,
            num_leases=len(context.leases),
            queue=queue,
            queue_num_tokens=queue_num_tokens + scheduler.num_missing_prefill_tokens(),
            ttft=context.ttft.stats(now),
            itl=context.itl.stats(now),
            prefill_tokens_per_s=context.engine.prefill_tokens_per_s,
            decode_step_s=context.engine.decode_step_s,
            kv_bytes_per_s=context.kv_bytes_per_s,
            kv_pulled=dict(context.kv_pulled),
            draining=context.draining,
            prefill_scale=scheduler.predictor.prefill_scale,
            decode_scale=scheduler.predictor.decode_scale,
            step_times=scheduler.predictor.times,
            parallel_degree=context.parallel_degree,
            profile=context.profile,
            node=context.node,
            num_resident_tokens=residents.num_tokens,
            kv_held=context.kv_changes.collect(MAX_CHANGES_TOLD),
            num_evictable_blocks=residents.num_blocks,
            num_host_tokens=context.engine.host_tier.num_tokens if context.engine.host_tier is not None else 0,
        )

    def check_integrity(self) -> None:
        """Assert what must hold between steps: of blocks, kept KV and host memory."""
        self.context.engine.scheduler.check_integrity()
        self.prefill.residents.check_integrity()
