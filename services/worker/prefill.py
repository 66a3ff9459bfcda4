"""The prefill role: a queue of prefill tasks, lazy read of their history, compute, and hand-over to the decode worker.

Two tasks are off the queue at a time: one computes, the next one's history is being pulled meanwhile. The choice of
the next task is made as late as that allows, so that reordering sees the whole queue.
"""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections import deque

import structlog

from services.worker.context import WorkerContext
from services.worker.prefill_job import PrefillJob, PrefillSteps
from shared.core.batching import SessionKv
from shared.core.reordering import (
    WaitingPrefill,
    choose_first_come,
    choose_next_prefill,
    count_postponements,
)
from shared.core.types import RoundKey, SessionKey
from shared.errors import AmpdError, ErrorCode
from shared.messages import (
    Ack,
    CancelRun,
    DropSession,
    KvRenew,
    KvSource,
    Message,
    PrefillTask,
    QueuedPrefill,
    error_reply,
)

log = structlog.get_logger(__name__)


class PrefillRole:
    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._engine = context.engine
        self._queue: list[PrefillJob] = []  # by arrival
        self._jobs: dict[RoundKey, PrefillJob] = {}  # queued, staged, computing or delivering
        self._ended: deque[RoundKey] = deque(maxlen=1024)  # a repeated command must not run a task twice
        self._changed = asyncio.Event()
        self._stage_slots = asyncio.Semaphore(2)
        self._steps = PrefillSteps(context)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_active(self) -> int:
        return len(self._jobs)

    def queue_metadata(self) -> tuple[tuple[QueuedPrefill, ...], int]:
        """The first 64 prefills not yet computed, and the new tokens of all of them."""
        now = self._context.clock()
        waiting = [job for job in self._jobs.values() if not job.first_token.done()]
        entries = tuple(
            QueuedPrefill(
                session=job.message.session,
                num_history_tokens=job.message.num_cached_tokens,
                num_new_tokens=job.num_new_tokens,
                waiting_s=now - job.received_at,
            )
            for job in waiting[:64]
        )
        return entries, sum(job.num_new_tokens for job in waiting)

    # --------------------------------------------------------------------------------- commands

    async def prefill_task(self, message: PrefillTask) -> Message:
        context = self._context
        if message.incarnation != context.incarnation:
            raise AmpdError(
                ErrorCode.WRONG_INCARNATION, f"this is incarnation {context.incarnation} of {context.worker_id}"
            )
        key = RoundKey(message.tenant, message.session, message.round, message.attempt)
        if key in self._jobs or key in self._ended:
            return Ack()
        await self._cancel_where(SessionKey(message.tenant, message.session), (message.round, message.attempt))
        if context.draining:
            raise AmpdError(ErrorCode.DRAINING, "the worker is stopping: place the prefill elsewhere")
        if len(self._queue) >= context.limits.max_queued_prefills:
            raise AmpdError(ErrorCode.OVERLOADED, f"{len(self._queue)} prefills are queued here", retry_after_s=1.0)
        job = self._admit(message, key)
        self._queue.append(job)
        self._jobs[key] = job
        self._changed.set()
        return Ack()

    async def cancel_run(self, message: CancelRun) -> None:
        await self._cancel_where(SessionKey(message.tenant, message.session), (message.round, message.attempt + 1))

    async def drop_session(self, message: DropSession) -> None:
        await self._cancel_where(SessionKey(message.tenant, message.session), None)

    async def _cancel_where(self, session: SessionKey, before: tuple[int, int] | None) -> None:
        """Cancel the session's tasks with (round, attempt) < before (None: all); returns when their blocks are back."""
        for job in list(self._jobs.values()):
            key = job.key
            if (key.tenant, key.session) == session and (before is None or (key.round, key.attempt) < before):
                await self._cancel(job)

    async def _cancel(self, job: PrefillJob) -> None:
        if job.key not in self._jobs:
            return  # it ended while another was being cancelled
        if job.runner is None:
            self._queue.remove(job)
            del self._jobs[job.key]
            return
        job.runner.cancel()
        await asyncio.wait([job.runner])
        if job.key in self._jobs:  # cancelled before its first step: its own clean-up never ran
            self._stage_slots.release()
            await self._clean_up(job)

    def _admit(self, message: PrefillTask, key: RoundKey) -> PrefillJob:
        context = self._context
        now = context.clock()
        tokens = array("i", message.token_ids)
        job = PrefillJob(
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
        if job.num_tokens >= context.max_context_tokens:
            raise AmpdError(
                ErrorCode.CONTEXT_TOO_LONG, f"{job.num_tokens} tokens; the model takes {context.max_context_tokens}"
            )
        allocator = self._engine.scheduler.allocator
        if allocator.blocks_for(job.num_tokens) > allocator.num_usable:
            raise AmpdError(
                ErrorCode.OUT_OF_BLOCKS,
                f"{job.num_tokens} tokens do not fit into this worker's {allocator.num_usable} KV blocks",
            )
        return job

    # ------------------------------------------------------------------------------- dispatching

    async def run(self) -> None:
        """Take tasks off the queue, for ever."""
        while True:
            await self._stage_slots.acquire()
            job = await self._next_job()
            job.runner = self._context.spawn(self._run_job(job), f"prefill:{job.key.session}")

    async def _next_job(self) -> PrefillJob:
        """The job that reordering puts first, once its blocks can be had."""
        while True:
            if self._queue:
                index = self._choose()
                job = self._queue[index]
                if self._engine.scheduler.reserve(job.kv, job.num_tokens):
                    job.kv.pinned = True
                    self._engine.scheduler.sessions[job.key] = job.kv
                    count_postponements([job.waiting for job in self._queue], index)
                    del self._queue[index]
                    return job
            self._changed.clear()
            await self._changed.wait()

    def _choose(self) -> int:
        context, rate = self._context, self._engine.prefill_tokens_per_s
        waiting = [job.waiting for job in self._queue]

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

    # ----------------------------------------------------------------------------- one job's life

    async def _run_job(self, job: PrefillJob) -> None:
        error: AmpdError | None = None
        holds_slot = True
        try:
            async with asyncio.timeout(max(0.0, job.deadline_at - self._context.clock())):
                await self._steps.pull_history(job)
                await self._steps.compute(job)
                holds_slot = False
                self._stage_slots.release()
                await self._steps.hand_over(job)
        except TimeoutError:
            error = AmpdError(ErrorCode.DEADLINE_EXCEEDED, "the prefill's deadline has passed")
        except AmpdError as operating_error:
            error = operating_error
        finally:
            if holds_slot:
                self._stage_slots.release()
            await asyncio.shield(self._clean_up(job))
        self._report(job, error)

    async def _clean_up(self, job: PrefillJob) -> None:
        """Give back what the job holds; on return nothing reads or writes its blocks."""
        await self._steps.abandon(job)
        job.kv.pinned = False
        self._engine.scheduler.drop(job.key)
        self._engine.wake()
        del self._jobs[job.key]
        self._changed.set()

    def _report(self, job: PrefillJob, error: AmpdError | None) -> None:
        self._ended.append(job.key)
        if error is not None:
            log.warning("prefill_failed", session=job.key.session, round=job.key.round, error=str(error))
        context = self._context
        context.outbox.send(job.ended_message(context, error_reply(error) if error is not None else None))

    # ------------------------------------------------------------------------------------ leases

    async def renew_leases(self) -> None:
        """Keep alive the leases that queued and running tasks depend on: called every third of their ttl."""
        for job in list(self._jobs.values()):
            lease, history = job.lease, job.message.history
            if lease is not None and not job.lease_ended.done():
                with contextlib.suppress(AmpdError):  # it has ended this moment: lease_ended tells
                    self._context.leases.renew(lease.lease_id, lease.generation)
            elif history is not None and job.pull is None:
                await self._renew_history(job, history)

    async def _renew_history(self, job: PrefillJob, history: KvSource) -> None:
        renew = KvRenew(lease_id=history.lease_id, generation=history.generation)
        try:
            await self._context.ask_peer(history.worker_id, renew)
        except AmpdError as error:
            if job in self._queue:
                self._give_up_queued(job, error)

    def expire_deadlines(self) -> None:
        """Give up queued tasks whose deadline has passed (those off the queue have a timer of their own)."""
        now = self._context.clock()
        for job in [job for job in self._queue if now >= job.deadline_at]:
            self._give_up_queued(job, AmpdError(ErrorCode.DEADLINE_EXCEEDED, "the prefill waited past its deadline"))
        self._changed.set()  # blocks may have become free on the decode side of this worker

    def _give_up_queued(self, job: PrefillJob, error: AmpdError) -> None:
        self._queue.remove(job)
        del self._jobs[job.key]
        self._report(job, error)

    async def close(self) -> None:
        for job in list(self._jobs.values()):
            await self._cancel(job)
