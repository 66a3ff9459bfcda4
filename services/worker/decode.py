"""The decode role: sessions and their KV, the rounds that run on it, and the streams of their tokens."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable
from typing import Literal

import structlog

from services.worker.context import WorkerContext
from services.worker.held_session import HeldSession, lend_kv
from services.worker.kv_changes import NOT_TOLD
from services.worker.kv_leases import describe_source, grant_history
from services.worker.moves import fetch_history, renew_source
from services.worker.round_tokens import adopt_tokens, assemble_tokens, check_fits
from services.worker.runs import Run
from shared import subjects
from shared.core.reordering import WaitingPrefill
from shared.core.sequences import Sequence, SequenceState, SessionKv
from shared.core.types import RoundKey, SessionKey
from shared.errors import AmpdError, ErrorCode, KvTransferError
from shared.messages import (
    Ack,
    CancelRun,
    DropSession,
    FinishReason,
    GrantHistory,
    KvOffer,
    Message,
    NeedTokens,
    PrefillDone,
    RoundEnded,
    RunRound,
    RunRoundAck,
    error_reply,
)
from shared.transport.receiver import PullRequest

log = structlog.get_logger(__name__)


HandBack = Callable[[SessionKv, "array[int]"], Awaitable[SessionKv]]


class DecodeRole:
    def __init__(self, context: WorkerContext, hand_back: HandBack) -> None:
        """hand_back: gives a session that begins to decode here what the prefill role has kept of it."""
        self._context = context
        self._hand_back = hand_back
        self._engine = context.engine
        self._sessions: dict[SessionKey, HeldSession] = {}

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def num_active(self) -> int:
        return sum(held.run is not None and held.run.ended is None for held in self._sessions.values())

    # --------------------------------------------------------------------------------- commands

    async def run_round(self, message: RunRound) -> Message:
        received_at = self._context.clock()
        self._check_incarnation(message)
        key = SessionKey(message.tenant, message.session)
        while True:
            held = self._hold(key)
            async with held.lock:
                if self._sessions.get(key) is held:  # else it was dropped meanwhile
                    return await self._run_round(held, message, received_at)

    async def _run_round(self, held: HeldSession, message: RunRound, received_at: float) -> Message:
        context = self._context
        if held.run is not None:
            newest = (held.run.message.round, held.run.message.attempt)
            if (message.round, message.attempt) == newest:
                if held.run.ended is not None:  # asked about: whoever asks has not heard the end
                    context.outbox.send(held.run.ended)
                return self._acknowledge(held.run, "running" if held.run.ended is None else "finished")
            if (message.round, message.attempt) < newest:
                raise AmpdError(ErrorCode.STALE_ATTEMPT, f"round {newest[0]} attempt {newest[1]} is newer")
        if context.draining:
            raise AmpdError(ErrorCode.DRAINING, "the worker is stopping: place the round elsewhere")
        await self._stop_run(held)
        tokens = assemble_tokens(held.kv, message)
        if isinstance(tokens, NeedTokens):
            return tokens
        check_fits(context, message, len(tokens))
        held.kv = await self._hand_back(held.kv, tokens)
        adopt_tokens(context.engine.scheduler, held.kv, tokens)
        if message.remote is not None:  # else it comes back when it is the round's turn
            await self._engine.restore(held.kv, len(tokens) - 1)
        held.run = self._start(held, message, received_at)
        return self._acknowledge(held.run, "started")

    async def cancel_run(self, message: CancelRun) -> Message:
        """Stop the round and roll the session back to the history before it."""
        held = self._sessions.get(SessionKey(message.tenant, message.session))
        if held is None:
            return Ack()
        async with held.lock:
            run = held.run
            if run is not None and run.message.round == message.round and run.message.attempt <= message.attempt:
                await self._stop_run(held)
                del held.kv.tokens[run.message.num_history_tokens :]
                self._engine.scheduler.truncate(held.kv, held.kv.num_tokens)
                held.kv.told = NOT_TOLD
        return Ack()

    async def drop_session(self, message: DropSession) -> Message:
        key = SessionKey(message.tenant, message.session)
        held = self._sessions.get(key)
        if held is not None:
            async with held.lock:
                await self._stop_run(held)
                if self._sessions.get(key) is held:
                    del self._sessions[key]
                    self._engine.scheduler.drop(key)
                    self._engine.wake()
        return Ack()

    async def grant_history(self, message: GrantHistory) -> Message:
        """Let another worker read an idle session's KV: the one that it moves to, or one that prefills its next round.
        The lease ends before any of its blocks is given up."""
        self._check_incarnation(message)
        held = self._sessions.get(SessionKey(message.tenant, message.session))
        if held is None:
            raise AmpdError(ErrorCode.KV_LEASE_INVALID, "nothing of this session is held here")
        async with held.lock:
            if held.run is not None and held.run.ended is None:
                raise AmpdError(ErrorCode.KV_LEASE_INVALID, "a round of this session runs: it moves what it needs")
            return await lend_kv(self._context, held, message)

    async def kv_offer(self, message: KvOffer) -> Message:
        """The prefill of a round has begun elsewhere: reserve blocks and pull what is not here as it is computed."""
        run = self._waiting_run(message)
        if run.offered:
            return Ack()
        kv = run.sequence.kv
        if message.num_tokens_start > run.num_cached_tokens or message.num_tokens_stop != kv.num_tokens:
            raise AmpdError(
                ErrorCode.INVALID_REQUEST,
                f"KV of tokens {run.num_cached_tokens} to {kv.num_tokens} is wanted, "
                f"{message.num_tokens_start} to {message.num_tokens_stop} was offered",
            )
        run.offered = True
        if not await self._engine.reserve(kv, message.num_tokens_stop, run.sequence.arrival):
            error = AmpdError(ErrorCode.OUT_OF_BLOCKS, "no KV blocks for the prefilled tokens", retry_after_s=1.0)
            self._fail(run, error)
            raise error
        self._waiting_run(message)  # the round may have been stopped meanwhile
        remote = run.message.remote
        assert remote is not None
        limits = self._context.limits
        run.pull = self._context.kv_client.start_pull(
            PullRequest(
                key=run.key,
                endpoints=message.source.endpoints,
                ticket=remote.ticket,
                source=message.source.worker_id,
                source_incarnation=message.source.incarnation,
                lease_id=message.source.lease_id,
                generation=message.source.generation,
                block_table=tuple(kv.block_table),
                token_start=run.num_cached_tokens,
                token_stop=message.num_tokens_stop,
                progress_timeout_s=limits.kv_progress_timeout_s,
                deadline_s=run.message.deadline_s,
            )
        )
        self._context.spawn(self._finish_pull(run), f"pull:{message.session}")
        return Ack()

    async def prefill_done(self, message: PrefillDone) -> Message:
        run = self._waiting_run(message)
        if run.prefill_done is None:
            run.prefill_done = message
            run.prefill_done_at = self._context.clock()
            self._decode_if_complete(run)
        return Ack()

    # ------------------------------------------------------------------------- starting a round

    def _check_incarnation(self, message: RunRound | GrantHistory) -> None:
        context = self._context
        if message.incarnation != context.incarnation:
            raise AmpdError(
                ErrorCode.WRONG_INCARNATION, f"this is incarnation {context.incarnation} of {context.worker_id}"
            )

    def _hold(self, key: SessionKey) -> HeldSession:
        held = self._sessions.get(key)
        if held is not None:
            return held
        if len(self._sessions) >= self._context.limits.max_sessions and not self._forget_idle_session():
            raise AmpdError(ErrorCode.NO_CAPACITY, "every session slot of this worker is running", retry_after_s=1.0)
        held = HeldSession(SessionKv(key))
        self._sessions[key] = held
        self._engine.scheduler.sessions[key] = held.kv
        return held

    def _forget_idle_session(self) -> bool:
        idle = [held for held in self._sessions.values() if held.kv.sequence is None and not held.lock.locked()]
        oldest = min(idle, key=lambda held: held.kv.last_used, default=None)
        if oldest is None:
            return False
        assert isinstance(oldest.kv.key, SessionKey)
        del self._sessions[oldest.kv.key]
        self._engine.scheduler.drop(oldest.kv.key)
        self._context.kv_changes.note_gone(oldest.kv.key)
        return True

    def _start(self, held: HeldSession, message: RunRound, received_at: float) -> Run:
        context, kv = self._context, held.kv
        key = RoundKey(message.tenant, message.session, message.round, message.attempt)
        is_local = message.remote is None
        last = kv.num_tokens - 1  # its KV is always computed: its logits give the first output token
        num_here = min(kv.num_kv + self._engine.count_restorable(kv), last) if is_local else kv.num_kv
        num_fetch = min(message.num_source_tokens, last) if is_local and message.source is not None else 0
        num_fetch = num_fetch if num_fetch > num_here else 0
        sequence = Sequence(
            key=key,
            kv=kv,
            sampling=message.sampling,
            output_start=message.num_history_tokens + message.num_input_tokens,
            arrival=received_at,
            state=SequenceState.READY if is_local and not num_fetch else SequenceState.WAITING_KV,
            waiting=WaitingPrefill(
                key=key,
                arrival=received_at,
                session_arrival=received_at - message.session_age_s,
                ttft_deadline=received_at + message.slo.ttft_s - message.waited_s,
                work_s=0.0,  # the scheduler predicts it, step by step
            ),
            itl_slo_s=message.slo.itl_s,
        )
        run = Run(
            message=message,
            sequence=sequence,
            decoder=context.codec.stream_decoder(message.stop.stop),
            stream=subjects.round_stream(message.tenant, message.session, message.round),
            received_at=received_at,
            num_cached_tokens=max(num_here, num_fetch),
            num_streamed=message.num_forced_tokens,
            num_fetch_tokens=num_fetch,
        )
        if is_local:
            sequence.on_start = run.note_first_step
        for token in kv.tokens[sequence.output_start :]:
            run.decoder.push(token)  # delivered by an earlier attempt: only the decoder's state is wanted
        if message.remote is not None and kv.num_kv > 0:
            run.history_lease = grant_history(context, key, kv, kv.num_kv)
        self._engine.submit(sequence, lambda _, token: self._take_token(run, token))
        if num_fetch:
            run.fetching = context.spawn(fetch_history(context, run), f"move:{message.session}")
        return run

    def _acknowledge(self, run: Run, state: Literal["started", "running", "finished"]) -> RunRoundAck:
        lease = run.history_lease
        return RunRoundAck(
            state=state,
            num_cached_tokens=run.num_cached_tokens,
            history=describe_source(self._context, lease) if lease is not None else None,
            output_token_ids=run.ended.output_token_ids if run.ended else run.output_token_ids(),
        )

    # ----------------------------------------------------------------------- remote prefill's end

    def _waiting_run(self, message: KvOffer | PrefillDone) -> Run:
        held = self._sessions.get(SessionKey(message.tenant, message.session))
        run = held.run if held is not None else None
        if (
            run is None
            or run.ended is not None
            or run.stopped
            or (run.message.round, run.message.attempt) != (message.round, message.attempt)
            or run.sequence.state is SequenceState.ENDED
        ):
            raise AmpdError(ErrorCode.STALE_ATTEMPT, f"attempt {message.attempt} of this round does not run here")
        return run

    async def _finish_pull(self, run: Run) -> None:
        assert run.pull is not None
        try:
            run.pulled = await run.pull.wait()
        except KvTransferError as error:
            if run.ended is None and not run.stopped:
                self._fail(run, error)
            return
        run.pulled_at = self._context.clock()
        self._context.observe_pull(run.pulled, "increment", run.message.session, run.message.round)
        self._decode_if_complete(run)

    def _decode_if_complete(self, run: Run) -> None:
        """With the KV and the first token both here, the round goes on as any other."""
        if run.pulled is None or run.prefill_done is None or run.sequence.state is not SequenceState.WAITING_KV:
            return
        kv = run.sequence.kv
        kv.num_kv = kv.num_tokens
        kv.tokens.append(run.prefill_done.first_token_id)
        self._release_history(run)
        self._engine.make_ready(run.sequence)
        self._take_token(run, run.prefill_done.first_token_id)

    # ------------------------------------------------------------------------- tokens and the end

    def _take_token(self, run: Run, token: int) -> None:
        """A new output token, already appended: stream it, and see whether the round is over."""
        if run.stopped:
            return
        context, now = self._context, self._context.clock()
        if run.first_token_at is None:
            run.first_token_at = now
            if run.message.remote is None:
                context.ttft.add(now, now - run.received_at)
        else:
            context.itl.add(now, now - run.last_token_at)
        run.last_token_at = now
        text = run.decoder.push(token)
        reason = run.finish_reason(token, context.codec.eos_token_ids, context.max_context_tokens)
        if reason is not None and not run.decoder.stopped:
            text += run.decoder.finish()
        context.streams.put(run.stream, run.tokens_message(token, text, run.encoding), run.encoding)
        if reason is not None:
            self._end(run, reason, None)

    def _fail(self, run: Run, error: AmpdError) -> None:
        """End a run that no forward pass touches (it waits for KV) with an error; the coordinator decides what next."""
        assert run.sequence.state is SequenceState.WAITING_KV
        log.warning("round_failed", session=run.message.session, round=run.message.round, error=str(error))
        self._end(run, None, error)

    def _end(self, run: Run, reason: FinishReason | None, error: AmpdError | None) -> None:
        context, message = self._context, run.message
        usage = run.usage(context.worker_id, context.clock())
        run.ended = RoundEnded(
            tenant=message.tenant,
            session=message.session,
            round=message.round,
            attempt=message.attempt,
            worker_id=context.worker_id,
            incarnation=context.incarnation,
            output_token_ids=run.output_token_ids(),
            finish_reason=reason,
            usage=usage,
            error=error_reply(error) if error is not None else None,
        )
        self._release_history(run)
        self._engine.finish(run.sequence)
        kv = run.sequence.kv  # the coordinator expects all but the last token's, of a round that went well
        kv.told = (kv.num_tokens - 1, 0) if reason is not None else NOT_TOLD
        if reason is not None:
            context.streams.put(run.stream, run.finished_message(reason, usage), run.encoding)
        context.outbox.send(run.ended)

    def _release_history(self, run: Run) -> None:
        lease = run.history_lease
        if lease is not None:
            run.history_lease = None
            self._context.leases.release(lease.lease_id, lease.generation)

    async def _stop_run(self, held: HeldSession) -> None:
        """Stop the session's run, if any; on return nothing reads or writes its blocks."""
        run, held.run = held.run, None
        if run is None:
            return
        run.stopped = True
        await self._halt_transfers(run)
        self._release_history(run)
        await self._engine.remove(run.sequence)

    async def _halt_transfers(self, run: Run) -> None:
        """On return no transfer writes to its blocks."""
        run.halted = True
        if run.pull is not None:
            await run.pull.cancel()
        if run.fetching is not None and not run.fetching.done():
            self._engine.wake()
            await asyncio.wait([run.fetching])

    async def renew_leases(self) -> None:
        """Keep alive what sessions that move here are read from: called every third of a lease's ttl."""
        for held in list(self._sessions.values()):
            if held.run is not None:
                await renew_source(self._context, held.run)

    async def expire_deadlines(self) -> None:
        """End the rounds whose deadline has passed; the coordinator is told as of any other end."""
        now = self._context.clock()
        for held in list(self._sessions.values()):
            run = held.run
            if run is None or run.ended is not None or now < run.received_at + run.message.deadline_s:
                continue
            async with held.lock:
                if held.run is run and run.ended is None:
                    await self._halt_transfers(run)
                    await self._engine.remove(run.sequence)
                    if run.ended is None:  # it may have ended in the step just waited for
                        self._end(run, None, AmpdError(ErrorCode.DEADLINE_EXCEEDED, "the round's deadline has passed"))

    async def close(self) -> None:
        for held in list(self._sessions.values()):
            async with held.lock:
                await self._stop_run(held)
