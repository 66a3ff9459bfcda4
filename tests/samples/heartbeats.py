"""A worker's heartbeat, for every test that needs one."""

from __future__ import annotations

from typing import Any

import msgspec

from shared.messages import Heartbeat, WindowStats

_IDLE = Heartbeat(
    worker_id="decode-0",
    incarnation=1,
    role="decode",
    seq=0,
    model="m",
    max_context_tokens=1000,
    vocab_size=100,
    layout_hash="l",
    kv_endpoints=(),
    num_blocks=100,
    num_free_blocks=100,
    block_size=16,
    kv_bytes_per_token=64,
    num_sessions=0,
    num_running=0,
    num_waiting=0,
    num_leases=0,
    queue=(),
    queue_num_tokens=0,
    ttft=WindowStats(),
    itl=WindowStats(),
    prefill_tokens_per_s=0.0,
    decode_step_s=0.0,
    kv_bytes_per_s=0.0,
    draining=False,
)


def make_heartbeat(worker_id: str = "decode-0", **fields: Any) -> Heartbeat:
    """Of an idle decode worker that has just started, but for `fields`."""
    return msgspec.structs.replace(_IDLE, worker_id=worker_id, **fields)
