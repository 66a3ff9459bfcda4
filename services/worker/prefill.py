"""The prefill role: a queue of prefill tasks, lazy read of their history, compute, and hand-over to the decode worker.

Two tasks are off the queue at a time: one computes, the next one's history is being pulled meanwhile. The choice of
the next task is made as late as that allows, so that reordering sees the whole queue.
"""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from services.worker.context import WorkerContext
from shared.core.batching import Sequence, SessionKv
from shared.core.reordering import (
    WaitingPrefill,
    choose_first_come,
    choose_next_prefill,
    count_postponements,
)
from shared.core.types import RoundKey, Segment, SessionKey
from shared.errors import AmpdError, ErrorCode
from shared.messages import (
    Ack,
    CancelRun,
    DropSession,
    KvOffer,
    KvRenew,
    KvSource,
    Message,
    PrefillDone,
    PrefillEnded,
    PrefillTask,
    QueuedPrefill,
    error_reply,
)
from shared.transport.client import Pull, PullRequest
from shared.transport.leases import Lease, LeaseEnd

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class Task:
    message: PrefillTask
    key: RoundKey
    kv: SessionKv
    received_at: float
    deadline_at: float
    waiting: WaitingPrefill  # as reordering sees it
    runner: asyncio.Task[None] | None = None  # set once it is off the queue
    pull: Pull | None = None
    kv_bytes_read: int = 0
    transfer_s: float = 0.0
    compute_started_at: float = 0.0
    compute_ended_at: float = 0.0
    lease: Lease | None = None  # on the increment, for the decode worker
    first_token: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    lease_ended: asyncio.Future[LeaseEnd] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def num_new_tokens(self) -> int:
        return len(self.message.token_ids) // 4

    @property
    def num_tokens(self) -> int:
        return self.message.num_cached_tokens + self.num_new_tokens

    @property
    def queued_s(self) -> float:
        return max(0.0, self.compute_started_at - self.received_at - self.transfer_s)

    @property
    def prefill_s(self) -> float:
        return max(0.0, self.compute_ended_at - self.compute_started_at)

    def take_lease_end(self, end: LeaseEnd) -> None:
        if not self.lease_ended.done():
            self.lease_ended.set_result(end)


class PrefillRole:
    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._engine = context.engine
        self._queue: list[Task] = []  # by arrival
        self._tasks: dict[RoundKey, Task] = {}  # queued, staged, computing or delivering
        self._ended: deque[RoundKey] = deque(maxlen=1024)  # a repeated command must not run a task twice
        self._changed = asyncio.Event()
        self._stage_slots = asyncio.Semaphore(2)
        self._compute = asyncio.Lock()
        self._compute_free_at = 0.0

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_active(self) -> int:
        return len(self._tasks)

    def queue_metadata(self) -> tuple[tuple[QueuedPrefill, ...], int]:
        """The first 64 tasks not yet computed, and the new tokens of all of them."""
        now = self._context.clock()
        waiting = [task for task in self._tasks.values() if not task.first_token.done()]
        entries = tuple(
            QueuedPrefill(
                session=task.message.session,
                num_history_tokens=task.message.num_cached_tokens,
                num_new_tokens=task.num_new_tokens,
                waiting_s=now - task.received_at,
            )
            for task in waiting[:64]
        )
        return entries, sum(task.num_new_tokens for task in waiting)

    # --------------------------------------------------------------------------------- commands

    async def prefill_task(self, message: PrefillTask) -> Message:
        context = self._context
        if message.incarnation != context.incarnation:
            raise AmpdError(
                ErrorCode.WRONG_INCARNATION, f"this is incarnation {context.incarnation} of {context.worker_id}"
            )
        key = RoundKey(message.tenant, message.session, message.round, message.attempt)
        if key in self._tasks or key in self._ended:
            return Ack()
        await self._cancel_where(SessionKey(message.tenant, message.session), (message.round, message.attempt))
        if context.draining:
            raise AmpdError(ErrorCode.DRAINING, "the worker is stopping: place the prefill elsewhere")
        if len(self._queue) >= context.limits.max_queued_prefills:
            raise AmpdError(ErrorCode.OVERLOADED, f"{len(self._queue)} prefills are queued here", retry_after_s=1.0)
        task = self._admit(message, key)
        self._queue.append(task)
        self._tasks[key] = task
        self._changed.set()
        return Ack()

    async def cancel_run(self, message: CancelRun) -> None:
        await self._cancel_where(SessionKey(message.tenant, message.session), (message.round, message.attempt + 1))

    async def drop_session(self, message: DropSession) -> None:
        await self._cancel_where(SessionKey(message.tenant, message.session), None)

    async def _cancel_where(self, session: SessionKey, before: tuple[int, int] | None) -> None:
        """Cancel the session's tasks with (round, attempt) < before (None: all); returns when their blocks are back."""
        for task in list(self._tasks.values()):
            key = task.key
            if (key.tenant, key.session) == session and (before is None or (key.round, key.attempt) < before):
                await self._cancel(task)

    async def _cancel(self, task: Task) -> None:
        if task.runner is None:
            self._queue.remove(task)
            del self._tasks[task.key]
            return
        task.runner.cancel()
        await asyncio.wait([task.runner])

    def _admit(self, message: PrefillTask, key: RoundKey) -> Task:
        context = self._context
        now = context.clock()
        tokens = array("i", message.token_ids)
        task = Task(
            message=message,
            key=key,
            kv=SessionKv(
                key=SessionKey(message.tenant, message.session), tokens=tokens, tokens_base=message.num_cached_tokens
            ),
            received_at=now,
            deadline_at=now + message.deadline_s,
            waiting=WaitingPrefill(
                key=key,
                ttft_deadline=now + message.slo.ttft_s - message.waited_s,
                num_history_tokens=message.num_cached_tokens,
                num_new_tokens=len(tokens),
            ),
        )
        if not tokens:
            raise AmpdError(ErrorCode.INVALID_REQUEST, "a prefill task needs at least one token to compute")
        if message.num_cached_tokens and message.history is None:
            raise AmpdError(ErrorCode.INVALID_REQUEST, "the task has cached tokens and no source for their KV")
        if task.num_tokens >= context.max_context_tokens:
            raise AmpdError(
                ErrorCode.CONTEXT_TOO_LONG, f"{task.num_tokens} tokens; the model takes {context.max_context_tokens}"
            )
        allocator = self._engine.scheduler.allocator
        if allocator.blocks_for(task.num_tokens) > allocator.num_usable:
            raise AmpdError(
                ErrorCode.OUT_OF_BLOCKS,
                f"{task.num_tokens} tokens do not fit into this worker's {allocator.num_usable} KV blocks",
            )
        return task

    # ------------------------------------------------------------------------------- dispatching

    async def run(self) -> None:
        """Take tasks off the queue, for ever."""
        while True:
            await self._stage_slots.acquire()
            task = await self._next_task()
            task.runner = self._context.spawn(self._run_task(task), f"prefill:{task.key.session}")

    async def _next_task(self) -> Task:
        """The task that reordering puts first, once its blocks can be had."""
        while True:
            if self._queue:
                index = self._choose()
                task = self._queue[index]
                if self._engine.scheduler.reserve(task.kv, task.num_tokens):
                    task.kv.pinned = True
                    self._engine.scheduler.sessions[task.key] = task.kv
                    count_postponements([task.waiting for task in self._queue], index)
                    del self._queue[index]
                    return task
            self._changed.clear()
            await self._changed.wait()

    def _choose(self) -> int:
        context, rate = self._context, self._engine.prefill_tokens_per_s
        waiting = [task.waiting for task in self._queue]

        def predict_prefill_s(num_history_tokens: int, num_new_tokens: int) -> float:
            return num_new_tokens / rate if rate > 0 else 0.0

        if context.reordering == "fcfs":
            return choose_first_come(waiting, context.clock(), predict_prefill_s)
        return choose_next_prefill(
            waiting,
            context.clock(),
            predict_prefill_s,
            window=context.limits.reorder_window,
            max_postponements=context.limits.max_postponements,
        )

    # ----------------------------------------------------------------------------- one task's life

    async def _run_task(self, task: Task) -> None:
        error: AmpdError | None = None
        holds_slot = True
        try:
            async with asyncio.timeout(max(0.0, task.deadline_at - self._context.clock())):
                await self._pull_history(task)
                async with self._compute:
                    await self._compute_prefill(task)
                    self._compute_free_at = self._context.clock()
                holds_slot = False
                self._stage_slots.release()
                await self._hand_over(task)
        except TimeoutError:
            error = AmpdError(ErrorCode.DEADLINE_EXCEEDED, "the prefill's deadline has passed")
        except AmpdError as operating_error:
            error = operating_error
        finally:
            if holds_slot:
                self._stage_slots.release()
            await asyncio.shield(self._clean_up(task))
        self._report(task, error)

    async def _pull_history(self, task: Task) -> None:
        history = task.message.history
        if history is None:
            return
        started_at = self._context.clock()
        limits = self._context.limits
        task.pull = self._context.kv_client.start_pull(
            PullRequest(
                key=task.key,
                endpoints=history.endpoints,
                ticket=history.ticket,
                source=history.worker_id,
                source_incarnation=history.incarnation,
                lease_id=history.lease_id,
                generation=history.generation,
                block_table=tuple(task.kv.block_table),
                token_start=0,
                token_stop=task.message.num_cached_tokens,
                progress_timeout_s=limits.kv_progress_timeout_s,
                deadline_s=max(0.1, task.deadline_at - started_at),
            )
        )
        result = await task.pull.wait()
        self._context.observe_pull(result)
        task.kv_bytes_read = result.num_bytes
        task.kv.num_kv = task.message.num_cached_tokens
        if not self._compute.locked():  # compute stood idle for it
            task.transfer_s = self._context.clock() - max(started_at, self._compute_free_at)

    async def _compute_prefill(self, task: Task) -> None:
        """Compute the increment; each layer is published to the decode worker as soon as it is ready."""
        context, message = self._context, task.message
        task.compute_started_at = context.clock()
        task.lease = lease = context.leases.grant(
            task.key,
            tuple(task.kv.block_table),
            message.num_cached_tokens,
            task.num_tokens,
            ttl_s=context.limits.lease_ttl_s,
            on_end=self._lease_end_handler(task),
            complete=False,
            num_layers=self._engine.runner.layout.num_layers,
        )
        sequence = Sequence(
            key=task.key,
            kv=task.kv,
            sampling=message.sampling,
            output_start=task.num_tokens - message.num_forced_tokens,
            arrival=task.received_at,
            preemptible=False,
            on_layer=lambda layer, start, stop: lease.publish(Segment(layer, layer + 1, start, stop)),
        )
        self._engine.submit(sequence, lambda ended, token: self._take_first_token(task, ended, token))
        try:
            # the offer travels while the first layers are computed
            await context.ask_peer(message.decode_worker, self._offer(task, lease))
            await task.first_token
        finally:
            await self._engine.remove(sequence)
        lease.finish()
        now = context.clock()
        context.ttft.add(now, message.waited_s + now - task.received_at)

    def _take_first_token(self, task: Task, sequence: Sequence, token: int) -> None:
        self._engine.finish(sequence)
        task.compute_ended_at = self._context.clock()
        if not task.first_token.done():
            task.first_token.set_result(token)

    def _offer(self, task: Task, lease: Lease) -> KvOffer:
        context, message = self._context, task.message
        return KvOffer(
            tenant=message.tenant,
            session=message.session,
            round=message.round,
            attempt=message.attempt,
            num_tokens_start=message.num_cached_tokens,
            num_tokens_stop=task.num_tokens,
            source=KvSource(
                worker_id=context.worker_id,
                incarnation=context.incarnation,
                endpoints=context.kv_endpoints,
                lease_id=lease.lease_id,
                generation=lease.generation,
                ttl_s=lease.ttl_s,
            ),
        )

    def _lease_end_handler(self, task: Task) -> Callable[[Lease, LeaseEnd], None]:
        """The transport may call it from one of its threads."""
        loop = asyncio.get_running_loop()

        def on_end(lease: Lease, end: LeaseEnd) -> None:
            loop.call_soon_threadsafe(task.take_lease_end, end)

        return on_end

    async def _hand_over(self, task: Task) -> None:
        """The first token goes to the decode worker; the blocks are held until it has pulled the KV."""
        message = task.message
        await self._context.ask_peer(
            message.decode_worker,
            PrefillDone(
                tenant=message.tenant,
                session=message.session,
                round=message.round,
                attempt=message.attempt,
                first_token_id=task.first_token.result(),
                queued_s=task.queued_s,
                transfer_s=task.transfer_s,
                prefill_s=task.prefill_s,
                kv_bytes_read=task.kv_bytes_read,
            ),
        )
        end = await task.lease_ended
        if end is not LeaseEnd.DELIVERED:
            raise AmpdError(ErrorCode.KV_TRANSFER_FAILED, f"the prefilled KV was not taken: its lease was {end.value}")

    async def _clean_up(self, task: Task) -> None:
        """Give back what the task holds; on return nothing reads or writes its blocks."""
        if task.pull is not None:
            await task.pull.cancel()
        if task.lease is not None:
            self._context.leases.release(task.lease.lease_id, task.lease.generation)
        task.kv.pinned = False
        self._engine.scheduler.drop(task.key)
        self._engine.wake()
        del self._tasks[task.key]
        self._changed.set()

    def _report(self, task: Task, error: AmpdError | None) -> None:
        self._ended.append(task.key)
        if error is not None:
            log.warning("prefill_failed", session=task.key.session, round=task.key.round, error=str(error))
        context, message = self._context, task.message
        context.outbox.send(
            PrefillEnded(
                tenant=message.tenant,
                session=message.session,
                round=message.round,
                attempt=message.attempt,
                worker_id=context.worker_id,
                incarnation=context.incarnation,
                error=error_reply(error) if error is not None else None,
                num_new_tokens=task.num_new_tokens,
                queued_s=task.queued_s,
                transfer_s=task.transfer_s,
                prefill_s=task.prefill_s,
                kv_bytes_read=task.kv_bytes_read,
            )
        )

    # ------------------------------------------------------------------------------------ leases

    async def renew_leases(self) -> None:
        """Keep alive the leases that queued and running tasks depend on: called every third of their ttl."""
        for task in list(self._tasks.values()):
            lease, history = task.lease, task.message.history
            if lease is not None and not task.lease_ended.done():
                with contextlib.suppress(AmpdError):  # it has ended this moment: lease_ended tells
                    self._context.leases.renew(lease.lease_id, lease.generation)
            elif history is not None and task.pull is None:
                await self._renew_history(task, history)

    async def _renew_history(self, task: Task, history: KvSource) -> None:
        renew = KvRenew(lease_id=history.lease_id, generation=history.generation)
        try:
            await self._context.ask_peer(history.worker_id, renew)
        except AmpdError as error:
            if task in self._queue:
                self._give_up_queued(task, error)

    def expire_deadlines(self) -> None:
        """Give up queued tasks whose deadline has passed (those off the queue have a timer of their own)."""
        now = self._context.clock()
        for task in [task for task in self._queue if now >= task.deadline_at]:
            self._give_up_queued(task, AmpdError(ErrorCode.DEADLINE_EXCEEDED, "the prefill waited past its deadline"))
        self._changed.set()  # blocks may have become free on the decode side of this worker

    def _give_up_queued(self, task: Task, error: AmpdError) -> None:
        self._queue.remove(task)
        del self._tasks[task.key]
        self._report(task, error)

    async def close(self) -> None:
        for task in list(self._tasks.values()):
            await self._cancel(task)
