"""One prefill from its history's pull to the hand-over of its KV to the decode worker."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from services.worker.context import WorkerContext
from services.worker.kv_leases import describe_source
from services.worker.residents import count_common_tokens
from shared.core.reordering import WaitingPrefill
from shared.core.sequences import Sequence, SessionKv
from shared.core.types import RoundKey, Segment, SessionKey
from shared.errors import AmpdError, ErrorCode
from shared.messages import ErrorReply, KvOffer, PrefillDone, PrefillEnded, PrefillTask
from shared.transport.client import Pull
from shared.transport.leases import Lease, LeaseEnd
from shared.transport.receiver import PullRequest

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class PrefillJob:
    """One prefill task from its arrival to the hand-over of its KV."""

    message: PrefillTask
    key: RoundKey
    tokens: array[int]  # of the prompt, from message.num_cached_tokens on
    received_at: float
    deadline_at: float
    waiting: WaitingPrefill  # as reordering sees it
    kv: SessionKv | None = None  # set once it is off the queue; its tokens are the prompt's once it is `claimed`
    claimed: bool = False
    num_reused_tokens: int = 0  # of KV that was here already
    runner: asyncio.Task[None] | None = None  # set once it is off the queue
    pull: Pull | None = None
    pulled: bool = False  # all KV of the history is here
    kv_bytes_read: int = 0
    transfer_s: float = 0.0
    compute_started_at: float = 0.0
    compute_ended_at: float = 0.0
    sequence: Sequence | None = None
    lease: Lease | None = None  # on the increment, for the decode worker
    started: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    first_token: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    lease_ended: asyncio.Future[LeaseEnd] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def session(self) -> SessionKey:
        return SessionKey(self.key.tenant, self.key.session)

    @property
    def num_tokens(self) -> int:
        """Of the whole prompt."""
        return self.message.num_cached_tokens + len(self.tokens)

    @property
    def num_history_tokens(self) -> int:
        """Tokens that it need not compute: believed until the job is claimed, then known."""
        resident = self.message.resident
        expected = resident.num_tokens if resident is not None else 0
        held = self.num_reused_tokens if self.claimed else min(expected, self.num_tokens - 1)
        return max(self.message.num_cached_tokens, held)

    @property
    def num_new_tokens(self) -> int:
        return self.num_tokens - self.num_history_tokens

    @property
    def num_missing_tokens(self) -> int:
        """Of the new tokens, those that are still to be computed."""
        return self.num_new_tokens if self.kv is None else min(self.num_new_tokens, self.num_tokens - self.kv.num_kv)

    @property
    def queued_s(self) -> float:
        return max(0.0, self.compute_started_at - self.received_at - self.transfer_s)

    @property
    def prefill_s(self) -> float:
        return max(0.0, self.compute_ended_at - self.compute_started_at)

    def take_lease_end(self, end: LeaseEnd) -> None:
        if not self.lease_ended.done():
            self.lease_ended.set_result(end)

    def ended_message(self, context: WorkerContext, error: ErrorReply | None, num_resident_tokens: int) -> PrefillEnded:
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
            num_resident_tokens=num_resident_tokens,
            num_reused_tokens=self.num_reused_tokens,
        )


class PrefillSteps:
    """The steps of a job's life, in order: claim, pull_history, compute, hand_over; abandon always.

    Several jobs may be at any step; the engine computes those that are ready together.
    """

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._engine = context.engine
        self._num_computing = 0
        self._compute_idle_since = 0.0

    async def claim(self, job: PrefillJob) -> None:
        """Find out how much KV of the prompt the job's blocks hold already, host memory included.

        Raises AmpdError KV_LEASE_INVALID if what is missing of the history cannot be had anywhere.
        """
        kv, message = job.kv, job.message
        assert kv is not None
        usable = min(count_common_tokens(kv, message, job.tokens), job.num_tokens - 1)
        if usable >= kv.num_kv:
            await self._engine.restore(kv, usable)
        kv.num_kv = job.num_reused_tokens = min(kv.num_kv, usable)
        kv.tokens, kv.tokens_base, kv.checksum = job.tokens[:], message.num_cached_tokens, message.prefix_checksum
        job.claimed = True
        job.pulled = kv.num_kv >= message.num_cached_tokens
        if not job.pulled and message.history is None:
            raise AmpdError(
                ErrorCode.KV_LEASE_INVALID,
                f"KV of tokens {kv.num_kv} to {message.num_cached_tokens} is neither here nor to be had elsewhere",
            )

    async def pull_history(self, job: PrefillJob) -> None:
        history, kv = job.message.history, job.kv
        if job.pulled or history is None or kv is None:
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
                block_table=tuple(kv.block_table),
                token_start=kv.num_kv,
                token_stop=job.message.num_cached_tokens,
                progress_timeout_s=limits.kv_progress_timeout_s,
                deadline_s=max(0.1, job.deadline_at - started_at),
            )
        )
        result = await job.pull.wait()
        self._context.observe_pull(result, "history", job.message.session, job.message.round)
        job.pulled = True
        job.kv_bytes_read = result.num_bytes
        kv.num_kv = job.message.num_cached_tokens
        if self._num_computing == 0:  # compute stood idle for it
            job.transfer_s = self._context.clock() - max(started_at, self._compute_idle_since)

    async def compute(self, job: PrefillJob) -> None:
        """Compute the increment; each layer is published to the decode worker as soon as it is ready."""
        self._num_computing += 1
        try:
            await self._compute(job)
        finally:
            self._num_computing -= 1
            self._compute_idle_since = self._context.clock()

    async def _compute(self, job: PrefillJob) -> None:
        context, message, kv = self._context, job.message, job.kv
        assert kv is not None
        num_layers = self._engine.runner.layout.num_layers
        job.lease = lease = context.leases.grant(
            job.key,
            tuple(kv.block_table),
            message.num_cached_tokens,
            job.num_tokens,
            ttl_s=context.limits.lease_ttl_s,
            on_end=self._lease_end_handler(job),
            complete=False,
            num_layers=num_layers,
        )
        if kv.num_kv > message.num_cached_tokens:  # the decode worker has lost what is still here
            lease.publish(Segment(0, num_layers, message.num_cached_tokens, kv.num_kv))
        job.sequence = sequence = Sequence(
            key=job.key,
            kv=kv,
            sampling=message.sampling,
            output_start=job.num_tokens - message.num_forced_tokens,
            arrival=job.received_at,
            preemptible=False,
            on_layer=lambda layer, start, stop: lease.publish(Segment(layer, layer + 1, start, stop)),
            on_start=lambda: self._note_start(job),
            waiting=job.waiting,
            itl_slo_s=message.slo.itl_s,
        )
        self._engine.submit(sequence, lambda ended, token: self._take_first_token(job, ended, token))
        try:
            await job.started
            # the offer travels while the first layers are computed
            await context.ask_peer(message.decode_worker, self._offer(job, lease))
            await job.first_token
        finally:
            await self._engine.remove(sequence)
        lease.finish()
        now = context.clock()
        context.ttft.add(now, message.waited_s + now - job.received_at)

    def _note_start(self, job: PrefillJob) -> None:
        job.compute_started_at = self._context.clock()
        if not job.started.done():
            job.started.set_result(None)

    def _take_first_token(self, job: PrefillJob, sequence: Sequence, token: int) -> None:
        self._engine.finish(sequence)
        job.compute_ended_at = self._context.clock()
        log.debug(
            "prefilled",
            session=job.message.session,
            round=job.message.round,
            start_s=job.compute_started_at,
            end_s=job.compute_ended_at,
            num_new_tokens=job.num_new_tokens,
            num_history_tokens=job.num_history_tokens,
        )
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
            source=describe_source(context, lease),
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
        if (
            job.sequence is not None
        ):  # `_compute` removes it too, but may be cancelled while it waits for the step's end
            await self._engine.remove(job.sequence)
        if job.pull is not None:
            await job.pull.cancel()
        if job.lease is not None:
            self._context.leases.release(job.lease.lease_id, job.lease.generation)
