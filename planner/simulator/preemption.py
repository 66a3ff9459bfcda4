"""Who loses device memory to a prefill, or to the rest of the batch, when idle sessions have none left to give."""

from __future__ import annotations

from planner.simulator.decode_batch import DecodeBatch
from planner.simulator.kv_memory import KvMemory
from planner.simulator.prefill_queue import PrefillQueue, SimPrefill, make_prefill
from planner.simulator.rounds import SimRound
from shared.core.load import WorkerLoad

RESUME_S = 0.2


class Preemption:
    def __init__(self, batch: DecodeBatch, queue: PrefillQueue, memory: KvMemory, load: WorkerLoad) -> None:
        self.num_preemptions = 0
        self._batch = batch
        self._queue = queue
        self._memory = memory
        self._load = load

    def make_room(self, prefill: SimPrefill, num_tokens: int, now: float) -> bool:
        """Room for a prefill at the cost of rounds that came after it, the youngest first; of none if all of them
        together have too little."""
        if self._memory.make_room(num_tokens, now):
            return True
        batch = self._batch
        younger = [r for r in batch.rounds if r.sent_at > prefill.round.sent_at and self._is_preemptible(r)]
        if self._memory.num_free + sum(batch.count_held(r) for r in younger) < num_tokens:
            return False
        younger.sort(key=lambda r: (r.sent_at, r.session.index))
        while not self._memory.make_room(num_tokens, now):
            self.preempt(younger.pop(), now)
        return True

    def _is_preemptible(self, round_: SimRound) -> bool:
        if round_.entry:
            return True
        return any(
            one.round is round_ and one.is_local and not one.is_fetching and one.kv.num_tokens
            for one in self._queue.waiting
        )

    def preempt(self, round_: SimRound, now: float) -> None:
        """Its KV goes; it is prefilled again, what it has produced included."""
        self.num_preemptions += 1
        round_.num_preemptions += 1
        if round_.entry:
            kv = self._batch.rounds[round_]
            self._batch.stop(round_)
            round_.attempt += 1
            round_.placed_at = now
            self._memory.swap_out(kv, now)
            prefill = make_prefill(round_, kv, is_local=True, now=now)
            prefill.predict_again(self._load)
            prefill.waiting.ttft_deadline = now + 2.0 * prefill.waiting.work_s + RESUME_S
            self._queue.waiting.append(prefill)
            return
        for prefill in self._queue.waiting:
            if prefill.round is round_:
                self.displace(prefill, now)

    def displace(self, prefill: SimPrefill, now: float) -> None:
        """A waiting prefill gives up its room."""
        self._queue.admitted.pop(prefill, None)
        self._memory.swap_out(prefill.kv, now)
        prefill.predict_again(self._load)
