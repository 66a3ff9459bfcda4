"""Every message on the bus: one tagged union, MessagePack on the wire, JSON accepted on request subjects.

Token ids travel as little-endian int32 bytes (`pack_token_ids`), never as lists (a list of 32k ids costs
481 us to decode, the bytes 9 us); a JSON client may send a list. Durations are seconds; no clock of one
process means anything in another, so deadlines travel as seconds from receipt.

Identity: a session is (tenant, session); a round is its index in the session, from 0; an attempt counts the
placements of one round, from 1. A message about an older attempt than the newest seen is stale: it is
acknowledged and ignored. `incarnation` is drawn anew whenever a worker process starts.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Literal

import msgspec

from shared.errors import AmpdError, ErrorCode

Role = Literal["prefill", "decode", "both"]
Encoding = Literal["msgpack", "json"]
TokenIds = bytes | list[int]
FinishReason = Literal["stop", "length"]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of everything that crosses the bus."""


# ------------------------------------------------------------------------------------------- values


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


# ------------------------------------------------------------------------- client -> coordinator


class TokensInput(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    token_ids: TokenIds


class TextInput(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """Text, tokenised as it is: no chat template is applied."""

    text: str


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: str
    content: str


class ChatInput(msgspec.Struct, frozen=True, kw_only=True, tag="chat"):
    """The *new* messages of this round (a tool's result, the user's next turn), put through the model's template."""

    messages: tuple[ChatMessage, ...]


RoundInput = TokensInput | TextInput | ChatInput


class OpenSession(Message, frozen=True, kw_only=True, tag="open"):
    """Open the session named in the subject. Opening an open session with equal options is a success."""

    slo: Slo = Slo()
    idle_timeout_s: float = 600.0


class SubmitRound(Message, frozen=True, kw_only=True, tag="round"):
    """One round. The same idempotency_key again returns the first answer and starts nothing."""

    input: RoundInput
    idempotency_key: str = ""  # empty: no protection against a repeat
    sampling: SamplingParams = SamplingParams()
    stop: StopConditions = StopConditions()
    slo: Slo | None = None  # None: the session's
    deadline_s: float = 600.0
    stream_encoding: Encoding | None = None  # None: as the request was encoded


class CancelRound(Message, frozen=True, kw_only=True, tag="cancel"):
    """Cancel the round in flight (`round` None or its index). A round that has ended is left as it is."""

    round: int | None = None


class CloseSession(Message, frozen=True, kw_only=True, tag="close"):
    """Close the session; a round in flight is cancelled; every block is given back."""


class InspectSession(Message, frozen=True, kw_only=True, tag="inspect"):
    include_tokens: bool = False


class ReadRound(Message, frozen=True, kw_only=True, tag="read_round"):
    """The output of a round from output index `start_index`: how a client fills a gap in its stream."""

    round: int
    start_index: int = 0


ClientRequest = OpenSession | SubmitRound | CancelRound | CloseSession | InspectSession | ReadRound


class SessionOpened(Message, frozen=True, kw_only=True, tag="opened"):
    session: str
    model: str
    max_context_tokens: int
    vocab_size: int


class RoundAccepted(Message, frozen=True, kw_only=True, tag="accepted"):
    session: str
    round: int
    stream: str  # subject of the round's tokens
    num_history_tokens: int
    num_input_tokens: int


class RoundCancelled(Message, frozen=True, kw_only=True, tag="cancelled"):
    """`cancelled` is False when there was nothing in flight."""

    session: str
    round: int | None
    cancelled: bool


class SessionClosed(Message, frozen=True, kw_only=True, tag="closed"):
    session: str
    num_rounds: int


class RoundInfo(msgspec.Struct, frozen=True, kw_only=True):
    round: int
    state: Literal["queued", "prefilling", "decoding", "finished", "failed", "cancelled"]
    attempt: int
    num_input_tokens: int
    num_output_tokens: int
    usage: Usage | None = None
    error: str | None = None


class SessionInfo(Message, frozen=True, kw_only=True, tag="session_info"):
    session: str
    state: Literal["idle", "running", "closed"]
    decode_worker: str | None
    num_tokens: int
    rounds: tuple[RoundInfo, ...]  # the newest 64
    token_ids: TokenIds | None = None  # every finished round's tokens, when asked for


class RoundSnapshot(Message, frozen=True, kw_only=True, tag="round_snapshot"):
    """Output tokens from start_index; `finished`/`failed` are set when the round has ended."""

    session: str
    round: int
    start_index: int
    token_ids: TokenIds
    text: str = ""
    finished: RoundFinished | None = None
    failed: RoundFailed | None = None


class ErrorReply(Message, frozen=True, kw_only=True, tag="error"):
    code: ErrorCode
    message: str
    retry_after_s: float | None = None


# -------------------------------------------------------- decode worker -> client and coordinator


class RoundTokens(Message, frozen=True, kw_only=True, tag="tokens"):
    """Output tokens [start_index, start_index + n) of a round. `seq` counts the messages of one attempt from 0."""

    session: str
    round: int
    attempt: int
    seq: int
    start_index: int
    token_ids: TokenIds
    text: str = ""


class RoundFinished(Message, frozen=True, kw_only=True, tag="finished"):
    """The last message of a round that succeeded. num_output_tokens tells whether any token was missed."""

    session: str
    round: int
    attempt: int
    seq: int
    num_output_tokens: int
    finish_reason: FinishReason
    usage: Usage


class RoundFailed(Message, frozen=True, kw_only=True, tag="failed"):
    """The last message of a round that did not; published by the coordinator."""

    session: str
    round: int
    attempt: int
    seq: int
    num_output_tokens: int
    error: ErrorReply


StreamMessage = RoundTokens | RoundFinished | RoundFailed


# -------------------------------------------------------------------------- coordinator -> worker


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


class Ack(Message, frozen=True, kw_only=True, tag="ack"):
    pass


WorkerCommand = RunRound | PrefillTask | CancelRun | DropSession | GrantHistory | StageKv

# -------------------------------------------------------------------------- worker -> coordinator


class RoundEnded(Message, frozen=True, kw_only=True, tag="round_ended"):
    """From the decode worker, repeated until acknowledged: the whole output of an attempt, or why it stopped.

    `output_token_ids` includes the forced prefix. `error` with code OUT_OF_BLOCKS, KV_TRANSFER_FAILED or WORKER_LOST
    may be tried again by the coordinator as a new attempt. Its acknowledgement lets the worker forget the attempt.
    """

    tenant: str
    session: str
    round: int
    attempt: int
    worker_id: str
    incarnation: int
    output_token_ids: bytes
    finish_reason: FinishReason | None
    usage: Usage | None
    error: ErrorReply | None


class PrefillEnded(Message, frozen=True, kw_only=True, tag="prefill_ended"):
    """From the prefill worker, repeated until acknowledged: the task has left its queue, done or failed."""

    tenant: str
    session: str
    round: int
    attempt: int
    worker_id: str
    incarnation: int
    error: ErrorReply | None
    num_new_tokens: int
    queued_s: float
    transfer_s: float
    prefill_s: float
    kv_bytes_read: int
    num_resident_tokens: int = 0  # of the session's KV that the worker holds from now on
    num_reused_tokens: int = 0  # of resident KV that this prefill did not have to pull or compute


class KvStaged(Message, frozen=True, kw_only=True, tag="kv_staged"):
    """From a prefill worker, repeated until acknowledged: how much of a session's KV it holds after a StageKv."""

    tenant: str
    session: str
    worker_id: str
    incarnation: int
    num_resident_tokens: int
    kv_bytes_read: int
    error: ErrorReply | None = None


class KvHeld(msgspec.Struct, frozen=True, kw_only=True):
    """KV of an idle session that a worker has: positions [0, num_device_tokens), and in host memory those of the next
    num_host_tokens. Both 0: nothing is left."""

    tenant: str
    session: str
    num_device_tokens: int
    num_host_tokens: int = 0


class QueuedPrefill(msgspec.Struct, frozen=True, kw_only=True):
    """One waiting or running prefill, as routing and reordering see it."""

    session: str
    num_history_tokens: int
    num_new_tokens: int
    waiting_s: float


class Heartbeat(Message, frozen=True, kw_only=True, tag="heartbeat"):
    """Once a second from every worker. `ttft` is of rounds prefilled here, `itl` of rounds decoded here."""

    worker_id: str
    incarnation: int
    role: Role
    seq: int
    model: str
    max_context_tokens: int
    vocab_size: int
    layout_hash: str
    kv_endpoints: tuple[str, ...]
    num_blocks: int
    num_free_blocks: int
    block_size: int
    kv_bytes_per_token: int
    num_sessions: int
    num_running: int
    num_waiting: int
    num_leases: int
    queue: tuple[QueuedPrefill, ...]  # the first 64
    queue_num_tokens: int  # new tokens of the whole queue, the running prefill's rest included
    ttft: WindowStats
    itl: WindowStats
    prefill_tokens_per_s: float  # measured, 0 when nothing was yet
    decode_step_s: float
    kv_bytes_per_s: float
    draining: bool
    prefill_scale: float = 0.0  # measured over the profile's durations, of steps that prefill; 0: no profile
    decode_scale: float = 0.0  # of steps that only decode
    parallel_degree: int = 1
    profile: str = ""  # name of the timing profile that the worker runs or was measured with; empty: none
    node: str = ""  # workers of one node exchange KV over its fast links
    num_resident_tokens: int = 0  # KV kept for sessions bound elsewhere
    kv_held: tuple[KvHeld, ...] = ()  # sessions, bound here or kept, that no longer have what was told of them last
    num_evictable_blocks: int = 0  # not free, but held by KV kept for sessions bound elsewhere: it goes when need be
    num_host_tokens: int = 0  # KV in host memory


class WorkerLeaving(Message, frozen=True, kw_only=True, tag="worker_leaving"):
    """The worker is stopping: its sessions must be bound elsewhere."""

    worker_id: str
    incarnation: int


CoordinatorEvent = RoundEnded | PrefillEnded | KvStaged | WorkerLeaving

# ------------------------------------------------------------------------------- worker -> worker


class KvOffer(Message, frozen=True, kw_only=True, tag="kv_offer"):
    """Prefill worker -> decode worker, as the prefill starts: pull the increment, layer by layer, as it is computed."""

    tenant: str
    session: str
    round: int
    attempt: int
    num_tokens_start: int
    num_tokens_stop: int
    source: KvSource  # its ticket is empty: the decode worker has it from RunRound


class PrefillDone(Message, frozen=True, kw_only=True, tag="prefill_done"):
    """Prefill worker -> decode worker: the first output token and what the prefill cost."""

    tenant: str
    session: str
    round: int
    attempt: int
    first_token_id: int
    queued_s: float
    transfer_s: float
    prefill_s: float
    kv_bytes_read: int


class KvRenew(Message, frozen=True, kw_only=True, tag="kv_renew"):
    """Keep a lease alive for another ttl. Answered by Ack, or ErrorReply KV_LEASE_INVALID."""

    lease_id: int
    generation: int


PeerMessage = KvOffer | PrefillDone | KvRenew

# ------------------------------------------------------------------------------------------ admin


class GetStatus(Message, frozen=True, kw_only=True, tag="get_status"):
    pass


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    alive: bool
    last_seen_s: float
    heartbeat: Heartbeat


class SessionStatus(msgspec.Struct, frozen=True, kw_only=True):
    tenant: str
    session: str
    state: str
    decode_worker: str | None
    num_rounds: int
    num_tokens: int
    idle_s: float


class ClusterStatus(Message, frozen=True, kw_only=True, tag="cluster_status"):
    policy: str
    model: str
    workers: tuple[WorkerStatus, ...]
    sessions: tuple[SessionStatus, ...]  # the newest 200
    num_sessions: int
    num_rounds_in_flight: int
    counters: dict[str, int]


class ExplainSession(Message, frozen=True, kw_only=True, tag="explain_session"):
    """Why each of a session's newest rounds was prefilled where it was. For operators, on the admin subject."""

    tenant: str
    session: str


class OptionExplained(msgspec.Struct, frozen=True, kw_only=True):
    """One option of a routing decision as it was predicted, in seconds (see shared/core/routing.py)."""

    placement: Literal["local", "remote"]
    worker_id: str
    num_new_tokens: int
    num_moved_tokens: int
    windowed_s: float
    queue_s: float
    transfer_s: float
    prefill_s: float
    on_time: float
    disturbed: float


class RoundExplained(msgspec.Struct, frozen=True, kw_only=True):
    """A routing decision, predicted against measured (None: not known, or not ended)."""

    round: int
    attempt: int
    placement: Literal["local", "remote"]
    worker_id: str
    reason: str
    options: tuple[OptionExplained, ...]
    chosen_index: int
    slo: Slo
    ttft_s: float | None = None
    tpot_s: float | None = None
    usage: Usage | None = None

    @property
    def moves_session(self) -> bool:
        """The session moves, with its KV, to the worker that the prefill runs on: no other local prefill moves KV."""
        if self.usage is not None and self.usage.moved_from:
            return True
        if self.placement == "remote" or self.chosen_index < 0:
            return False
        return self.options[self.chosen_index].num_moved_tokens > 0


class SessionExplained(Message, frozen=True, kw_only=True, tag="session_explained"):
    session: str
    policy: str
    rounds: tuple[RoundExplained, ...]  # the newest 64


class RoundObserved(Message, frozen=True, kw_only=True, tag="round_observed"):
    """Coordinator -> planner, one per ended round. delay_s: idle time before it, None for the first round."""

    tenant: str
    session: str
    round: int
    delay_s: float | None
    ttft_s: float | None
    tpot_s: float | None
    slo: Slo
    usage: Usage | None
    error: ErrorCode | None


class GetStats(Message, frozen=True, kw_only=True, tag="get_stats"):
    pass


class PlannerStats(Message, frozen=True, kw_only=True, tag="planner_stats"):
    """What the planner has collected since it started."""

    uptime_s: float
    num_rounds: int
    num_failed: int
    num_attained: int
    num_local: int
    num_remote: int
    kv_bytes_moved: int
    rounds_per_s: float
    input_tokens: WindowStats
    output_tokens: WindowStats
    delay_s: WindowStats
    ttft_s: WindowStats
    tpot_s: WindowStats
    workers: tuple[Heartbeat, ...]


AnyMessage = (
    OpenSession | SubmitRound | CancelRound | CloseSession | InspectSession | ReadRound
    | SessionOpened | RoundAccepted | RoundCancelled | SessionClosed | SessionInfo | RoundSnapshot | ErrorReply
    | RoundTokens | RoundFinished | RoundFailed
    | RunRound | RunRoundAck | NeedTokens | PrefillTask | CancelRun | DropSession | Ack
    | GrantHistory | HistoryGranted | StageKv
    | RoundEnded | PrefillEnded | KvStaged | Heartbeat | WorkerLeaving
    | KvOffer | PrefillDone | KvRenew
    | GetStatus | ClusterStatus | ExplainSession | SessionExplained | RoundObserved | GetStats | PlannerStats
)  # fmt: skip

# ------------------------------------------------------------------------------------------ codec

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(AnyMessage)
_JSON_ENCODER = msgspec.json.Encoder()
_JSON_DECODER = msgspec.json.Decoder(AnyMessage)
_MAX_REASON_CHARS = 400


def encode(message: Message, encoding: Encoding = "msgpack") -> bytes:
    return _ENCODER.encode(message) if encoding == "msgpack" else _JSON_ENCODER.encode(message)


def encoding_of(data: bytes) -> Encoding:
    """JSON starts with `{` or white space; a MessagePack map of up to 15 or 65,535 fields never does."""
    return "json" if data[:1] in (b"{", b" ", b"\n", b"\t", b"\r") else "msgpack"


def decode(data: bytes, *, max_bytes: int | None = None) -> Message:
    """Decode and validate. Raises AmpdError MALFORMED_MESSAGE that names the offending field.

    What is decoded takes at most about 12 times the memory of `data` (a list of one-byte integers); a receiver of
    strangers' messages bounds it by max_bytes. NaN and infinity are accepted: whoever uses a float checks its range.
    """
    if max_bytes is not None and len(data) > max_bytes:
        raise AmpdError(
            ErrorCode.MALFORMED_MESSAGE,
            f"the message of {len(data):,} bytes exceeds the limit of {max_bytes:,} bytes: send less",
        )
    try:
        if encoding_of(data) == "json":
            message = _JSON_DECODER.decode(data)
            _ENCODER.encode(message)  # an integer of more than 64 bits is valid JSON, but cannot travel on
        else:
            message = _DECODER.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OverflowError) as error:
        # what the sender wrote is part of some of the texts, whatever its length
        raise AmpdError(
            ErrorCode.MALFORMED_MESSAGE, f"cannot decode the message: {str(error)[:_MAX_REASON_CHARS]}"
        ) from error
    assert isinstance(message, Message)
    return message


def error_reply(error: AmpdError) -> ErrorReply:
    return ErrorReply(code=error.code, message=error.message, retry_after_s=error.retry_after_s)


def raise_if_error(message: Message) -> Message:
    """Turn an ErrorReply back into the AmpdError it carries."""
    if isinstance(message, ErrorReply):
        raise AmpdError(message.code, message.message, retry_after_s=message.retry_after_s)
    return message


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian int32 bytes. Raises OverflowError for ids outside int32."""
    packed = array("i", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_token_ids(token_ids: TokenIds) -> list[int]:
    """The inverse of pack_token_ids; a list (from JSON) is returned as it is."""
    if isinstance(token_ids, list):
        return token_ids
    if len(token_ids) % 4:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"token_ids must be little-endian int32 bytes: {len(token_ids)} bytes is not a multiple of 4",
        )
    unpacked = array("i", token_ids)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked.tolist()
