"""Operating errors: each has a stable code, a message that says what to change, and crosses the bus as `ErrorReply`.

Programming errors are ordinary exceptions and crash the process that has them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any


class ErrorCode(StrEnum):
    """Every way a request or command can be refused. The value is what appears on the wire."""

    # the caller's input
    MALFORMED_MESSAGE = "malformed_message"
    INVALID_REQUEST = "invalid_request"
    EMPTY_INPUT = "empty_input"
    CONTEXT_TOO_LONG = "context_too_long"
    UNKNOWN_SESSION = "unknown_session"
    UNKNOWN_ROUND = "unknown_round"
    SESSION_EXISTS = "session_exists"
    SESSION_CLOSED = "session_closed"
    ROUND_IN_FLIGHT = "round_in_flight"
    IDEMPOTENCY_CONFLICT = "idempotency_conflict"
    TEXT_UNAVAILABLE = "text_unavailable"
    # capacity and time
    OVERLOADED = "overloaded"
    NO_DECODE_WORKER = "no_decode_worker"
    NO_CAPACITY = "no_capacity"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    CLIENT_GONE = "client_gone"
    DRAINING = "draining"
    # inside the cluster
    WORKER_LOST = "worker_lost"
    WRONG_INCARNATION = "wrong_incarnation"
    STALE_ATTEMPT = "stale_attempt"
    OUT_OF_BLOCKS = "out_of_blocks"
    KV_TRANSFER_FAILED = "kv_transfer_failed"
    KV_LEASE_INVALID = "kv_lease_invalid"
    KV_TICKET_INVALID = "kv_ticket_invalid"
    KV_LAYOUT_MISMATCH = "kv_layout_mismatch"
    BUS_UNAVAILABLE = "bus_unavailable"
    NOT_OWNER = "not_owner"
    ROLE_CHANGING = "role_changing"
    INTERNAL = "internal"


class AmpdError(Exception):
    """An operating error with a code. `retry_after_s` is a hint, in seconds, that trying again may work."""

    def __init__(self, code: ErrorCode, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(f"{code.value}: {message}")
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        """An exception is pickled as its class called with `args`, which a pool of processes cannot do with ours."""
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[AmpdError], args: tuple[Any, ...], state: dict[str, Any]) -> AmpdError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class BusError(AmpdError):
    """The bus could not deliver: no responder, a time-out, or the connection is closed."""


class NoResponders(BusError):
    """Nobody subscribes to the subject: the addressee is gone."""

    def __init__(self, subject: str) -> None:
        super().__init__(ErrorCode.BUS_UNAVAILABLE, f"nobody answers on {subject}: is that service running?")


class RequestTimeout(BusError):
    """The request was sent; no reply came within the time allowed. It may still have been carried out."""

    def __init__(self, subject: str, timeout_s: float) -> None:
        super().__init__(ErrorCode.BUS_UNAVAILABLE, f"no reply on {subject} within {timeout_s:.3g} s")


class KvTransferError(AmpdError):
    """A KV transfer did not complete; the bytes received must not be used."""
