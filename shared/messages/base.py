"""What the messages of every module here are made of: the base class, options, usage, statistics, and the two
answers that any request may get."""

from __future__ import annotations

from typing import Literal

import msgspec

from shared.errors import ErrorCode

Role = Literal["prefill", "decode", "both"]
Encoding = Literal["msgpack", "json"]
TokenIds = bytes | list[int]
FinishReason = Literal["stop", "length"]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of everything that crosses the bus."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """temperature 0 is greedy. The draw of output token i depends on (seed, i) alone, so a resume repeats it."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


class StopConditions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The round ends at EOS (unless ignore_eos), at one of stop_token_ids, at one of the strings in stop, or at
    max_output_tokens. The text of a stop string, and what follows it, is not streamed as text; its tokens are."""

    max_output_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class Slo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Latency objectives of a round, seconds."""

    ttft_s: float = 5.0
    itl_s: float = 0.5


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a round cost. Durations in seconds; kv_bytes_* are KV payload bytes over the data plane."""

    num_history_tokens: int
    num_input_tokens: int
    num_cached_tokens: int  # tokens whose KV was not computed again for this round
    num_output_tokens: int
    prefill: Literal["local", "remote"]
    prefill_worker: str
    decode_worker: str
    kv_bytes_read: int = 0  # history, decode worker -> prefill worker, or from the worker that the session comes from
    kv_bytes_written: int = 0  # increment, prefill worker -> decode worker
    queued_s: float = 0.0
    transfer_s: float = 0.0  # time the round waited for KV bytes, not hidden behind compute
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_attempts: int = 1
    num_preemptions: int = 0
    moved_from: str = ""  # worker that the session came from in this round, with its KV
    num_moved_tokens: int = 0  # whose KV came; 0 of a session that moved: the pull failed, they were computed again

    @property
    def kv_bytes_moved(self) -> int:
        return self.kv_bytes_read + self.kv_bytes_written


class WindowStats(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics over the last `window_s` seconds; count 0 means nothing was observed and the rest is 0."""

    window_s: float = 10.0
    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p95: float = 0.0


class ErrorReply(Message, frozen=True, kw_only=True, tag="error"):
    code: ErrorCode
    message: str
    retry_after_s: float | None = None


class Ack(Message, frozen=True, kw_only=True, tag="ack"):
    pass
