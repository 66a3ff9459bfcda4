"""A session that comes from another decode worker: its KV is pulled from there before its round's prefill."""

from __future__ import annotations

import contextlib

import structlog

from services.worker.context import WorkerContext
from services.worker.runs import Run
from shared.core.resident_key import resident_key
from shared.core.sequences import SequenceState
from shared.core.types import SessionKey
from shared.errors import AmpdError, ErrorCode
from shared.messages import KvRenew
from shared.transport.receiver import PullRequest, PullResult

log = structlog.get_logger(__name__)

ROOM_PATIENCE_S = 2.0  # for blocks; then the history is computed like that of any other round


async def fetch_history(context: WorkerContext, run: Run) -> None:
    """Pull what the worker that the session comes from has, then let the round run. Nothing depends on it: what has
    not come is computed."""
    kv = run.sequence.kv
    started_at = context.clock()
    try:
        result = await _pull(context, run)
    except AmpdError as error:
        if run.is_waiting:
            log.warning("move_failed", session=run.message.session, round=run.message.round, error=str(error))
    else:
        if run.is_waiting:
            context.observe_pull(result, "move", run.message.session, run.message.round)
            run.fetched = result
            kv.num_kv = run.num_fetch_tokens
    if run.is_waiting:
        run.fetch_s = context.clock() - started_at
        context.engine.make_ready(run.sequence)


async def _pull(context: WorkerContext, run: Run) -> PullResult:
    """Raises AmpdError OUT_OF_BLOCKS, OVERLOADED, KV_TRANSFER_FAILED or what the source says."""
    message, kv, limits = run.message, run.sequence.kv, context.limits
    source = message.source
    assert source is not None
    await context.engine.restore(kv, run.num_fetch_tokens)
    if not await context.engine.reserve_soon(kv, run.num_fetch_tokens, ROOM_PATIENCE_S, lambda: run.is_waiting):
        raise AmpdError(ErrorCode.OUT_OF_BLOCKS, "no KV blocks for the session's history")
    run.pull = context.kv_client.start_pull(
        PullRequest(
            key=resident_key(SessionKey(message.tenant, message.session)),
            endpoints=source.endpoints,
            ticket=source.ticket,
            source=source.worker_id,
            source_incarnation=source.incarnation,
            lease_id=source.lease_id,
            generation=source.generation,
            block_table=tuple(kv.block_table),
            token_start=kv.num_kv,
            token_stop=run.num_fetch_tokens,
            progress_timeout_s=limits.kv_progress_timeout_s,
            deadline_s=message.deadline_s,
        )
    )
    return await run.pull.wait()


async def renew_source(context: WorkerContext, run: Run) -> None:
    """Keep the source's lease alive while the KV is on its way."""
    source = run.message.source
    if source is not None and run.is_waiting and run.sequence.state is SequenceState.WAITING_KV:
        with contextlib.suppress(AmpdError):  # the pull itself finds out
            await context.ask_peer(source.worker_id, KvRenew(lease_id=source.lease_id, generation=source.generation))
