"""Staging: while a session's tool runs, the KV that this worker lacks of it is pulled ahead of the next prefill.

It has the lowest rank: it takes no block from running work, gives way when a prefill lacks room, and the session's own
prefill goes on from whatever has arrived whole.
"""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from services.worker.context import WorkerContext
from services.worker.residents import Residents, is_known
from shared.core.resident_key import resident_key
from shared.core.sequences import SessionKv
from shared.core.types import SessionKey
from shared.errors import AmpdError, ErrorCode, KvTransferError
from shared.messages import Ack, KvRenew, KvStaged, Message, StageKv, error_reply
from shared.transport.client import Pull
from shared.transport.receiver import PullRequest


@dataclass(eq=False)
class Staging:
    message: StageKv
    kv: SessionKv
    pull: Pull
    task: asyncio.Task[None] | None = None


class KvStaging:
    """`has_prefill` tells whether a prefill of the session is here; `on_end` is called when blocks may be free."""

    def __init__(
        self,
        context: WorkerContext,
        residents: Residents,
        has_prefill: Callable[[SessionKey], bool],
        on_end: Callable[[], object],
    ) -> None:
        self._context = context
        self._residents = residents
        self._has_prefill = has_prefill
        self._on_end = on_end
        self._active: dict[SessionKey, Staging] = {}

    async def stage_kv(self, message: StageKv) -> Message:
        """Begin the pull. Raises AmpdError if it is not for this worker as it is; other failures KvStaged tells."""
        context, session = self._context, SessionKey(message.tenant, message.session)
        if message.incarnation != context.incarnation:
            raise AmpdError(
                ErrorCode.WRONG_INCARNATION, f"this is incarnation {context.incarnation} of {context.worker_id}"
            )
        if context.draining:
            raise AmpdError(ErrorCode.DRAINING, "the worker is stopping: stage elsewhere")
        active = self._active.get(session)
        if active is not None:
            if active.message == message:
                return Ack()
            await self.cancel(session)
        try:
            self._begin(session, message)
        except AmpdError as error:
            kv = self._residents.find(session)
            self._report(message, kv.num_kv if kv is not None else 0, 0, error)
        return Ack()

    def _begin(self, session: SessionKey, message: StageKv) -> None:
        if self._has_prefill(session):
            raise AmpdError(ErrorCode.CANCELLED, "a prefill of the session is here already")
        if message.num_tokens >= self._context.max_context_tokens:
            raise AmpdError(ErrorCode.CONTEXT_TOO_LONG, f"{message.num_tokens} tokens")
        if len(self._active) >= self._context.limits.max_stagings:
            raise AmpdError(ErrorCode.OVERLOADED, f"{len(self._active)} sessions are being staged")
        kv = self._usable_entry(session, message)
        if kv is not None and kv.num_kv >= message.num_tokens:
            self._report(message, kv.num_kv, 0, None)
            return
        is_new = kv is None
        kv = kv or SessionKv(session, resident=True)
        # for a session of which nothing is here no other session has to go
        if not self._context.engine.reserve_idle(kv, message.num_tokens, evict=not is_new):
            raise AmpdError(ErrorCode.OUT_OF_BLOCKS, "no KV blocks are free for it")
        if is_new and not self._residents.add(kv):
            self._context.engine.scheduler.truncate(kv, 0)
            raise AmpdError(ErrorCode.NO_CAPACITY, "as many sessions are kept here as may be")
        kv.pinned = True
        try:
            pull = self._start_pull(session, message, kv)
        except AmpdError:
            self._give_back(session, kv)
            raise
        staging = self._active[session] = Staging(message, kv, pull)
        staging.task = self._context.spawn(self._finish(session, staging), f"stage:{message.session}")

    def _usable_entry(self, session: SessionKey, message: StageKv) -> SessionKv | None:
        """The session's entry, cut to what the message says of it; None, and nothing kept, if it is of other tokens."""
        kv, claim = self._residents.find(session), message.resident
        if kv is None:
            return None
        if claim is None or not is_known(kv, claim) or kv.num_kv == 0:
            self._residents.drop(session)
            return None
        del kv.tokens[claim.num_tokens - kv.tokens_base :]
        self._context.engine.scheduler.truncate(kv, claim.num_tokens)
        return kv

    def _start_pull(self, session: SessionKey, message: StageKv, kv: SessionKv) -> Pull:
        limits, history = self._context.limits, message.history
        return self._context.kv_client.start_pull(
            PullRequest(
                key=resident_key(session),
                endpoints=history.endpoints,
                ticket=history.ticket,
                source=history.worker_id,
                source_incarnation=history.incarnation,
                lease_id=history.lease_id,
                generation=history.generation,
                block_table=tuple(kv.block_table),
                token_start=kv.num_kv,
                token_stop=message.num_tokens,
                progress_timeout_s=limits.kv_progress_timeout_s,
                deadline_s=limits.staging_timeout_s,
            )
        )

    async def _finish(self, session: SessionKey, staging: Staging) -> None:
        message, kv = staging.message, staging.kv
        error: AmpdError | None = None
        num_bytes = 0
        try:
            result = await staging.pull.wait()
        except KvTransferError as transfer_error:
            error = transfer_error
        else:
            self._context.observe_pull(result, "staging", message.session, 0)
            num_bytes = result.num_bytes
            kv.num_kv = message.num_tokens
            kv.tokens, kv.tokens_base, kv.checksum = array("i"), message.num_tokens, message.checksum
        num_resident = kv.num_kv
        del self._active[session]
        if self._residents.find(session) is kv:  # else a prefill has taken it, and waits for this moment
            self._give_back(session, kv)
        self._on_end()
        self._report(message, num_resident, num_bytes, error)

    def _give_back(self, session: SessionKey, kv: SessionKv) -> None:
        """Nothing is pulled any more: what has not arrived whole is forgotten."""
        kv.pinned = False
        kv.last_used = self._context.clock()
        kv.told = (kv.num_kv, 0)  # by KvStaged
        self._context.engine.scheduler.truncate(kv, kv.num_kv)
        if kv.num_kv == 0:
            self._residents.drop(session)

    def _report(self, message: StageKv, num_resident: int, num_bytes: int, error: AmpdError | None) -> None:
        context = self._context
        context.outbox.send(
            KvStaged(
                tenant=message.tenant,
                session=message.session,
                worker_id=context.worker_id,
                incarnation=context.incarnation,
                num_resident_tokens=num_resident,
                kv_bytes_read=num_bytes,
                error=error_reply(error) if error is not None else None,
            )
        )

    # ------------------------------------------------------------------------- for the prefill role

    async def wait(self, session: SessionKey) -> None:
        """Until no pull of the session runs."""
        staging = self._active.get(session)
        if staging is not None and staging.task is not None:
            await asyncio.wait([staging.task])

    async def cancel(self, session: SessionKey) -> None:
        """Stop the session's pull; on return nothing writes to its blocks."""
        staging = self._active.get(session)
        if staging is not None:
            staging.pull.request_stop()
            await self.wait(session)

    def give_way(self) -> None:
        """Running work lacks blocks: stop every pull that no prefill waits for; on_end is called as they end."""
        for session, staging in self._active.items():
            if self._residents.find(session) is staging.kv:
                staging.pull.request_stop()

    async def renew_leases(self) -> None:
        for staging in list(self._active.values()):
            history = staging.message.history
            with contextlib.suppress(AmpdError):  # the pull itself finds out
                await self._context.ask_peer(
                    history.worker_id, KvRenew(lease_id=history.lease_id, generation=history.generation)
                )

    async def close(self) -> None:
        for session in list(self._active):
            await self.cancel(session)
