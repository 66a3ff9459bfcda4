"""Send a plan to a cluster: an open loop over sessions, and within a session round after round."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from loadgen.plan import Plan, PlannedRound, PlannedSession
from loadgen.records import RoundError, RoundRecord
from shared.client import AmpdClient, ClientSession, RoundStream
from shared.errors import AmpdError
from shared.messages import ChatMessage, Slo, StopConditions

MIN_IDLE_TIMEOUT_S = 600.0
CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """`max_in_flight` bounds the sessions open at once: later ones wait, and their lag shows in the report."""

    seed: int
    slo: Slo
    max_in_flight: int = 1024
    deadline_s: float = 600.0
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])  # two replays' sessions have different names

    def name_session(self, index: int) -> str:
        """As the cluster knows the plan's session `index`."""
        return f"loadgen-{self.run_id}-{index}"


@dataclass(slots=True)
class SessionsInFlight:
    """For the progress display."""

    started: int = 0
    ended: int = 0


async def replay(
    client: AmpdClient,
    plan: Plan,
    options: ReplayOptions,
    on_record: Callable[[RoundRecord], None],
    in_flight: SessionsInFlight | None = None,
) -> None:
    """Replay every session of `plan`. Each round sent is reported once, as it ends; a session stops at its first
    failed round. When cancelled, the open sessions are closed and rounds in flight stay unreported."""
    count = in_flight or SessionsInFlight()
    places = asyncio.Semaphore(options.max_in_flight)
    start_s = time.monotonic()

    async def run(session: PlannedSession) -> None:
        try:
            player = SessionPlayer(client, session, options, start_s, on_record)
            await player.play()
        finally:
            count.ended += 1
            places.release()

    async with asyncio.TaskGroup() as group:
        for session in plan.sessions:
            await _sleep_until(start_s + session.arrival_s)
            await places.acquire()
            count.started += 1
            group.create_task(run(session), name=f"session-{session.index}")


async def _sleep_until(due_s: float) -> None:
    await asyncio.sleep(max(0.0, due_s - time.monotonic()))


class SessionPlayer:
    """Plays one session: opens it, sends its rounds one after another, closes it."""

    def __init__(
        self,
        client: AmpdClient,
        session: PlannedSession,
        options: ReplayOptions,
        start_s: float,
        on_record: Callable[[RoundRecord], None],
    ) -> None:
        self._client = client
        self._session = session
        self._name = options.name_session(session.index)
        self._options = options
        self._start_s = start_s
        self._on_record = on_record

    async def play(self) -> None:
        due_s = self._start_s + self._session.arrival_s
        longest_delay_s = max(one.delay_s for one in self._session.rounds)
        try:
            session = await self._client.open_session(
                self._name, slo=self._options.slo, idle_timeout_s=max(MIN_IDLE_TIMEOUT_S, 2 * longest_delay_s)
            )
        except AmpdError as error:
            self._record_failure(0, due_s, sent_s=None, stream=None, error=error)
            return
        try:
            await self._play_rounds(session, due_s)
        finally:
            # A session that cannot be closed now ends by its idle time-out.
            with contextlib.suppress(AmpdError):
                await session.close(timeout_s=CLOSE_TIMEOUT_S)

    async def _play_rounds(self, session: ClientSession, due_s: float) -> None:
        for index, planned in enumerate(self._session.rounds):
            # made before the round is due: drawing 100,000 token ids takes longer than sending them
            content = make_input(planned, self._options.seed, self._session.index, index, session.opened.vocab_size)
            if index:
                due_s += planned.delay_s
                await _sleep_until(due_s)
            ended_s = await self._play_round(session, index, content, due_s)
            if ended_s is None:
                return
            due_s = ended_s

    async def _play_round(
        self, session: ClientSession, index: int, content: str | list[int] | list[ChatMessage], due_s: float
    ) -> float | None:
        """Send a round and record it. Returns when it ended (monotonic seconds), None if it failed."""
        planned = self._session.rounds[index]
        sent_s = time.monotonic()
        stream = None
        try:
            stream = await session.submit(
                content,
                stop=StopConditions(max_output_tokens=planned.output_tokens, ignore_eos=not planned.has_content),
                deadline_s=self._options.deadline_s,
            )
            result = await stream.result()
        except AmpdError as error:
            self._record_failure(index, due_s, sent_s, stream, error)
            return None
        self._on_record(
            RoundRecord(
                session_index=self._session.index,
                session_id=self._session.session_id,
                round=index,
                planned_input_tokens=planned.input_tokens,
                planned_output_tokens=planned.output_tokens,
                delay_s=planned.delay_s,
                state="completed",
                due_s=self._since_start(due_s),
                sent_s=self._since_start(result.sent_s),
                accepted_s=self._since_start(result.accepted_s),
                first_token_s=None if result.first_token_s is None else self._since_start(result.first_token_s),
                finished_s=self._since_start(result.finished_s),
                token_times_s=tuple(map(self._since_start, result.token_times)),
                finish_reason=result.finish_reason,
                usage=result.usage,
                num_recoveries=result.num_recoveries,
                text=result.text if planned.has_content else None,
                session=self._name,
            )
        )
        return result.finished_s

    def _record_failure(
        self, index: int, due_s: float, sent_s: float | None, stream: RoundStream | None, error: AmpdError
    ) -> None:
        planned = self._session.rounds[index]
        times = tuple(map(self._since_start, stream.token_times)) if stream else ()
        self._on_record(
            RoundRecord(
                session_index=self._session.index,
                session_id=self._session.session_id,
                round=index,
                planned_input_tokens=planned.input_tokens,
                planned_output_tokens=planned.output_tokens,
                delay_s=planned.delay_s,
                state="failed",
                due_s=self._since_start(due_s),
                sent_s=None if sent_s is None else self._since_start(sent_s),
                accepted_s=self._since_start(stream.accepted_s) if stream else None,
                first_token_s=times[0] if times else None,
                finished_s=self._since_start(time.monotonic()),
                token_times_s=times,
                num_recoveries=stream.num_recoveries if stream else 0,
                error=RoundError(error.code.value, error.message),
                session=self._name,
            )
        )

    def _since_start(self, monotonic_s: float) -> float:
        return round(monotonic_s - self._start_s, 6)


def make_input(
    planned: PlannedRound, seed: int, session_index: int, round_index: int, vocab_size: int
) -> str | list[int] | list[ChatMessage]:
    """The trace's own text, or `input_tokens` ids drawn by (seed, session, round).

    The lowest ids, where vocabularies keep their special tokens, are left out.
    """
    if planned.messages is not None:
        return list(planned.messages)
    if planned.text is not None:
        return planned.text
    lowest = min(256, vocab_size // 4)
    draws = np.random.default_rng((seed, session_index, round_index))
    ids: list[int] = draws.integers(lowest, vocab_size, planned.input_tokens).tolist()
    return ids
