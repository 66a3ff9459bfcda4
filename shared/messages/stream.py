"""A round's stream: decode worker (of RoundFailed the coordinator) -> client and coordinator."""

from __future__ import annotations

from shared.messages.base import ErrorReply, FinishReason, Message, TokenIds, Usage


class RoundTokens(Message, frozen=True, kw_only=True, tag="tokens"):
    """Output tokens [start_index, start_index + n) of a round. `seq` counts the messages of one attempt from 0."""

    session: str
    round: int
    attempt: int
    seq: int
    start_index: int
    token_ids: TokenIds
    text: str = ""


class RoundFinished(Message, frozen=True, kw_only=True, tag="finished"):
    """The last message of a round that succeeded. num_output_tokens tells whether any token was missed."""

    session: str
    round: int
    attempt: int
    seq: int
    num_output_tokens: int
    finish_reason: FinishReason
    usage: Usage


class RoundFailed(Message, frozen=True, kw_only=True, tag="failed"):
    """The last message of a round that did not; published by the coordinator."""

    session: str
    round: int
    attempt: int
    seq: int
    num_output_tokens: int
    error: ErrorReply


StreamMessage = RoundTokens | RoundFinished | RoundFailed
