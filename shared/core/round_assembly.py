"""Puts the stream of one round in order, exactly once, whatever the bus lost, repeated or reordered.

Invariants: `token_ids` only grows, and is at every moment a prefix of the round's output; output index i is taken
once, from whichever message brings it first (attempts agree on every token, see docs/architecture.md); messages of
an attempt older than the newest seen are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.errors import AmpdError, ErrorCode
from shared.messages import (
    RoundFailed,
    RoundFinished,
    RoundSnapshot,
    RoundTokens,
    StreamMessage,
    unpack_token_ids,
)

MAX_HELD_MESSAGES = 256  # messages that came before their predecessors; more are dropped and read again


class RoundAssembly:
    """The output of one round as far as it is known, with the time of arrival of every token.

    `max_output_tokens` bounds everything kept here. Times are the caller's monotonic seconds.
    """

    def __init__(self, max_output_tokens: int) -> None:
        self.token_ids: list[int] = []
        self.token_times: list[float] = []
        self.text = ""
        self.attempt = 0
        self.finished: RoundFinished | None = None
        self.failed: RoundFailed | None = None
        self._max_output_tokens = max_output_tokens
        self._text_is_whole = True  # False once text may have been lost or repeated
        self._next_seq = 0
        self._end_seq = 0  # seq of `finished`: as many messages of the attempt came before it
        self._held: list[RoundTokens] = []

    @property
    def is_complete(self) -> bool:
        """The round has ended and every token of it is here (a failed round owes no more tokens)."""
        if self.failed is not None:
            return True
        return self.finished is not None and len(self.token_ids) == self.finished.num_output_tokens

    @property
    def has_gap(self) -> bool:
        """Tokens are known to exist that did not arrive: time to send ReadRound."""
        return not self.is_complete and (bool(self._held) or self.finished is not None)

    @property
    def text_is_exact(self) -> bool:
        """False: only a snapshot from index 0 (`set_exact_text`) has the text of these tokens."""
        return self._text_is_whole and self._next_seq >= self._end_seq

    def add(self, message: StreamMessage, now: float) -> None:
        """Take one message of the round's stream. Raises AmpdError INTERNAL for output that cannot be."""
        if message.attempt < self.attempt or self.is_complete:
            return
        if message.attempt > self.attempt:
            self._begin_attempt(message.attempt)
        match message:
            case RoundTokens():
                self._add_tokens(message, now)
            case RoundFinished():
                self._check_length(message.num_output_tokens)
                self.finished = message
                self._end_seq = message.seq
            case RoundFailed():
                self.failed = message

    def add_snapshot(self, snapshot: RoundSnapshot, now: float) -> None:
        """Take the answer to a ReadRound: the same tokens by another way."""
        if self.is_complete:
            return
        new_ids = self._new_part(snapshot.start_index, unpack_token_ids(snapshot.token_ids))
        ended = snapshot.finished is not None or snapshot.failed is not None
        if new_ids or ended:
            self._text_is_whole = False
        text = snapshot.text if snapshot.start_index == len(self.token_ids) else ""
        self._append(new_ids, text, now)
        if snapshot.finished is not None:
            self._check_length(snapshot.finished.num_output_tokens)
            self.finished = snapshot.finished
        self.failed = snapshot.failed
        self._take_held(now)

    def set_exact_text(self, text: str) -> None:
        """The text of the whole output, from a snapshot that starts at index 0."""
        self.text = text
        self._text_is_whole = True
        self._end_seq = 0

    def _begin_attempt(self, attempt: int) -> None:
        """A newer attempt counts its messages anew; what it has not repeated yet stays missing until it does."""
        if self.attempt and (self.token_ids or self._held):
            self._text_is_whole = False  # its detokeniser may have held back other characters than the old one's
        self.attempt = attempt
        self.finished = None
        self._next_seq = self._end_seq = 0
        self._held.clear()

    def _add_tokens(self, message: RoundTokens, now: float) -> None:
        if message.seq < self._next_seq:
            return
        if message.start_index > len(self.token_ids):
            if len(self._held) < MAX_HELD_MESSAGES and all(held.seq != message.seq for held in self._held):
                self._held.append(message)
            return
        self._take(message, now)
        self._take_held(now)

    def _take_held(self, now: float) -> None:
        self._held.sort(key=lambda held: held.seq)
        while self._held and self._held[0].start_index <= len(self.token_ids):
            self._take(self._held.pop(0), now)

    def _take(self, message: RoundTokens, now: float) -> None:
        token_ids = unpack_token_ids(message.token_ids)
        new_ids = self._new_part(message.start_index, token_ids)
        is_whole = len(new_ids) == len(token_ids) and message.start_index == len(self.token_ids)
        if not is_whole or message.seq != self._next_seq:
            self._text_is_whole = False
        self._next_seq = max(self._next_seq, message.seq + 1)
        self._append(new_ids, message.text if is_whole else "", now)

    def _new_part(self, start_index: int, token_ids: Sequence[int]) -> Sequence[int]:
        """What of output tokens [start_index, ...) is not here yet; nothing if it begins beyond what is here."""
        known = len(self.token_ids) - start_index
        return token_ids[known:] if known >= 0 else ()

    def _append(self, token_ids: Sequence[int], text: str, now: float) -> None:
        self._check_length(len(self.token_ids) + len(token_ids))
        self.token_ids.extend(token_ids)
        self.token_times.extend([now] * len(token_ids))
        self.text += text

    def _check_length(self, num_output_tokens: int) -> None:
        if num_output_tokens > self._max_output_tokens:
            raise AmpdError(
                ErrorCode.INTERNAL,
                f"the round produced {num_output_tokens} tokens, more than its max_output_tokens "
                f"{self._max_output_tokens}: client and service disagree; are they the same version?",
            )
