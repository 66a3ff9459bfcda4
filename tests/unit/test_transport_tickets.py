"""Tickets say who may pull what; only the coordinator's secret makes one, and one is used once."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core.types import RoundKey
from shared.errors import AmpdError, ErrorCode
from shared.transport.tickets import MAX_TICKET_BYTES, TicketClaims, UsedNonces, mint, verify

SECRET = b"0123456789abcdef"


def claims(**fields: object) -> TicketClaims:
    plain = TicketClaims(
        key=RoundKey("tenant", "session", 3, 1),
        source="p",
        source_incarnation=2**63 + 1,
        destination="d",
        destination_incarnation=9,
        max_bytes=1 << 40,
        ttl_s=5.0,
        nonce=b"n" * 16,
    )
    return msgspec.structs.replace(plain, **fields)


def test_a_minted_ticket_verifies() -> None:
    assert verify(SECRET, mint(SECRET, claims())) == claims()


@given(st.data())
def test_no_changed_bit_verifies(data: st.DataObject) -> None:
    ticket = bytearray(mint(SECRET, claims()))
    at = data.draw(st.integers(0, len(ticket) * 8 - 1))
    ticket[at // 8] ^= 1 << at % 8
    with pytest.raises(AmpdError) as caught:
        verify(SECRET, bytes(ticket))
    assert caught.value.code is ErrorCode.KV_TICKET_INVALID


@given(st.binary(max_size=3000))
def test_no_other_bytes_verify(data: bytes) -> None:
    with pytest.raises(AmpdError) as caught:
        verify(SECRET, data)
    assert caught.value.code is ErrorCode.KV_TICKET_INVALID


def test_another_secret_does_not_verify() -> None:
    with pytest.raises(AmpdError, match="not signed"):
        verify(b"fedcba9876543210", mint(SECRET, claims()))


@pytest.mark.parametrize(
    "fields",
    [
        {"nonce": b"short"},
        {"nonce": b"n" * 65},
        {"ttl_s": 0.0},
        {"ttl_s": float("inf")},
        {"ttl_s": float("nan")},
        {"max_bytes": -1},
        {"key": RoundKey("t" * MAX_TICKET_BYTES, "s", 0, 1)},
    ],
)
def test_claims_that_no_ticket_may_have(fields: dict[str, object]) -> None:
    with pytest.raises(AmpdError) as caught:
        mint(SECRET, claims(**fields))
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(AmpdError, match="at least 16"):
        mint(b"short", claims())


def test_a_nonce_is_used_once_while_its_ticket_lives() -> None:
    nonces = UsedNonces()
    nonces.use(claims(), now=10.0)
    for now in (10.0, 12.0, 15.0):
        with pytest.raises(AmpdError, match="used before"):
            nonces.use(claims(), now=now)
    nonces.use(claims(nonce=b"m" * 16), now=16.0)
    assert len(nonces) == 1  # the first ticket is dead: its nonce need not be known any more


def test_a_full_memory_refuses_and_forgets_nothing() -> None:
    nonces = UsedNonces(capacity=2)
    nonces.use(claims(nonce=b"1" * 16, ttl_s=5.0), now=0.0)
    nonces.use(claims(nonce=b"2" * 16, ttl_s=50.0), now=0.0)
    with pytest.raises(AmpdError) as caught:
        nonces.use(claims(nonce=b"3" * 16), now=1.0)
    assert caught.value.code is ErrorCode.OVERLOADED
    assert caught.value.retry_after_s == 4.0
    with pytest.raises(AmpdError, match="used before"):
        nonces.use(claims(nonce=b"1" * 16), now=1.0)
    nonces.use(claims(nonce=b"3" * 16), now=6.0)
    with pytest.raises(AmpdError, match="used before"):
        nonces.use(claims(nonce=b"2" * 16), now=6.0)
