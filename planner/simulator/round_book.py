"""What has become of the rounds so far, and how often what happened to them."""

from __future__ import annotations

from dataclasses import dataclass

from planner.simulator.bindings import Bindings
from planner.simulator.rounds import SimRound, SimSession
from shared.messages import Slo


@dataclass(slots=True)
class Counters:
    local: int = 0
    remote: int = 0
    rejected: int = 0
    refused_prefills: int = 0
    staged: int = 0
    staged_tokens: int = 0
    rebinds: int = 0
    moves: int = 0
    failures: int = 0
    role_changes: int = 0
    role_changes_refused: int = 0
    events: int = 0


class RoundBook:
    """Every round that has ended or failed, in that order, and how many have missed an objective: those that follow a
    failed one in its session have as well."""

    def __init__(self, bindings: Bindings, slo: Slo, num_sessions: int, max_missed: int | None) -> None:
        self.rounds: list[SimRound] = []
        self._bindings = bindings
        self._slo = slo
        self._num_open = num_sessions
        self._num_missed = 0
        self._max_missed = max_missed if max_missed is not None else 1 << 60

    @property
    def missed_too_many(self) -> bool:
        return self._num_missed > self._max_missed

    def goes_on(self) -> bool:
        """Whether there is more to simulate."""
        return self._num_open > 0 and self._num_missed <= self._max_missed

    def end(self, round_: SimRound, now: float) -> None:
        session = round_.session
        self.rounds.append(round_)
        if round_.ttft_s > self._slo.ttft_s or round_.tpot_s > self._slo.itl_s:
            self._num_missed += 1
        round_.decode.load.end_round(session.key)
        session.running = None
        session.num_tokens = round_.num_prompt + round_.planned.output_tokens
        session.ended_at = now

    def fail(self, round_: SimRound, error: str) -> None:
        """It does not end, and its session has no further one."""
        round_.error = error
        round_.decode.load.end_round(round_.session.key)
        round_.session.running = None
        self.rounds.append(round_)
        self._num_missed += len(round_.session.planned.rounds) - round_.index
        self.close(round_.session)

    def close(self, session: SimSession) -> None:
        self._num_open -= 1
        self._bindings.close(session)
