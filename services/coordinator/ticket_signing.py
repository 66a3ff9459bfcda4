"""Fill in the signed tickets of a command: the core decides who may pull what, the service holds the secret."""

from __future__ import annotations

import secrets

import msgspec

from shared.core.resident_key import resident_key
from shared.core.types import RoundKey, SessionKey
from shared.messages import PrefillTask, RunRound, StageKv, WorkerCommand
from shared.transport.tickets import TicketClaims, mint

NONCE_BYTES = 16
MIN_TTL_S = 0.1
STAGING_TTL_S = 60.0


def sign_tickets(secret: bytes, worker_id: str, command: WorkerCommand, kv_bytes_per_token: int) -> WorkerCommand:
    """`command`, about to be sent to `worker_id`, with a fresh ticket for every pull it asks for.

    run_round: the decode worker may pull the increment from the prefill worker, or the history from the worker that the
    session comes from. prefill_task: the prefill worker may pull the history from the decode worker. At most the whole
    conversation's bytes, until the round's deadline.
    stage_kv: the prefill worker may pull finished rounds from the decode worker, for a minute.
    """
    match command:
        case RunRound(remote=remote) if remote is not None:
            num_tokens = command.num_history_tokens + command.num_input_tokens + command.num_forced_tokens
            ticket = _mint(
                secret,
                _round_key(command),
                ttl_s=command.deadline_s,
                source=(remote.worker_id, remote.incarnation),
                destination=(worker_id, command.incarnation),
                max_bytes=num_tokens * kv_bytes_per_token,
            )
            return msgspec.structs.replace(command, remote=msgspec.structs.replace(remote, ticket=ticket))
        case RunRound(source=source) if source is not None:
            ticket = _mint(
                secret,
                resident_key(SessionKey(command.tenant, command.session)),
                ttl_s=command.deadline_s,
                source=(source.worker_id, source.incarnation),
                destination=(worker_id, command.incarnation),
                max_bytes=command.num_source_tokens * kv_bytes_per_token,
            )
            return msgspec.structs.replace(command, source=msgspec.structs.replace(source, ticket=ticket))
        case PrefillTask(history=history) if history is not None:
            ticket = _mint(
                secret,
                _round_key(command),
                ttl_s=command.deadline_s,
                source=(history.worker_id, history.incarnation),
                destination=(worker_id, command.incarnation),
                max_bytes=command.num_cached_tokens * kv_bytes_per_token,
            )
            return msgspec.structs.replace(command, history=msgspec.structs.replace(history, ticket=ticket))
        case StageKv(history=history):
            ticket = _mint(
                secret,
                resident_key(SessionKey(command.tenant, command.session)),
                ttl_s=STAGING_TTL_S,
                source=(history.worker_id, history.incarnation),
                destination=(worker_id, command.incarnation),
                max_bytes=command.num_tokens * kv_bytes_per_token,
            )
            return msgspec.structs.replace(command, history=msgspec.structs.replace(history, ticket=ticket))
    return command


def _round_key(command: RunRound | PrefillTask) -> RoundKey:
    return RoundKey(command.tenant, command.session, command.round, command.attempt)


def _mint(
    secret: bytes,
    key: RoundKey,
    *,
    ttl_s: float,
    source: tuple[str, int],
    destination: tuple[str, int],
    max_bytes: int,
) -> bytes:
    claims = TicketClaims(
        key=key,
        source=source[0],
        source_incarnation=source[1],
        destination=destination[0],
        destination_incarnation=destination[1],
        max_bytes=max_bytes,
        ttl_s=max(MIN_TTL_S, ttl_s),
        nonce=secrets.token_bytes(NONCE_BYTES),
    )
    return mint(secret, claims)
