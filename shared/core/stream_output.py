"""The output of the round in flight as seen on its stream, decoded only when somebody asks.

Most rounds never need it: their whole output comes with round_ended. It is needed when a worker dies (the tokens the
client has seen become the next attempt's forced prefix), when a client fills a gap, and when a round fails.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.core.token_bytes import TOKEN_BYTES, as_token_bytes, count_tokens, slice_tokens
from shared.core.types import SessionKey
from shared.errors import AmpdError
from shared.messages import RoundFinished, RoundTokens, decode

MAX_PENDING_PAYLOADS = 256  # more are decoded at once: memory stays near that of the tokens


def may_end_round(payload: bytes) -> bool:
    """False only for a payload that certainly is RoundTokens, by its tag (the first field that is encoded)."""
    return b"tokens" not in payload[:24]


class StreamOutput:
    """Invariant: `token_ids` is a prefix of the round's output, the same in every attempt; it only grows."""

    __slots__ = ("_attempt", "_key", "_last_seq", "_max_output_tokens", "_pending", "_round", "_token_ids", "finished")

    def __init__(self, key: SessionKey, round_index: int, attempt: int, max_output_tokens: int) -> None:
        self._key = key
        self._round = round_index
        self._attempt = attempt
        self._max_output_tokens = max_output_tokens
        self._token_ids = bytearray()
        self._pending: list[bytes] = []
        self._last_seq = -1
        self.finished: RoundFinished | None = None  # of this attempt

    def begin_attempt(self, attempt: int, forced: bytes) -> None:
        """From here on only messages of `attempt` count. Decode what is pending before."""
        self._pending.clear()
        self._attempt = attempt
        self._last_seq = -1
        self.finished = None
        self.adopt(forced)

    def add(self, payloads: Sequence[bytes]) -> None:
        self._pending.extend(payloads)
        if len(self._pending) > MAX_PENDING_PAYLOADS:
            self._absorb()

    def adopt(self, token_ids: bytes) -> None:
        """A whole prefix of the output, from a worker's answer or report."""
        if len(token_ids) > len(self._token_ids):
            self._token_ids[:] = token_ids

    @property
    def token_ids(self) -> bytes:
        self._absorb()
        return bytes(self._token_ids)

    @property
    def num_tokens(self) -> int:
        self._absorb()
        return count_tokens(self._token_ids)

    @property
    def next_seq(self) -> int:
        """One more than the last sequence number of this attempt; 0: nothing of it was seen."""
        self._absorb()
        return self._last_seq + 1

    @property
    def is_complete(self) -> bool:
        """`finished` was seen and no token before it is missing."""
        self._absorb()
        if self.finished is None or not self._token_ids:
            return False
        return self.finished.num_output_tokens == count_tokens(self._token_ids)

    def _absorb(self) -> None:
        pending, self._pending = self._pending, []
        for payload in pending:
            try:
                message = decode(payload)
            except AmpdError:
                continue  # not one of ours: the subject is the tenant's
            if not isinstance(message, RoundTokens | RoundFinished):
                continue
            if (message.session, message.round, message.attempt) != (
                self._key.session,
                self._round,
                self._attempt,
            ):
                continue
            self._last_seq = max(self._last_seq, message.seq)
            if isinstance(message, RoundFinished):
                self.finished = message
            else:
                self._add_tokens(message)

    def _add_tokens(self, message: RoundTokens) -> None:
        """Take what continues the prefix; behind a gap nothing is taken: the client asks for it by read_round."""
        try:
            token_ids = as_token_bytes(message.token_ids)
        except AmpdError:
            return
        num_tokens = count_tokens(self._token_ids)
        overlap = num_tokens - message.start_index
        if len(token_ids) % TOKEN_BYTES == 0 and 0 <= overlap < count_tokens(token_ids):
            self._token_ids += slice_tokens(token_ids, overlap, overlap + self._max_output_tokens - num_tokens)
