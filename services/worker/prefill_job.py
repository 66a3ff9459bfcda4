"""One prefill from its history's pull to the hand-over of its KV to the decode worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from services.worker.context import WorkerContext
from shared.core.batching import Sequence, SessionKv
from shared.core.reordering import WaitingPrefill
from shared.core.types import RoundKey, Segment
from shared.errors import AmpdError, ErrorCode
from shared.messages import ErrorReply, KvOffer, KvSource, PrefillDone, PrefillEnded, PrefillTask
from shared.transport.client import Pull
from shared.transport.leases import Lease, LeaseEnd
from shared.transport.receiver import PullRequest


@dataclass(eq=False)
class PrefillJob:
    """One prefill task from its arrival to the hand-over of its KV."""

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
    sequence: Sequence | None = None
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

    def ended_message(self, context: WorkerContext, error: ErrorReply | None) -> PrefillEnded:
        message = self.message
        return PrefillEnded(
            tenant=message.tenant,
            session=message.session,
            round=message.round,
            attempt=message.attempt,
            worker_id=context.worker_id,
            incarnation=context.incarnation,
            error=error,
            num_new_tokens=self.num_new_tokens,
            queued_s=self.queued_s,
            transfer_s=self.transfer_s,
            prefill_s=self.prefill_s,
            kv_bytes_read=self.kv_bytes_read,
        )


class PrefillSteps:
    """The steps of a job's life, in order: pull_history, compute, hand_over; abandon always.

    One job computes at a time; others pull or hand over meanwhile.
    """

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._engine = context.engine
        self._compute = asyncio.Lock()
        self._compute_free_at = 0.0

    async def pull_history(self, job: PrefillJob) -> None:
        history = job.message.history
        if history is None:
            return
        started_at = self._context.clock()
        limits = self._context.limits
        job.pull = self._context.kv_client.start_pull(
            PullRequest(
                key=job.key,
                endpoints=history.endpoints,
                ticket=history.ticket,
                source=history.worker_id,
                source_incarnation=history.incarnation,
                lease_id=history.lease_id,
                generation=history.generation,
                block_table=tuple(job.kv.block_table),
                token_start=0,
                token_stop=job.message.num_cached_tokens,
                progress_timeout_s=limits.kv_progress_timeout_s,
                deadline_s=max(0.1, job.deadline_at - started_at),
            )
        )
        result = await job.pull.wait()
        self._context.observe_pull(result)
        job.kv_bytes_read = result.num_bytes
        job.kv.num_kv = job.message.num_cached_tokens
        if not self._compute.locked():  # compute stood idle for it
            job.transfer_s = self._context.clock() - max(started_at, self._compute_free_at)

    async def compute(self, job: PrefillJob) -> None:
        """Compute the increment; each layer is published to the decode worker as soon as it is ready."""
        async with self._compute:
            await self._compute_alone(job)
            self._compute_free_at = self._context.clock()

    async def _compute_alone(self, job: PrefillJob) -> None:
        context, message = self._context, job.message
        job.compute_started_at = context.clock()
        job.lease = lease = context.leases.grant(
            job.key,
            tuple(job.kv.block_table),
            message.num_cached_tokens,
            job.num_tokens,
            ttl_s=context.limits.lease_ttl_s,
            on_end=self._lease_end_handler(job),
            complete=False,
            num_layers=self._engine.runner.layout.num_layers,
        )
        job.sequence = sequence = Sequence(
            key=job.key,
            kv=job.kv,
            sampling=message.sampling,
            output_start=job.num_tokens - message.num_forced_tokens,
            arrival=job.received_at,
            preemptible=False,
            on_layer=lambda layer, start, stop: lease.publish(Segment(layer, layer + 1, start, stop)),
        )
        self._engine.submit(sequence, lambda ended, token: self._take_first_token(job, ended, token))
        try:
            # the offer travels while the first layers are computed
            await context.ask_peer(message.decode_worker, self._offer(job, lease))
            await job.first_token
        finally:
            await self._engine.remove(sequence)
        lease.finish()
        now = context.clock()
        context.ttft.add(now, message.waited_s + now - job.received_at)

    def _take_first_token(self, job: PrefillJob, sequence: Sequence, token: int) -> None:
        self._engine.finish(sequence)
        job.compute_ended_at = self._context.clock()
        if not job.first_token.done():
            job.first_token.set_result(token)

    def _offer(self, job: PrefillJob, lease: Lease) -> KvOffer:
        context, message = self._context, job.message
        return KvOffer(
            tenant=message.tenant,
            session=message.session,
            round=message.round,
            attempt=message.attempt,
            num_tokens_start=message.num_cached_tokens,
            num_tokens_stop=job.num_tokens,
            source=KvSource(
                worker_id=context.worker_id,
                incarnation=context.incarnation,
                endpoints=context.kv_endpoints,
                lease_id=lease.lease_id,
                generation=lease.generation,
                ttl_s=lease.ttl_s,
            ),
        )

    def _lease_end_handler(self, job: PrefillJob) -> Callable[[Lease, LeaseEnd], None]:
        """The transport may call it from one of its threads."""
        loop = asyncio.get_running_loop()

        def on_end(lease: Lease, end: LeaseEnd) -> None:
            loop.call_soon_threadsafe(job.take_lease_end, end)

        return on_end

    async def hand_over(self, job: PrefillJob) -> None:
        """The first token goes to the decode worker; the blocks are held until it has pulled the KV."""
        message = job.message
        await self._context.ask_peer(
            message.decode_worker,
            PrefillDone(
                tenant=message.tenant,
                session=message.session,
                round=message.round,
                attempt=message.attempt,
                first_token_id=job.first_token.result(),
                queued_s=job.queued_s,
                transfer_s=job.transfer_s,
                prefill_s=job.prefill_s,
                kv_bytes_read=job.kv_bytes_read,
            ),
        )
        end = await job.lease_ended
        if end is not LeaseEnd.DELIVERED:
            raise AmpdError(ErrorCode.KV_TRANSFER_FAILED, f"the prefilled KV was not taken: its lease was {end.value}")

    async def abandon(self, job: PrefillJob) -> None:
        """On return no forward pass and no transfer touches the job's blocks; what was complete is left as it is."""
        if job.sequence is not None:  # `compute` removes it too, but may be cancelled while it waits for the step's end
            await self._engine.remove(job.sequence)
        if job.pull is not None:
            await job.pull.cancel()
        if job.lease is not None:
            self._context.leases.release(job.lease.lease_id, job.lease.generation)
