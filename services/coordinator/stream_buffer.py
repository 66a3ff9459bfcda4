"""Messages of rounds' streams on their way into the core: few events, nothing decoded.

The first message of a round goes in at once (it ends the prefill), as does one that may end the round. The others
wait for the next tick, or until something happens to their session: before the core decides anything about a
session, it has seen all that its stream has shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from shared import subjects
from shared.core.stream_output import may_end_round
from shared.core.types import SessionKey

Deliver = Callable[[SessionKey, int, tuple[bytes, ...]], None]
Follows = Callable[[SessionKey, int], bool]


@dataclass(slots=True)
class _Buffered:
    subject: str
    key: SessionKey
    round: int
    payloads: list[bytes] = field(default_factory=list)


class StreamBuffer:
    """At most one round of each session is followed; what is buffered is bounded by a tick's worth of messages."""

    def __init__(self, follows: Follows, deliver: Deliver) -> None:
        self._follows = follows
        self._deliver = deliver
        self._by_subject: dict[str, _Buffered] = {}
        self._by_session: dict[SessionKey, _Buffered] = {}

    def add(self, subject: str, payload: bytes) -> None:
        buffered = self._by_subject.get(subject)
        if buffered is None:
            buffered = self._follow(subject)
            if buffered is None:
                return
            buffered.payloads.append(payload)
            self._flush(buffered)
            return
        buffered.payloads.append(payload)
        if may_end_round(payload):
            self._flush(buffered)

    def flush_session(self, key: SessionKey) -> None:
        buffered = self._by_session.get(key)
        if buffered is not None:
            self._flush(buffered)

    def flush_all(self) -> None:
        """Also lets go of rounds that are over: a round's end is not told twice."""
        for buffered in list(self._by_subject.values()):
            if self._follows(buffered.key, buffered.round):
                self._flush(buffered)
            else:
                self.forget(buffered.key)

    def forget(self, key: SessionKey) -> None:
        buffered = self._by_session.pop(key, None)
        if buffered is not None:
            del self._by_subject[buffered.subject]

    def _follow(self, subject: str) -> _Buffered | None:
        tenant, session, round_index = subjects.parse_round_stream(subject)
        key = SessionKey(tenant, session)
        if not self._follows(key, round_index):
            return None
        self.forget(key)
        buffered = _Buffered(subject, key, round_index)
        self._by_subject[subject] = self._by_session[key] = buffered
        return buffered

    def _flush(self, buffered: _Buffered) -> None:
        if buffered.payloads:
            payloads, buffered.payloads = tuple(buffered.payloads), []
            self._deliver(buffered.key, buffered.round, payloads)
