"""The tokens of a round as its decode worker puts them together, and what of its KV they leave valid."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence

from services.worker.context import WorkerContext
from shared.core.batching import Scheduler
from shared.core.sequences import SessionKv
from shared.errors import AmpdError, ErrorCode
from shared.messages import NeedTokens, RunRound


def assemble_tokens(kv: SessionKv, message: RunRound) -> array[int] | NeedTokens:
    """The conversation's tokens: what is known here up to tokens_start, then those of the message."""
    if kv.num_tokens < message.tokens_start:
        return NeedTokens(num_known_tokens=kv.num_tokens)
    prefix = kv.tokens[: message.tokens_start]
    if zlib.crc32(prefix.tobytes()) != message.prefix_checksum:
        return NeedTokens(num_known_tokens=0)
    return prefix + array("i", message.token_ids)


def check_fits(context: WorkerContext, message: RunRound, num_tokens: int) -> None:
    """Raises AmpdError INVALID_REQUEST or CONTEXT_TOO_LONG for a round that cannot run here whatever else does."""
    expected = message.num_history_tokens + message.num_input_tokens + message.num_forced_tokens
    if num_tokens != expected or message.num_input_tokens < 1:
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"{num_tokens} tokens arrived, {expected} were announced")
    allocator = context.engine.scheduler.allocator
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


def adopt_tokens(scheduler: Scheduler, kv: SessionKv, tokens: array[int]) -> None:
    """Keep the KV of the common prefix of old and new tokens; forget the rest."""
    common = _common_prefix_length(kv.tokens, tokens)
    kv.tokens = tokens
    # at least one token is computed in every round: its logits give the first output token
    scheduler.truncate(kv, min(common, len(tokens) - 1))


def _common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])
