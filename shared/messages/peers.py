"""Worker -> worker: the KV of a prefill changes hands."""

from __future__ import annotations

from shared.messages.base import Message
from shared.messages.worker_commands import KvSource


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
