"""A client in virtual time: one session, its rounds one after the other, retries with idempotency keys."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sim_worker import compute_output

from shared.core.types import SessionKey
from shared.errors import ErrorCode
from shared.messages import (
    CancelRound,
    ChatInput,
    ChatMessage,
    ClientRequest,
    CloseSession,
    ErrorReply,
    Message,
    OpenSession,
    ReadRound,
    RoundAccepted,
    RoundFailed,
    RoundFinished,
    RoundSnapshot,
    RoundTokens,
    SamplingParams,
    SessionClosed,
    SessionOpened,
    StopConditions,
    SubmitRound,
    TokensInput,
    pack_token_ids,
    unpack_token_ids,
)

if TYPE_CHECKING:
    from sim_cluster import SimCluster

RETRY_S = 1.0
POLL_S = 3.0
COME_BACK = {
    ErrorCode.NO_DECODE_WORKER,
    ErrorCode.NO_CAPACITY,
    ErrorCode.OVERLOADED,
    ErrorCode.ROUND_IN_FLIGHT,
    ErrorCode.BUS_UNAVAILABLE,
    ErrorCode.DEADLINE_EXCEEDED,  # while it was held
}


@dataclass(eq=False)
class PlannedRound:
    token_ids: list[int]
    max_output_tokens: int
    deadline_s: float
    as_chat: bool
    index: int | None = None
    accepted_at: float | None = None
    stream_terminals: list[RoundFinished | RoundFailed] = field(default_factory=list)
    outcome: RoundSnapshot | ErrorReply | None = None
    cancel_asked: bool = False


class SimClient:
    """Opens its session, plays the planned rounds, and closes when told; `history` is what must be in the record."""

    def __init__(self, cluster: SimCluster, key: SessionKey) -> None:
        self.cluster = cluster
        self.key = key
        self.history: list[int] = []
        self.planned: deque[PlannedRound] = deque()
        self.current: PlannedRound | None = None
        self.done: list[PlannedRound] = []
        self.opened = self.closing = self.closed = False
        self._num_submitted = 0
        self._ask(OpenSession(), self._on_opened)

    @property
    def is_busy(self) -> bool:
        return not self.closed and (not self.opened or self.current is not None or bool(self.planned) or self.closing)

    def plan(self, planned: PlannedRound) -> None:
        self.planned.append(planned)
        self._next()

    def cancel(self) -> None:
        if self.current is not None and self.current.index is not None:
            self.current.cancel_asked = True
            self._ask(CancelRound(), lambda reply: None)

    def close(self) -> None:
        self.closing = True
        self._next()

    # ------------------------------------------------------------------------------ asking

    def _ask(self, request: ClientRequest, on_reply: Callable[[Message], None]) -> None:
        """Ask until answered; errors that say so are tried again."""
        answered = False

        def take(reply: Message) -> None:
            nonlocal answered
            if answered:
                return
            if isinstance(reply, ErrorReply) and reply.code in COME_BACK:
                return
            answered = True
            on_reply(reply)

        def send() -> None:
            if not answered:
                self.cluster.request(self.key, request, take)
                self.cluster.at(self.cluster.now + RETRY_S, send)

        send()

    def _on_opened(self, reply: Message) -> None:
        assert isinstance(reply, SessionOpened), reply
        self.opened = True
        self._next()

    def _next(self) -> None:
        if not self.opened or self.current is not None:
            return
        if self.planned:
            self._submit(self.planned.popleft())
        elif self.closing and not self.closed:
            self._ask(CloseSession(), self._on_closed)

    def _on_closed(self, reply: Message) -> None:
        # the answer to an earlier try may have been lost
        assert isinstance(reply, SessionClosed) or reply.code == ErrorCode.UNKNOWN_SESSION, reply
        self.closed = True

    def _submit(self, planned: PlannedRound) -> None:
        self.current = planned
        self._num_submitted += 1
        text = ",".join(map(str, planned.token_ids))
        request = SubmitRound(
            input=ChatInput(messages=(ChatMessage(role="user", content=text),))
            if planned.as_chat
            else TokensInput(token_ids=pack_token_ids(planned.token_ids)),
            idempotency_key=f"key-{self._num_submitted}",
            sampling=SamplingParams(),
            stop=StopConditions(max_output_tokens=planned.max_output_tokens),
            deadline_s=planned.deadline_s,
        )
        self._ask(request, lambda reply: self._on_submitted(planned, reply))

    def _on_submitted(self, planned: PlannedRound, reply: Message) -> None:
        assert isinstance(reply, RoundAccepted), reply
        planned.index = reply.round
        planned.accepted_at = self.cluster.now
        assert reply.num_history_tokens == len(self.history), "the round starts from the finished rounds' tokens"
        assert reply.num_input_tokens == len(planned.token_ids)
        self._poll(planned)

    # --------------------------------------------------------------------------- following

    def on_stream(self, message: RoundTokens | RoundFinished | RoundFailed) -> None:
        planned = self.current
        if planned is None or planned.index != message.round or isinstance(message, RoundTokens):
            return
        planned.stream_terminals.append(message)
        self._read(planned)

    def _poll(self, planned: PlannedRound) -> None:
        """The terminal message may be lost: ask from time to time."""
        if self.current is planned:
            self._read(planned)
            self.cluster.at(self.cluster.now + POLL_S, lambda: self._poll(planned))

    def _read(self, planned: PlannedRound) -> None:
        assert planned.index is not None
        self.cluster.request(self.key, ReadRound(round=planned.index), lambda reply: self._on_read(planned, reply))

    def _on_read(self, planned: PlannedRound, reply: Message) -> None:
        if self.current is not planned or not isinstance(reply, RoundSnapshot):
            return
        tokens = unpack_token_ids(reply.token_ids)
        prompt = self.history + planned.token_ids
        expected = compute_output(prompt, StopConditions(max_output_tokens=planned.max_output_tokens))
        assert tokens == expected[: len(tokens)], "the output is that of a fault-free run"
        if reply.finished is None and reply.failed is None:
            return
        if reply.finished is not None:
            assert tokens == expected, "a finished round has all of its tokens"
            self.history = prompt + tokens
        planned.outcome = reply
        self.done.append(planned)
        self.current = None
        self._next()
