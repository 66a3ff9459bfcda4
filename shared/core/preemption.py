"""Whose room goes to another when idle sessions have none left to give: which running sequence is preempted.

One further behind in the order, where prefills are served by deadline, or else the *youngest*. Its KV goes to the lower
tier if there is one, and comes back from there; else it is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from shared.core.kv_memory import KvMemory
from shared.core.sequences import Sequence, SequenceState, SessionKv

RESUME_S = 0.2  # from now, and twice the work: when a preempted round whose client waits for its next token is due

Behind = Callable[[], Iterator[Sequence]]  # those behind the one that asks, who lose their room first


def nobody() -> Iterator[Sequence]:
    return iter(())


class Preemption:
    def __init__(self, memory: KvMemory, sequences: list[Sequence]) -> None:
        """sequences: all that run on the worker, as they come and go."""
        self.num_preemptions = 0
        self._memory = memory
        self._sequences = sequences

    def reserve(
        self, kv: SessionKv, num_tokens: int, arrival: float, *, now: float = 0.0, behind: Behind = nobody
    ) -> bool:
        """As KvMemory.reserve, and preempts running sequences: those `behind` in the order, then those that arrived
        after `arrival`, youngest first."""
        while not self._memory.reserve(kv, num_tokens, now=now):
            victim = next((s for s in behind() if s.kv is not kv), None)
            if victim is None:
                victim = max(self.list_preemptible(kv, arrival), key=lambda s: s.arrival, default=None)
            if victim is None:
                return False
            self.preempt(victim, now)
        return True

    def list_preemptible(self, asking: SessionKv, arrival: float) -> list[Sequence]:
        """Who has come after `arrival` and has room to lose."""
        return [s for s in self._sequences if may_lose_room(s) and s.kv is not asking and s.arrival > arrival]

    def preempt(self, victim: Sequence, now: float) -> None:
        """Its room goes to another. A round that has begun to produce is soon due again."""
        victim.num_preemptions += 1
        self.num_preemptions += 1
        victim.admitted = False
        self._memory.give_up(victim.kv, 0, now)
        if victim.has_produced:
            place = victim.as_waiting()
            place.arrival = now  # it ages from here: its first token was long ago
            place.ttft_deadline = now + 2.0 * self._memory.predict_s(victim.kv) + RESUME_S


def may_lose_room(sequence: Sequence) -> bool:
    """It has some, and no transfer reads or writes it."""
    return sequence.state is SequenceState.READY and sequence.preemptible and bool(sequence.kv.block_table)
