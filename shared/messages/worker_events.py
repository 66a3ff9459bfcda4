"""Worker -> coordinator; of heartbeats the planner hears, too."""

from __future__ import annotations

import msgspec

from shared.messages.base import ErrorReply, FinishReason, Message, Role, Usage, WindowStats


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


class StepTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Of all steps since the worker began: the seconds that they took, and those that its profile gives them."""

    prefill_s: float = 0.0  # of steps that prefill
    prefill_profile_s: float = 0.0
    decode_s: float = 0.0  # of those that only decode
    decode_profile_s: float = 0.0


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
    step_times: StepTimes = StepTimes()  # zeros without a profile
    parallel_degree: int = 1
    profile: str = ""  # name of the timing profile that the worker runs or was measured with; empty: none
    node: str = ""  # workers of one node exchange KV over its fast links
    num_resident_tokens: int = 0  # KV kept for sessions bound elsewhere
    kv_held: tuple[KvHeld, ...] = ()  # sessions, bound here or kept, that no longer have what was told of them last
    num_evictable_blocks: int = 0  # not free, but held by KV kept for sessions bound elsewhere: it goes when need be
    num_host_tokens: int = 0  # KV in host memory
    kv_pulled: dict[str, int] = {}  # bytes of KV that came from other workers, by the way they took


class WorkerLeaving(Message, frozen=True, kw_only=True, tag="worker_leaving"):
    """The worker is stopping: its sessions must be bound elsewhere."""

    worker_id: str
    incarnation: int


CoordinatorEvent = RoundEnded | PrefillEnded | KvStaged | WorkerLeaving
