"""The prefill role: a queue of prefill tasks, lazy read of their history, compute, and hand-over to the decode worker.

A few tasks are off the queue at a time: some compute together, the history of the next is pulled meanwhile. The choice
of the next task is made as late as that allows, so that reordering sees the whole queue.
"""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections import deque
from collections.abc import Iterable

import structlog

from services.worker.context import WorkerContext
from services.worker.prefill_job import PrefillJob, PrefillSteps
from services.worker.residents import Residents
from services.worker.staging import KvStaging
from shared.core.chunking import may_stage
from shared.core.reordering import PrefillOrder, WaitingPrefill
from shared.core.sequences import SessionKv
from shared.core.types import RoundKey, SessionKey
from shared.errors import AmpdError, ErrorCode
from shared.messages import (
    Ack,
    CancelRun,
    KvRenew,
    KvSource,
    Message,
    PrefillTask,
    QueuedPrefill,
    StageKv,
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
        self._staged: set[PrefillJob] = set()  # off the queue and not computed yet
        self._order = PrefillOrder(context.policy.order, context.engine.scheduler.room)
        context.engine.scheduler.list_unstaged = lambda: [job.waiting for job in self._queue]
        self._steps = PrefillSteps(context)
        self.residents = Residents(
            context.engine, max_residents=context.limits.max_residents, on_lost=context.kv_changes.note_gone
        )
        self._staging = KvStaging(context, self.residents, self._has_job, self._changed.set)

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
                num_history_tokens=job.num_history_tokens,
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

    async def stage_kv(self, message: StageKv) -> Message:
        return await self._staging.stage_kv(message)

    async def hand_back(self, own: SessionKv, tokens: array[int]) -> SessionKv:
        """The session decodes on this worker from now on: what is kept of it here is its own, if that is more."""
        await self._staging.cancel(own.key)
        return self.residents.hand_back(own, tokens)

    def _has_job(self, session: SessionKey) -> bool:
        return bool(self.list_jobs(session))

    async def cancel_run(self, message: CancelRun) -> None:
        await self._cancel_where(SessionKey(message.tenant, message.session), (message.round, message.attempt + 1))

    def list_jobs(self, session: SessionKey) -> list[PrefillJob]:
        return [job for job in self._jobs.values() if job.session == session]

    async def drop_session(self, session: SessionKey, jobs: Iterable[PrefillJob]) -> None:
        """Forget what is kept of the session; `jobs` are its tasks as of the command: others are of its next life."""
        await self._staging.cancel(session)
        for job in jobs:
            await self._cancel(job)
        self.residents.drop(session)

    async def _cancel_where(self, session: SessionKey, before: tuple[int, int]) -> None:
        """Cancel the session's tasks with (round, attempt) < before; returns when their blocks are back."""
        for job in self.list_jobs(session):
            if (job.key.round, job.key.attempt) < before:
                await self._cancel(job)

    async def _cancel(self, job: PrefillJob) -> None:
        if job.key not in self._jobs:
            return  # it ended while another was being cancelled
        if job.runner is None:
            self._queue.remove(job)
            self._order.forget(job.waiting)
            del self._jobs[job.key]
            return
        job.runner.cancel()
        await asyncio.wait([job.runner])
        if job.key in self._jobs:  # cancelled before its first step: its own clean-up never ran
            await self._clean_up(job)

    def _admit(self, message: PrefillTask, key: RoundKey) -> PrefillJob:
        context = self._context
        now = context.clock()
        job = PrefillJob(
            message=message,
            key=key,
            tokens=array("i", message.token_ids),
            received_at=now,
            deadline_at=now + message.deadline_s,
            waiting=WaitingPrefill(
                key=key,
                arrival=now,
                session_arrival=now - message.session_age_s,
                ttft_deadline=now + message.slo.ttft_s - message.waited_s,
                work_s=0.0,
            ),
        )
        if not job.tokens:
            raise AmpdError(ErrorCode.INVALID_REQUEST, "a prefill task needs at least one token to compute")
        if message.num_cached_tokens and message.history is None and self.residents.find(job.session) is None:
            raise AmpdError(ErrorCode.KV_LEASE_INVALID, "the task's history is not here, and no source of it is named")
        job.waiting.work_s = self._engine.scheduler.predictor.work_s(job.num_history_tokens, job.num_new_tokens)
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
            job = self._take_next()
            if job is None:
                self._changed.clear()
                await self._changed.wait()
                continue
            job.runner = self._context.spawn(self._run_job(job), f"prefill:{job.key.session}")

    def _take_next(self) -> PrefillJob | None:
        """The first in order whose blocks can be had, once it is time to pull its history."""
        if not self._queue or not self._has_room():
            return None
        now = self._context.clock()
        queue = [job.waiting for job in self._queue]
        # what is staged runs before it
        stretch = self._engine.scheduler.measure_stretch()
        order = self._order.order(queue, now + stretch * sum(job.waiting.work_s for job in self._staged), stretch)
        num_promised = self._engine.scheduler.count_promised_tokens()
        for index in order:
            job = self._queue[index]
            kv = self.residents.find(job.session) or SessionKv(job.session, resident=True)
            num_lacking = max(0, job.num_tokens - kv.num_kv)
            num_aside = num_promised + self._order.count_aside(job.waiting)
            if self._engine.reserve_idle(kv, job.num_tokens, num_aside=num_aside):
                break
            self._staging.give_way()
            if not self._order.may_be_passed(job.waiting, num_lacking):
                return None
        else:
            return None
        self.residents.take(kv, job.key)
        job.kv = kv
        self._order.note_begun(job.waiting, num_lacking)
        self._order.note_started(queue, index)
        self._order.note_turn(job.waiting, job.waiting.work_s)
        del self._queue[index]
        self._staged.add(job)
        return job

    def _has_room(self) -> bool:
        """Whether one more task is to be staged: as few as keep the next step full while a history is pulled."""
        num_tokens = sum(job.num_missing_tokens for job in self._staged)
        return may_stage(
            self._engine.scheduler.chunk, len(self._staged), num_tokens, max_staged=self._context.limits.max_staged
        )

    # ----------------------------------------------------------------------------- one job's life

    async def _run_job(self, job: PrefillJob) -> None:
        error: AmpdError | None = None
        try:
            async with asyncio.timeout(max(0.0, job.deadline_at - self._context.clock())):
                await self._staging.wait(job.session)
                await self._steps.claim(job)
                await self._steps.pull_history(job)
                await self._steps.compute(job)
                self._staged.discard(job)
                self._changed.set()
                await self._steps.hand_over(job)
        except TimeoutError:
            error = AmpdError(ErrorCode.DEADLINE_EXCEEDED, "the prefill's deadline has passed")
        except AmpdError as operating_error:
            error = operating_error
        finally:
            await asyncio.shield(self._clean_up(job))
        self._report(job, error)

    async def _clean_up(self, job: PrefillJob) -> None:
        """Give back what the job holds, or keep it for the next; on return nothing reads or writes its blocks."""
        await self._staging.cancel(job.session)
        await self._steps.abandon(job)
        if job.kv is not None:
            if job.claimed:
                del job.kv.tokens[len(job.tokens) :]  # the first output token, if it got that far
            self.residents.keep(job.kv, job.key, wanted=job.message.keep or not job.claimed)
        self._engine.wake()
        self._staged.discard(job)
        del self._jobs[job.key]
        self._changed.set()

    def _report(self, job: PrefillJob, error: AmpdError | None) -> None:
        self._ended.append(job.key)
        if error is not None:
            log.warning("prefill_failed", session=job.key.session, round=job.key.round, error=str(error))
        context = self._context
        kept = self.residents.find(job.session)
        context.outbox.send(
            job.ended_message(
                context, error_reply(error) if error is not None else None, kept.num_kv if kept is not None else 0
            )
        )

    # ------------------------------------------------------------------------------------ leases

    async def renew_leases(self) -> None:
        """Keep alive the leases that queued and running tasks depend on: called every third of their ttl."""
        for job in list(self._jobs.values()):
            lease, history = job.lease, job.message.history
            if lease is not None and not job.lease_ended.done():
                with contextlib.suppress(AmpdError):  # it has ended this moment: lease_ended tells
                    self._context.leases.renew(lease.lease_id, lease.generation)
            elif history is not None and not job.pulled:
                await self._renew_history(job, history)
        await self._staging.renew_leases()

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
        self._order.forget(job.waiting)
        self._report(job, error)

    async def close(self) -> None:
        await self._staging.close()
        for job in list(self._jobs.values()):
            await self._cancel(job)
