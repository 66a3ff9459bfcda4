"""Which prefills may begin: one does only with room to its end beside those that have begun.

Half-computed prefills that wait for each other's room are how a worker collapses.
"""

from __future__ import annotations

from collections.abc import Iterator

from shared.core.kv_memory import KvMemory
from shared.core.preemption import Behind, Preemption, may_lose_room, nobody
from shared.core.reordering import PrefillOrder
from shared.core.sequences import Sequence, SequenceState


class PrefillAdmission:
    def __init__(
        self, memory: KvMemory, preemption: Preemption, order: PrefillOrder, sequences: list[Sequence]
    ) -> None:
        """sequences: all that run on the worker, as they come and go."""
        self._memory = memory
        self._preemption = preemption
        self._order = order
        self._sequences = sequences

    def admit(self, sequence: Sequence, behind: Behind, now: float) -> bool:
        """Whether a prefill may go on.

        Served by deadline, it may take the room of those behind it, if their KV has somewhere to go; served in order
        of arrival, that of all who came later.
        """
        if has_begun(sequence):
            return True
        memory, place = self._memory, sequence.as_waiting()
        num_own = memory.count_missing_blocks(sequence.kv)
        missing = num_own + self._count_promised_blocks()
        missing += memory.allocator.blocks_for(self._order.count_aside(place))
        room = memory.allocator.num_free
        if missing > room:
            room += sum(len(kv.block_table) for kv in memory.list_idle(sequence.kv))
        if missing > room and not self._order.by_deadline:
            younger = self._preemption.list_preemptible(sequence.kv, sequence.arrival)
            room += sum(len(s.kv.block_table) for s in younger)
        yielding: list[Sequence] = []
        if missing > room and memory.lower_tier is not None:
            for other in behind():
                yielding.append(other)
                room += len(other.kv.block_table)
                missing -= memory.count_missing_blocks(other.kv) if other.admitted else 0
                if missing <= room:
                    break
        if missing > room:
            return False
        for other in yielding:
            self._preemption.preempt(other, now)
        sequence.admitted = True
        self._order.note_begun(place, num_own * memory.allocator.block_size)
        return True

    def may_others_begin(self, sequence: Sequence) -> bool:
        """`sequence` was not admitted: whether those behind it may begin."""
        num_lacking = self._memory.count_missing_blocks(sequence.kv) * self._memory.allocator.block_size
        return self._order.may_be_passed(sequence.as_waiting(), num_lacking)

    def list_behind(self, prefills: list[Sequence], place: int) -> Iterator[Sequence]:
        """Prefills that may have to yield to the one at `place`, the last in the order first. The oldest that has aged
        keeps what it has, it would never get on otherwise, and takes nothing from those in time."""
        if not self._order.by_deadline or self._order.is_oldest_aged(prefills[place].as_waiting()):
            return nobody()
        return (
            other
            for other in reversed(prefills[place + 1 :])
            if may_lose_room(other) and not self._order.is_oldest_aged(other.as_waiting())
        )

    def count_promised_tokens(self) -> int:
        """KV room that prefills which have begun here still need, to their ends."""
        return self._count_promised_blocks() * self._memory.allocator.block_size

    def _count_promised_blocks(self) -> int:
        return sum(
            self._memory.count_missing_blocks(s.kv)
            for s in self._sequences
            if s.admitted and s.state is not SequenceState.ENDED and s.kv.num_missing > 1
        )


def has_begun(sequence: Sequence) -> bool:
    """It may take room to its end, or had all its blocks reserved before it came here."""
    return sequence.admitted or not sequence.preemptible
