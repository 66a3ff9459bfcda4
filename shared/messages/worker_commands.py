"""Coordinator -> worker, and the answers."""

from __future__ import annotations

from typing import Literal

import msgspec

from shared.messages.base import Encoding, Message, Role, SamplingParams, Slo, StopConditions


class KvSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where to pull KV: a lease at a worker, good for token positions [0, num_tokens) or the range agreed."""

    worker_id: str
    incarnation: int
    endpoints: tuple[str, ...]
    lease_id: int
    generation: int
    ttl_s: float
    ticket: bytes = b""  # signed by the coordinator; single use


class RemotePrefill(msgspec.Struct, frozen=True, kw_only=True):
    """The prefill of this attempt runs on `worker_id`; `ticket` lets the decode worker pull its increment."""

    worker_id: str
    incarnation: int
    ticket: bytes = b""


class ResidentKv(msgspec.Struct, frozen=True, kw_only=True):
    """KV of token positions [0, num_tokens) that a prefill worker is believed to have kept. `checksum` is zlib.crc32 of
    those packed tokens: a worker that holds another prefix, or none, computes or pulls instead."""

    num_tokens: int
    checksum: int


class RunRound(Message, frozen=True, kw_only=True, tag="run_round"):
    """To the session's decode worker: run this attempt of a round. Answered by RunRoundAck, NeedTokens or ErrorReply.

    `token_ids` are the conversation's tokens from position `tokens_start` to its end: history, this round's input,
    then `num_forced_tokens` output tokens that an earlier attempt has already delivered (they are the prefix of the
    output and are not streamed again). `prefix_checksum` is zlib.crc32 of the packed tokens before tokens_start: a
    worker that lacks them, or has others, answers NeedTokens. A newer attempt of a round supersedes the older: the
    worker stops and forgets it.

    `source`: the session comes from another worker, which lends its KV of positions [0, num_source_tokens): pull it
    before the prefill, which is local. What cannot be had is computed.
    """

    tenant: str
    session: str
    round: int
    attempt: int
    incarnation: int
    tokens_start: int
    prefix_checksum: int
    token_ids: bytes
    num_history_tokens: int
    num_input_tokens: int
    num_forced_tokens: int
    sampling: SamplingParams
    stop: StopConditions
    slo: Slo
    deadline_s: float
    stream_encoding: Encoding
    remote: RemotePrefill | None  # None: prefill locally
    waited_s: float = 0.0  # since the round was accepted
    session_age_s: float = 0.0  # since the session was opened: program-level FCFS orders by it
    source: KvSource | None = None
    num_source_tokens: int = 0


class RunRoundAck(Message, frozen=True, kw_only=True, tag="run_round_ack"):
    """The decode worker has the round. `history` is set for a remote prefill that has KV to read first."""

    state: Literal["started", "running", "finished"]
    num_cached_tokens: int  # token positions [0, n) whose KV it holds, or is about to fetch
    history: KvSource | None
    output_token_ids: bytes = b""  # what this attempt has produced so far, the forced ones included


class NeedTokens(Message, frozen=True, kw_only=True, tag="need_tokens"):
    """The worker knows this session's tokens only up to `num_known_tokens`: send RunRound again from there."""

    num_known_tokens: int


class PrefillTask(Message, frozen=True, kw_only=True, tag="prefill_task"):
    """To a prefill worker: make KV of positions [num_cached_tokens, num_cached_tokens + len(token_ids)) available to
    the decode worker, and compute the first output token. Metadata only: the history's KV that the worker lacks is
    pulled from `history` when the task is about to run.

    With `resident` of R tokens that it still holds, the worker pulls only [R, num_cached_tokens) and computes only from
    max(R, num_cached_tokens) on. `prefix_checksum` is zlib.crc32 of the packed tokens before num_cached_tokens.
    `keep`: hold on to the KV of the whole prompt afterwards, as long as there is room.
    """

    tenant: str
    session: str
    round: int
    attempt: int
    incarnation: int
    num_cached_tokens: int
    token_ids: bytes
    num_forced_tokens: int  # index of the output token that the prefill samples
    sampling: SamplingParams
    slo: Slo
    waited_s: float  # since the round was accepted
    deadline_s: float
    history: KvSource | None
    decode_worker: str
    decode_incarnation: int
    prefix_checksum: int = 0
    resident: ResidentKv | None = None
    keep: bool = False
    session_age_s: float = 0.0


class CancelRun(Message, frozen=True, kw_only=True, tag="cancel_run"):
    """Stop attempts <= `attempt` of a round, on a decode or a prefill worker. Unknown rounds are acknowledged too."""

    tenant: str
    session: str
    round: int
    attempt: int


class DropSession(Message, frozen=True, kw_only=True, tag="drop_session"):
    """Forget the session: stop its round, give back its blocks and leases."""

    tenant: str
    session: str


class GrantHistory(Message, frozen=True, kw_only=True, tag="grant_history"):
    """To a session's decode worker while none of its rounds runs there: let another worker read the session's KV.
    Answered by HistoryGranted, or an ErrorReply (a round runs, nothing is held).

    `hold`: the session moves to that worker. What is in host memory is brought back first, and the KV is not evicted
    while the lease lives. Else it is read ahead of the next round, and running work goes before it.
    """

    tenant: str
    session: str
    incarnation: int
    num_tokens: int  # of the conversation's finished rounds
    hold: bool = False


class HistoryGranted(Message, frozen=True, kw_only=True, tag="history_granted"):
    """KV of token positions [0, num_tokens) can be pulled from `history`."""

    num_tokens: int
    history: KvSource


class StageKv(Message, frozen=True, kw_only=True, tag="stage_kv"):
    """To a prefill worker that holds a part of a session's KV: pull [resident.num_tokens, num_tokens) and keep it.
    Acknowledged at once; KvStaged tells the outcome. A prefill of the session, or want of room, goes before it."""

    tenant: str
    session: str
    incarnation: int
    resident: ResidentKv | None
    num_tokens: int
    checksum: int  # zlib.crc32 of the packed tokens [0, num_tokens)
    history: KvSource
    decode_worker: str
    decode_incarnation: int


class SetRole(Message, frozen=True, kw_only=True, tag="set_role"):
    """Advertise this role from now on; what was commanded before goes on. A heartbeat tells it, then comes the Ack."""

    incarnation: int
    role: Role


WorkerCommand = RunRound | PrefillTask | CancelRun | DropSession | GrantHistory | StageKv | SetRole
WorkerAnswer = RunRoundAck | NeedTokens | HistoryGranted
