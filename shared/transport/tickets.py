"""Tickets: the coordinator's signed permission for one worker to pull one round's KV from another, once.

A ticket is HMAC-SHA256(secret, claims) followed by the claims in MessagePack. It names no wall-clock time: its ttl
counts from the moment the source granted the lease of the same round, so only the source's monotonic clock matters.
"""

from __future__ import annotations

import heapq
import hmac
import math
import threading

import msgspec

from shared.core.types import RoundKey
from shared.errors import AmpdError, ErrorCode

MAX_TICKET_BYTES = 2048
MIN_SECRET_BYTES = 16
MIN_NONCE_BYTES, MAX_NONCE_BYTES = 16, 64
_MAC_BYTES = 32


class TicketClaims(msgspec.Struct, frozen=True, kw_only=True):
    """`destination` may pull at most `max_bytes` of KV of `key` from `source`, each in its named incarnation."""

    key: RoundKey
    source: str
    source_incarnation: int
    destination: str
    destination_incarnation: int
    max_bytes: int
    ttl_s: float
    nonce: bytes


def check_secret(secret: bytes) -> None:
    if len(secret) < MIN_SECRET_BYTES:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST, f"the ticket secret has {len(secret)} bytes: use at least {MIN_SECRET_BYTES}"
        )


def mint(secret: bytes, claims: TicketClaims) -> bytes:
    """Sign the claims; `claims.nonce` must be fresh random bytes. Raises AmpdError INVALID_REQUEST."""
    check_secret(secret)
    _check_claims(claims)
    body = msgspec.msgpack.encode(claims)
    if len(body) + _MAC_BYTES > MAX_TICKET_BYTES:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST, f"a ticket of {len(body)} bytes: use shorter tenant and session names"
        )
    return hmac.digest(secret, body, "sha256") + body


def verify(secret: bytes, ticket: bytes) -> TicketClaims:
    """The claims of a ticket that this secret signed. Raises AmpdError KV_TICKET_INVALID; compares in constant time
    and decodes nothing before the signature holds."""
    mac, body = ticket[:_MAC_BYTES], ticket[_MAC_BYTES:]
    if len(ticket) > MAX_TICKET_BYTES or not hmac.compare_digest(mac, hmac.digest(secret, body, "sha256")):
        raise AmpdError(ErrorCode.KV_TICKET_INVALID, "the ticket was not signed by this cluster's coordinator")
    try:
        claims = msgspec.msgpack.decode(body, type=TicketClaims)
        _check_claims(claims)
    except (msgspec.DecodeError, UnicodeDecodeError, AmpdError) as error:  # signed by another version
        raise AmpdError(ErrorCode.KV_TICKET_INVALID, f"the ticket's claims are not understood: {error}") from error
    return claims


def _check_claims(claims: TicketClaims) -> None:
    if not MIN_NONCE_BYTES <= len(claims.nonce) <= MAX_NONCE_BYTES:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"a nonce needs {MIN_NONCE_BYTES} to {MAX_NONCE_BYTES} bytes, not {len(claims.nonce)}",
        )
    if not (math.isfinite(claims.ttl_s) and claims.ttl_s > 0 and claims.max_bytes >= 0):
        raise AmpdError(ErrorCode.INVALID_REQUEST, "a ticket needs a positive, finite ttl_s and max_bytes >= 0")


class UsedNonces:
    """Nonces of tickets already used here, each remembered for as long as its ticket could still be good.

    A ticket is good until ttl_s after its lease was granted, and a lease is granted before its ticket is used: ttl_s
    after the use it is dead. Bounded by refusing new tickets when full, never by forgetting a live nonce.
    """

    def __init__(self, *, capacity: int = 65536) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._nonces: set[bytes] = set()
        self._by_expiry: list[tuple[float, bytes]] = []

    def use(self, claims: TicketClaims, now: float) -> None:
        """Raises AmpdError KV_TICKET_INVALID if it was used before, OVERLOADED if no more can be remembered."""
        with self._lock:
            while self._by_expiry and self._by_expiry[0][0] < now:
                self._nonces.remove(heapq.heappop(self._by_expiry)[1])
            if claims.nonce in self._nonces:
                raise AmpdError(ErrorCode.KV_TICKET_INVALID, "the ticket has been used before")
            if len(self._nonces) >= self._capacity:
                wait_s = max(0.0, self._by_expiry[0][0] - now)
                raise AmpdError(
                    ErrorCode.OVERLOADED,
                    f"{self._capacity} tickets are in use at {claims.source}",
                    retry_after_s=wait_s,
                )
            self._nonces.add(claims.nonce)
            heapq.heappush(self._by_expiry, (now + claims.ttl_s, claims.nonce))

    def __len__(self) -> int:
        with self._lock:
            return len(self._nonces)
