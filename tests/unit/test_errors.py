"""Errors travel between processes."""

from __future__ import annotations

import copy

import pytest

from shared.errors import AmpdError, ErrorCode, KvTransferError, RequestTimeout


@pytest.mark.parametrize(
    "error",
    [
        AmpdError(ErrorCode.OVERLOADED, "come back later", retry_after_s=2.5),
        KvTransferError(ErrorCode.KV_TRANSFER_FAILED, "cut"),
        RequestTimeout("ampd.v1", 0.5),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_can_be_made_again_from_what_a_pickle_carries(error: AmpdError) -> None:
    back = copy.copy(error)  # by what a pickle would carry
    assert type(back) is type(error)
    assert (str(back), back.code, back.message, back.retry_after_s) == (
        str(error),
        error.code,
        error.message,
        error.retry_after_s,
    )
