"""The decode role: sessions and their KV, the rounds that run on it, and the streams of their tokens."""

from __future__ import annotations

import asyncio
import zlib
from array import array
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from typing import Literal

import structlog

from services.worker.context import WorkerContext
from services.worker.runs import Run
from shared import subjects
from shared.core.batching import Sequence, SequenceState, SessionKv
from shared.core.types import RoundKey, SessionKey
from shared.errors import AmpdError, ErrorCode, KvTransferError
from shared.messages import (
    Ack,
    CancelRun,
    DropSession,
    FinishReason,
    KvOffer,
    KvSource,
    Message,
    NeedTokens,
    PrefillDone,
    RoundEnded,
    RunRound,
    RunRoundAck,
    error_reply,
)
from shared.transport.leases import Lease, LeaseEnd
from shared.transport.receiver import PullRequest

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class HeldSession:
    """A session bound here. The lock keeps commands about one session in order."""

    kv: SessionKv
    run: Run | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class DecodeRole:
    def __init__(self, context: WorkerContext) -> None:
        self._context = context
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
        context = self._context
        if message.incarnation != context.incarnation:
            raise AmpdError(
                ErrorCode.WRONG_INCARNATION, f"this is incarnation {context.incarnation} of {context.worker_id}"
            )
        held = self._hold(SessionKey(message.tenant, message.session))
        async with held.lock:
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
            tokens = self._assemble_tokens(held.kv, message)
            if isinstance(tokens, NeedTokens):
                return tokens
            self._check_fits(message, len(tokens))
            self._adopt_tokens(held.kv, tokens)
            held.run = self._start(held, message)
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
        return Ack()

    async def drop_session(self, message: DropSession) -> Message:
        key = SessionKey(message.tenant, message.session)
        held = self._sessions.get(key)
        if held is not None:
            async with held.lock:
                await self._stop_run(held)
                self._sessions.pop(key, None)
                self._engine.scheduler.drop(key)
        return Ack()

    async def kv_offer(self, message: KvOffer) -> Message:
        """The prefill of a round has begun elsewhere: reserve blocks and pull its KV as it is computed."""
        run = self._waiting_run(message)
        if run.offered:
            return Ack()
        kv = run.sequence.kv
        if (message.num_tokens_start, message.num_tokens_stop) != (run.num_cached_tokens, kv.num_tokens):
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
                token_start=message.num_tokens_start,
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
        return True

    def _assemble_tokens(self, kv: SessionKv, message: RunRound) -> array[int] | NeedTokens:
        """The conversation's tokens: what is known here up to tokens_start, then those of the message."""
        if kv.num_tokens < message.tokens_start:
            return NeedTokens(num_known_tokens=kv.num_tokens)
        prefix = kv.tokens[: message.tokens_start]
        if zlib.crc32(prefix.tobytes()) != message.prefix_checksum:
            return NeedTokens(num_known_tokens=0)
        return prefix + array("i", message.token_ids)

    def _check_fits(self, message: RunRound, num_tokens: int) -> None:
        context = self._context
        expected = message.num_history_tokens + message.num_input_tokens + message.num_forced_tokens
        if num_tokens != expected or message.num_input_tokens < 1:
            raise AmpdError(ErrorCode.INVALID_REQUEST, f"{num_tokens} tokens arrived, {expected} were announced")
        allocator = self._engine.scheduler.allocator
        longest = num_tokens - message.num_forced_tokens + message.stop.max_output_tokens
        if num_tokens >= context.max_context_tokens:
            raise AmpdError(
                ErrorCode.CONTEXT_TOO_LONG, f"{num_tokens} tokens; the model takes {context.max_context_tokens}"
            )
        needed = allocator.blocks_for(min(longest, context.max_context_tokens))
        if needed > allocator.num_usable:
            raise AmpdError(
                ErrorCode.CONTEXT_TOO_LONG,
                f"the round needs up to {needed} KV blocks and this worker has {allocator.num_usable}: "
                "ask for fewer output tokens, or start the worker with more --kv-memory-mb",
            )

    def _adopt_tokens(self, kv: SessionKv, tokens: array[int]) -> None:
        """Keep the KV of the common prefix of old and new tokens; forget the rest."""
        common = _common_prefix_length(kv.tokens, tokens)
        kv.tokens = tokens
        # at least one token is computed in every round: its logits give the first output token
        self._engine.scheduler.truncate(kv, min(common, len(tokens) - 1))

    def _start(self, held: HeldSession, message: RunRound) -> Run:
        context, kv = self._context, held.kv
        now = context.clock()
        key = RoundKey(message.tenant, message.session, message.round, message.attempt)
        sequence = Sequence(
            key=key,
            kv=kv,
            sampling=message.sampling,
            output_start=message.num_history_tokens + message.num_input_tokens,
            arrival=now,
            state=SequenceState.READY if message.remote is None else SequenceState.WAITING_KV,
        )
        run = Run(
            message=message,
            sequence=sequence,
            decoder=context.codec.stream_decoder(message.stop.stop),
            stream=subjects.round_stream(message.tenant, message.session, message.round),
            received_at=now,
            num_cached_tokens=kv.num_kv,
            num_streamed=message.num_forced_tokens,
        )
        for token in kv.tokens[sequence.output_start :]:
            run.decoder.push(token)  # delivered by an earlier attempt: only the decoder's state is wanted
        if message.remote is not None and kv.num_kv > 0:
            run.history_lease = context.leases.grant(
                key,
                tuple(kv.block_table),
                0,
                kv.num_kv,
                ttl_s=context.limits.lease_ttl_s,
                on_end=_ignore_lease_end,
                complete=True,
                num_layers=self._engine.runner.layout.num_layers,
            )
        self._engine.submit(sequence, lambda _, token: self._take_token(run, token))
        return run

    def _acknowledge(self, run: Run, state: Literal["started", "running", "finished"]) -> RunRoundAck:
        lease, context = run.history_lease, self._context
        history = None
        if lease is not None:
            history = KvSource(
                worker_id=context.worker_id,
                incarnation=context.incarnation,
                endpoints=context.kv_endpoints,
                lease_id=lease.lease_id,
                generation=lease.generation,
                ttl_s=lease.ttl_s,
            )
        return RunRoundAck(
            state=state,
            num_cached_tokens=run.num_cached_tokens,
            history=history,
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
        self._context.observe_pull(run.pulled)
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
        if run.pull is not None:
            await run.pull.cancel()
        self._release_history(run)
        await self._engine.remove(run.sequence)

    async def expire_deadlines(self) -> None:
        """End the rounds whose deadline has passed; the coordinator is told as of any other end."""
        now = self._context.clock()
        for held in list(self._sessions.values()):
            run = held.run
            if run is None or run.ended is not None or now < run.received_at + run.message.deadline_s:
                continue
            async with held.lock:
                if held.run is run and run.ended is None:
                    if run.pull is not None:
                        await run.pull.cancel()
                    await self._engine.remove(run.sequence)
                    if run.ended is None:  # it may have ended in the step just waited for
                        self._end(run, None, AmpdError(ErrorCode.DEADLINE_EXCEEDED, "the round's deadline has passed"))

    async def close(self) -> None:
        for held in list(self._sessions.values()):
            async with held.lock:
                await self._stop_run(held)


def _common_prefix_length(a: AbstractSequence[int], b: AbstractSequence[int]) -> int:
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])


def _ignore_lease_end(lease: Lease, end: LeaseEnd) -> None:
    """The session holds the blocks of its history whether anybody reads them or not."""
