"""Client -> coordinator, and the answers."""

from __future__ import annotations

from typing import Literal

import msgspec

from shared.messages.base import Encoding, Message, SamplingParams, Slo, StopConditions, TokenIds, Usage
from shared.messages.stream import RoundFailed, RoundFinished


class TokensInput(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    token_ids: TokenIds


class TextInput(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """Text, tokenised as it is: no chat template is applied."""

    text: str


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: str
    content: str


class ChatInput(msgspec.Struct, frozen=True, kw_only=True, tag="chat"):
    """The *new* messages of this round (a tool's result, the user's next turn), put through the model's template."""

    messages: tuple[ChatMessage, ...]


RoundInput = TokensInput | TextInput | ChatInput


class OpenSession(Message, frozen=True, kw_only=True, tag="open"):
    """Open the session named in the subject. Opening an open session with equal options is a success."""

    slo: Slo = Slo()
    idle_timeout_s: float = 600.0


class SubmitRound(Message, frozen=True, kw_only=True, tag="round"):
    """One round. The same idempotency_key again returns the first answer and starts nothing."""

    input: RoundInput
    idempotency_key: str = ""  # empty: no protection against a repeat
    sampling: SamplingParams = SamplingParams()
    stop: StopConditions = StopConditions()
    slo: Slo | None = None  # None: the session's
    deadline_s: float = 600.0
    stream_encoding: Encoding | None = None  # None: as the request was encoded


class CancelRound(Message, frozen=True, kw_only=True, tag="cancel"):
    """Cancel the round in flight (`round` None or its index). A round that has ended is left as it is."""

    round: int | None = None


class CloseSession(Message, frozen=True, kw_only=True, tag="close"):
    """Close the session; a round in flight is cancelled; every block is given back."""


class InspectSession(Message, frozen=True, kw_only=True, tag="inspect"):
    include_tokens: bool = False


class ReadRound(Message, frozen=True, kw_only=True, tag="read_round"):
    """The output of a round from output index `start_index`: how a client fills a gap in its stream."""

    round: int
    start_index: int = 0


ClientRequest = OpenSession | SubmitRound | CancelRound | CloseSession | InspectSession | ReadRound


class SessionOpened(Message, frozen=True, kw_only=True, tag="opened"):
    session: str
    model: str
    max_context_tokens: int
    vocab_size: int


class RoundAccepted(Message, frozen=True, kw_only=True, tag="accepted"):
    session: str
    round: int
    stream: str  # subject of the round's tokens
    num_history_tokens: int
    num_input_tokens: int


class RoundCancelled(Message, frozen=True, kw_only=True, tag="cancelled"):
    """`cancelled` is False when there was nothing in flight."""

    session: str
    round: int | None
    cancelled: bool


class SessionClosed(Message, frozen=True, kw_only=True, tag="closed"):
    session: str
    num_rounds: int


class RoundInfo(msgspec.Struct, frozen=True, kw_only=True):
    round: int
    state: Literal["queued", "prefilling", "decoding", "finished", "failed", "cancelled"]
    attempt: int
    num_input_tokens: int
    num_output_tokens: int
    usage: Usage | None = None
    error: str | None = None


class SessionInfo(Message, frozen=True, kw_only=True, tag="session_info"):
    session: str
    state: Literal["idle", "running", "closed"]
    decode_worker: str | None
    num_tokens: int
    rounds: tuple[RoundInfo, ...]  # the newest 64
    token_ids: TokenIds | None = None  # every finished round's tokens, when asked for


class RoundSnapshot(Message, frozen=True, kw_only=True, tag="round_snapshot"):
    """Output tokens from start_index; `finished`/`failed` are set when the round has ended."""

    session: str
    round: int
    start_index: int
    token_ids: TokenIds
    text: str = ""
    finished: RoundFinished | None = None
    failed: RoundFailed | None = None


ClientAnswer = SessionOpened | RoundAccepted | RoundCancelled | SessionClosed | SessionInfo | RoundSnapshot
