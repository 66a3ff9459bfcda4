"""The client of AMPD: sessions, rounds and their streams over any Bus.

    client = await AmpdClient.connect("nats://127.0.0.1:4222")
    session = await client.open_session()
    stream = await session.submit("The capital of France is", max_output_tokens=16)
    async for chunk in stream:
        print(chunk.text, end="")
    result = await stream.result()
    await session.close()
    await client.close()

Every failure is an AmpdError with a stable code. A request that got no answer is sent again with the same
idempotency key until its deadline, at most for `retry_s`: long enough for a coordinator to restart.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import TypeVar, cast

from shared import subjects
from shared.bus import Bus, BusMessage, Subscription
from shared.client_stream import RoundResult, RoundStream, TokenChunk
from shared.errors import AmpdError, ErrorCode, NoResponders, RequestTimeout
from shared.messages import (
    CancelRound,
    ChangeRole,
    ChatInput,
    ChatMessage,
    ClientRequest,
    CloseSession,
    ClusterStatus,
    ExplainSession,
    GetStats,
    GetStatus,
    InspectSession,
    Message,
    OpenSession,
    PlannerStats,
    ReadRound,
    Replan,
    ReplanMode,
    ReplanState,
    Role,
    RoleChanged,
    RoundAccepted,
    RoundCancelled,
    RoundFailed,
    RoundFinished,
    RoundInput,
    RoundSnapshot,
    RoundTokens,
    SamplingParams,
    SessionClosed,
    SessionExplained,
    SessionInfo,
    SessionOpened,
    Slo,
    StopConditions,
    StreamMessage,
    SubmitRound,
    TextInput,
    TokensInput,
    decode,
    encode,
    pack_token_ids,
    raise_if_error,
)
from shared.nats_bus import connect_nats_bus

__all__ = ["AmpdClient", "ClientSession", "RoundResult", "RoundStream", "TokenChunk"]

MAX_EARLY_MESSAGES = 4096  # stream messages kept while the answer to `submit` is on its way; later ones are read
ATTEMPT_TIMEOUT_S = 5.0  # one try of a request
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.05, 1.0

M = TypeVar("M", bound=Message)


class AmpdClient:
    """A connection to one cluster, as one tenant. Close it when done; sessions left open end by idle time-out."""

    def __init__(self, bus: Bus, *, tenant: str = "default", owns_bus: bool = False, retry_s: float = 30.0) -> None:
        self.tenant = subjects.check_token("tenant", tenant)
        self._bus = bus
        self._owns_bus = owns_bus
        self._retry_s = retry_s
        self._sessions: set[ClientSession] = set()
        self._closed = False

    @classmethod
    async def connect(
        cls, url: str, *, tenant: str = "default", name: str = "ampd-client", timeout_s: float = 10.0
    ) -> AmpdClient:
        """Connect to nats-server at `url`. Raises AmpdError BUS_UNAVAILABLE when nothing answers there."""
        return cls(await connect_nats_bus(url, name=name, timeout_s=timeout_s), tenant=tenant, owns_bus=True)

    async def open_session(
        self,
        session_id: str | None = None,
        *,
        slo: Slo | None = None,
        idle_timeout_s: float = 600.0,
        timeout_s: float = 30.0,
    ) -> ClientSession:
        """Open a session, or come back to an open one of the same id and options."""
        session = ClientSession(self, session_id or uuid.uuid4().hex)
        # One connection keeps the order: the coordinator cannot see `open` before the server has the subscription.
        session.subscription = await self._bus.subscribe_ordered(
            subjects.session_streams(self.tenant, session.id), session.on_stream_message
        )
        self._sessions.add(session)
        try:
            request = OpenSession(slo=slo or Slo(), idle_timeout_s=idle_timeout_s)
            session.opened = await self.call(session.id, request, SessionOpened, timeout_s=timeout_s)
        except BaseException:
            await session.detach()
            raise
        return session

    async def status(self, *, timeout_s: float = 5.0) -> ClusterStatus:
        return await self._request(subjects.STATUS, GetStatus(), ClusterStatus, timeout_s)

    async def explain(self, session_id: str, *, timeout_s: float = 5.0) -> SessionExplained:
        """Why each of a session's newest rounds was prefilled where it was. Raises UNKNOWN_SESSION."""
        request = ExplainSession(tenant=self.tenant, session=subjects.check_token("session", session_id))
        return await self._request(subjects.EXPLAIN, request, SessionExplained, timeout_s)

    async def change_role(self, worker_id: str, role: Role, *, timeout_s: float = 15.0) -> RoleChanged:
        """Have a running worker take another role; returns when it has. Raises the coordinator's refusal."""
        return await self._request(subjects.ROLE, ChangeRole(worker_id=worker_id, role=role), RoleChanged, timeout_s)

    async def replan(self, mode: ReplanMode | None = None, *, timeout_s: float = 5.0) -> ReplanState:
        """The planner's newest proposal; with `mode`, what becomes of proposals is set first."""
        return await self._request(subjects.REPLAN, Replan(mode=mode), ReplanState, timeout_s)

    async def planner_stats(self, *, timeout_s: float = 5.0) -> PlannerStats:
        return await self._request(subjects.PLANNER_STATS, GetStats(), PlannerStats, timeout_s)

    async def close(self) -> None:
        """Stop following every session, and close the bus if `connect` opened it. Idempotent."""
        self._closed = True
        for session in tuple(self._sessions):
            await session.detach()
        if self._owns_bus:
            await self._bus.close()

    async def __aenter__(self) -> AmpdClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def call(self, session: str, request: ClientRequest, reply_type: type[M], *, timeout_s: float) -> M:
        """One request about a session. Raises the service's AmpdError, or DEADLINE_EXCEEDED, or BUS_UNAVAILABLE."""
        return await self._request(subjects.session_request(self.tenant, session), request, reply_type, timeout_s)

    async def _request(self, subject: str, request: Message, reply_type: type[M], timeout_s: float) -> M:
        """Ask until there is an answer. Every request of the protocol may be repeated: see docs/architecture.md."""
        if self._closed:
            raise AmpdError(ErrorCode.BUS_UNAVAILABLE, "this client is closed: connect a new one")
        data = encode(request)
        deadline = time.monotonic() + timeout_s
        give_up = time.monotonic() + min(timeout_s, self._retry_s)
        backoff_s = FIRST_BACKOFF_S
        while True:
            try_s = max(min(ATTEMPT_TIMEOUT_S, deadline - time.monotonic()), 0.001)
            try:
                reply = raise_if_error(decode(await self._bus.request(subject, data, timeout_s=try_s)))
            except (NoResponders, RequestTimeout) as error:
                failure: AmpdError = error
            except AmpdError as error:
                if error.code is not ErrorCode.DRAINING:  # the coordinator is leaving: another will answer
                    raise
                failure = error
            else:
                if isinstance(reply, reply_type):
                    return reply
                raise AmpdError(
                    ErrorCode.MALFORMED_MESSAGE,
                    f"expected {reply_type.__name__} on {subject}, got {type(reply).__name__}",
                )
            now = time.monotonic()
            if now >= deadline:
                raise AmpdError(
                    ErrorCode.DEADLINE_EXCEEDED, f"no answer within {timeout_s:.3g} s: {failure.message}"
                ) from failure
            if now >= give_up or self._closed:
                raise failure
            await asyncio.sleep(min(backoff_s, give_up - now))
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)

    def forget(self, session: ClientSession) -> None:
        self._sessions.discard(session)


class ClientSession:
    """One open session. `opened` has the model, its context length and its vocabulary size."""

    opened: SessionOpened
    subscription: Subscription

    def __init__(self, client: AmpdClient, session_id: str) -> None:
        self.id = subjects.check_token("session", session_id)
        self._client = client
        self._streams: dict[int, RoundStream] = {}
        self._num_submitting = 0
        self._num_rounds = 0  # rounds followed so far end below this index
        self._early: list[tuple[float, StreamMessage]] = []
        self._detached = False

    async def submit(
        self,
        new_input: str | Sequence[int] | Sequence[ChatMessage],
        *,
        max_output_tokens: int = 128,
        sampling: SamplingParams | None = None,
        stop: StopConditions | None = None,
        deadline_s: float = 600.0,
        slo: Slo | None = None,
        idempotency_key: str | None = None,
    ) -> RoundStream:
        """Send one round: only what is new since the last one. Returns once the coordinator has it on record.

        `stop` replaces `max_output_tokens`. Without an `idempotency_key` a fresh one is drawn, which makes this
        call safe to repeat on the wire; give your own to make it safe across calls.
        """
        stop = stop or StopConditions(max_output_tokens=max_output_tokens)
        request = SubmitRound(
            input=_round_input(new_input),
            idempotency_key=idempotency_key or uuid.uuid4().hex,
            sampling=sampling or SamplingParams(),
            stop=stop,
            slo=slo,
            deadline_s=deadline_s,
            stream_encoding="msgpack",
        )
        sent_s = time.monotonic()
        self._num_submitting += 1
        try:
            accepted = await self._client.call(self.id, request, RoundAccepted, timeout_s=deadline_s)
            return self._follow(RoundStream(self, accepted, stop, sent_s=sent_s, deadline_s=sent_s + deadline_s))
        finally:
            self._num_submitting -= 1
            if not self._num_submitting:
                self._early.clear()

    async def inspect(self, *, include_tokens: bool = False, timeout_s: float = 10.0) -> SessionInfo:
        request = InspectSession(include_tokens=include_tokens)
        return await self._client.call(self.id, request, SessionInfo, timeout_s=timeout_s)

    async def read_round(self, round_index: int, start_index: int = 0, *, timeout_s: float = 10.0) -> RoundSnapshot:
        """The output of a round of this session, from the coordinator's record."""
        request = ReadRound(round=round_index, start_index=start_index)
        return await self._client.call(self.id, request, RoundSnapshot, timeout_s=timeout_s)

    async def cancel(self, round_index: int | None = None, *, timeout_s: float = 10.0) -> RoundCancelled:
        """Cancel the round in flight, if there is one."""
        return await self._client.call(self.id, CancelRound(round=round_index), RoundCancelled, timeout_s=timeout_s)

    async def close(self, *, timeout_s: float = 10.0) -> None:
        """Close the session here and in the cluster. Idempotent; a session already gone is a success."""
        if self._detached:
            return
        try:
            await self._client.call(self.id, CloseSession(), SessionClosed, timeout_s=timeout_s)
        except AmpdError as error:
            if error.code not in (ErrorCode.UNKNOWN_SESSION, ErrorCode.SESSION_CLOSED):
                raise
        finally:
            await self.detach()

    async def __aenter__(self) -> ClientSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def detach(self) -> None:
        """Stop following the session, and leave it open in the cluster. Rounds in flight end here as CLIENT_GONE."""
        if self._detached:
            return
        self._detached = True
        self._client.forget(self)
        for stream in tuple(self._streams.values()):
            await stream.abandon()
        await self.subscription.unsubscribe()

    def on_stream_message(self, message: BusMessage) -> None:
        """Every message of every round of the session, in order of arrival."""
        now = time.monotonic()
        try:
            decoded = decode(message.data)
        except AmpdError:  # not ours to answer: what it held is read from the record, like any lost message
            return
        if not isinstance(decoded, RoundTokens | RoundFinished | RoundFailed):
            return
        stream = self._streams.get(decoded.round)
        if stream is not None:
            stream.on_message(decoded, now)
        elif self._num_submitting and len(self._early) < MAX_EARLY_MESSAGES:
            self._early.append((now, decoded))

    def _follow(self, stream: RoundStream) -> RoundStream:
        """Begin to follow a round; the stream there is, if the key was that of a round in flight."""
        if self._detached:
            raise AmpdError(ErrorCode.CLIENT_GONE, "the session was closed while the round was being submitted")
        if stream.round in self._streams:
            return self._streams[stream.round]
        self._streams[stream.round] = stream
        has_ended = stream.round < self._num_rounds  # the key was that of a round followed before
        stream.start(on_ended=lambda: self._streams.pop(stream.round, None), read_now=has_ended)
        self._num_rounds = max(self._num_rounds, stream.round + 1)
        for now, message in self._early:
            if message.round == stream.round:
                stream.on_message(message, now)
        return stream


def _round_input(new_input: str | Sequence[int] | Sequence[ChatMessage]) -> RoundInput:
    if isinstance(new_input, str):
        return TextInput(text=new_input)
    if new_input and all(isinstance(item, ChatMessage) for item in new_input):
        return ChatInput(messages=cast("tuple[ChatMessage, ...]", tuple(new_input)))
    try:
        return TokensInput(token_ids=pack_token_ids(cast("Sequence[int]", new_input)))
    except (OverflowError, TypeError) as error:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST, f"give text, a list of 32-bit token ids, or ChatMessages: {error}"
        ) from error
