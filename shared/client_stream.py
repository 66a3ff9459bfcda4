"""One round as the client sees it: its stream put in order, watched for losses, and bounded by its deadline.

Nothing is queued: the stream keeps the round's output (bounded by max_output_tokens) and every consumer has a
cursor into it, so that a consumer that stops reading costs nothing and later gets what it missed in one chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from shared.core.round_assembly import RoundAssembly
from shared.errors import AmpdError, ErrorCode
from shared.messages import (
    FinishReason,
    RoundAccepted,
    RoundCancelled,
    RoundFailed,
    RoundSnapshot,
    StopConditions,
    StreamMessage,
    Usage,
)

GAP_PATIENCE_S = 0.05  # a message out of order has this long to arrive before it is read from the record
SILENCE_S = 2.0  # nothing for so long: the end of the round may have been lost, ask
MAX_PATIENCE_S = 10.0  # patience doubles with every answer that brings nothing, up to this
READ_TIMEOUT_S = 5.0
GIVE_UP_S = 30.0  # no token and no answer from the coordinator for so long: BUS_UNAVAILABLE
# After one of these the round is still going on, or a coordinator that comes back will know.
_TRANSIENT = (
    ErrorCode.BUS_UNAVAILABLE,
    ErrorCode.DEADLINE_EXCEEDED,
    ErrorCode.OVERLOADED,
    ErrorCode.DRAINING,
    ErrorCode.INTERNAL,
)


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Output tokens [start_index, start_index + len(token_ids)), and the text that they complete.

    `time`: monotonic seconds at which the newest of them arrived. A chunk may have text alone, or tokens alone:
    characters that more than one token spells, and text that may become a stop string, come late.
    """

    start_index: int
    token_ids: tuple[int, ...]
    text: str
    time: float


@dataclass(frozen=True, slots=True)
class RoundResult:
    """A finished round. All times are monotonic seconds of this process; token i arrived at token_times[i]."""

    accepted: RoundAccepted
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
    sent_s: float
    accepted_s: float
    first_token_s: float | None  # None: the round produced no token
    token_times: tuple[float, ...]
    finished_s: float
    num_recoveries: int  # times the record was read because messages were missing


class RoundSession(Protocol):
    """What a stream needs of its session."""

    async def read_round(self, round_index: int, start_index: int = 0, *, timeout_s: float = 10.0) -> RoundSnapshot: ...
    async def cancel(self, round_index: int | None = None, *, timeout_s: float = 10.0) -> RoundCancelled: ...


class RoundStream:
    """The output of one round: iterate over it, or await `result()`, or both; any number of consumers."""

    def __init__(
        self,
        session: RoundSession,
        accepted: RoundAccepted,
        stop: StopConditions,
        *,
        sent_s: float,
        deadline_s: float,
    ) -> None:
        self.accepted = accepted
        self.round = accepted.round
        self.sent_s = sent_s
        self.accepted_s = self._heard_s = time.monotonic()
        self.num_recoveries = 0
        self._deadline_s = deadline_s  # monotonic
        self._session = session
        self._assembly = RoundAssembly(stop.max_output_tokens)
        self._failure: AmpdError | None = None
        self._finished_s: float | None = None  # set: over, for better or worse
        self._text_diverged = False  # the text streamed so far was not a prefix of the exact text
        self._gap_since_s: float | None = None
        self._attention = asyncio.Event()  # wakes the watcher: a gap, or the end
        self._news = asyncio.Event()  # wakes the consumers
        self._watcher: asyncio.Task[None] | None = None
        self._on_ended: Callable[[], object] = lambda: None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens so far, also after a failure."""
        return tuple(self._assembly.token_ids)

    @property
    def token_times(self) -> tuple[float, ...]:
        """When each of `token_ids` arrived, monotonic seconds."""
        return tuple(self._assembly.token_times)

    @property
    def text(self) -> str:
        """The text so far, also after a failure."""
        return self._assembly.text

    def start(self, on_ended: Callable[[], object], *, read_now: bool = False) -> None:
        """Begin to watch over the round; `on_ended` is called once, when it is over. `read_now`: expect no stream."""
        self._on_ended = on_ended
        if read_now:
            self._heard_s -= SILENCE_S
        self._watcher = asyncio.create_task(self._watch(), name=f"round-{self.accepted.session}-{self.round}")

    def on_message(self, message: StreamMessage, now: float) -> None:
        """Take one message of this round, as it arrives."""
        if self._finished_s is not None:
            return
        self._heard_s = now
        try:
            self._assembly.add(message, now)
        except AmpdError as error:
            self._end(error)
            return
        self._note_progress()

    async def result(self) -> RoundResult:
        """Wait for the end. Raises the AmpdError that ended the round: DEADLINE_EXCEEDED, CANCELLED, ..."""
        while self._finished_s is None:
            self._news.clear()
            await self._news.wait()
        if self._failure is not None:
            raise self._failure
        finished = self._assembly.finished
        assert finished is not None  # a round is over with a failure or with this
        times = self.token_times
        return RoundResult(
            accepted=self.accepted,
            token_ids=self.token_ids,
            text=self._assembly.text,
            finish_reason=finished.finish_reason,
            usage=finished.usage,
            sent_s=self.sent_s,
            accepted_s=self.accepted_s,
            first_token_s=times[0] if times else None,
            token_times=times,
            finished_s=self._finished_s,
            num_recoveries=self.num_recoveries,
        )

    async def cancel(self) -> bool:
        """Cancel the round: `result()` then raises CANCELLED. False when it had ended already."""
        return (await self._session.cancel(self.round)).cancelled

    async def abandon(self) -> None:
        """Stop following the round; a round still in flight ends, here only, with CLIENT_GONE."""
        if self._finished_s is None:
            self._end(AmpdError(ErrorCode.CLIENT_GONE, "the client stopped following this round"))
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])

    async def __aiter__(self) -> AsyncIterator[TokenChunk]:
        """Every output token once, from the first; then the round's failure is raised if it has one."""
        num_tokens = num_characters = 0
        while True:
            assembly = self._assembly
            is_over = self._finished_s is not None
            token_ids = tuple(assembly.token_ids[num_tokens:])
            text = "" if self._text_diverged else assembly.text[num_characters:]
            if token_ids or text:
                arrived_s = assembly.token_times[-1] if token_ids else self._heard_s
                yield TokenChunk(num_tokens, token_ids, text, arrived_s)
                num_tokens += len(token_ids)
                num_characters += len(text)
            elif is_over:
                break
            else:
                self._news.clear()
                await self._news.wait()
        if self._failure is not None:
            raise self._failure

    # ------------------------------------------------------------------------------------- watching

    async def _watch(self) -> None:
        try:
            await self._recover_until_complete()
        except AmpdError as error:
            self._end(error)
            if error.code is ErrorCode.DEADLINE_EXCEEDED:
                with contextlib.suppress(AmpdError):  # the service has the same deadline: this only hurries it
                    await self._session.cancel(self.round, timeout_s=1.0)
        except Exception as error:
            self._end(AmpdError(ErrorCode.INTERNAL, f"the client failed: {error!r}"))
            raise

    async def _recover_until_complete(self) -> None:
        """Read from the record whatever the stream did not bring; returns when the round has ended."""
        num_vain = 0  # reads in a row that brought nothing
        read_s = 0.0
        while self._finished_s is None:
            now = time.monotonic()
            if now >= self._deadline_s:
                raise AmpdError(
                    ErrorCode.DEADLINE_EXCEEDED,
                    f"round {self.round} did not end within its deadline: give deadline_s more, or load less",
                )
            if self._assembly.is_complete:  # only its exact text is missing
                due_s = read_s + (GAP_PATIENCE_S if num_vain else 0.0)
            elif self._gap_since_s is not None:
                due_s = max(self._gap_since_s, read_s) + min(GAP_PATIENCE_S * 2**num_vain, MAX_PATIENCE_S)
            else:
                due_s = max(self._heard_s, read_s) + min(SILENCE_S * 2**num_vain, MAX_PATIENCE_S)
            if due_s > now:
                self._attention.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._attention.wait(), min(due_s, self._deadline_s) - now)
                continue
            num_vain = 0 if await self._read() else min(num_vain + 1, 16)
            read_s = time.monotonic()

    async def _read(self) -> bool:
        """Ask the coordinator for what is missing. True when it brought something."""
        wants_text = self._assembly.is_complete
        start_index = 0 if wants_text else len(self._assembly.token_ids)
        timeout_s = min(READ_TIMEOUT_S, max(self._deadline_s - time.monotonic(), 0.001))
        try:
            snapshot = await self._session.read_round(self.round, start_index, timeout_s=timeout_s)
        except AmpdError as error:
            if error.code not in _TRANSIENT:
                raise
            if time.monotonic() - self._heard_s > GIVE_UP_S:
                raise AmpdError(ErrorCode.BUS_UNAVAILABLE, f"nothing heard of the round: {error.message}") from error
            return False
        now = time.monotonic()
        before = len(self._assembly.token_ids)
        if wants_text:
            self._set_exact_text(snapshot.text)
        else:
            self._assembly.add_snapshot(snapshot, now)
        brought = wants_text or len(self._assembly.token_ids) > before or self._assembly.is_complete
        if brought:
            self.num_recoveries += 1
        self._heard_s = now
        self._note_progress()
        return brought

    def _set_exact_text(self, text: str) -> None:
        """A service without a detokeniser streams no text, and has none here either."""
        self._text_diverged = not text.startswith(self._assembly.text)
        self._assembly.set_exact_text(text)

    def _note_progress(self) -> None:
        assembly = self._assembly
        if assembly.is_complete and (assembly.failed is not None or assembly.text_is_exact):
            self._end(_failure_of(assembly.failed) if assembly.failed else None)
        elif assembly.is_complete:
            self._attention.set()
        elif not assembly.has_gap:
            self._gap_since_s = None
        elif self._gap_since_s is None:
            self._gap_since_s = self._heard_s
            self._attention.set()
        self._news.set()

    def _end(self, failure: AmpdError | None) -> None:
        if self._finished_s is not None:
            return
        self._failure = failure
        self._finished_s = self._heard_s if failure is None else time.monotonic()
        self._on_ended()
        self._attention.set()
        self._news.set()


def _failure_of(failed: RoundFailed) -> AmpdError:
    return AmpdError(failed.error.code, failed.error.message, retry_after_s=failed.error.retry_after_s)
