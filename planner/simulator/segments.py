"""Runs a worker's steps, several equal ones at a time.

A *segment* is n steps of the same composition: the decoding batch, and for prefills one chunk each. It ends at the
first step after which the composition changes: a sequence finishes, a prefill is done, something arrived. So there is
no event per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.simulator.event_heap import EventHeap
from planner.simulator.prefill_planner import Chunk, PrefillPlanner
from planner.simulator.prefill_queue import SimPrefill
from shared.core.policies import SchedulingPolicy
from shared.core.step_prediction import correct

if TYPE_CHECKING:
    from planner.simulator.worker import SimWorker

MAX_SEGMENT_STEPS = 256
MAX_CHUNK_STEPS = 8  # attention grows with the history: the mean of so few chunks is exact enough


@dataclass(slots=True, eq=False)
class Segment:
    """Memory is taken for all its steps when it starts."""

    started_at: float
    step_s: float
    num_steps: int
    decodes: bool
    chunks: list[Chunk]


class Segments:
    """`pauses`: a prefill's steps decode nothing."""

    def __init__(
        self, worker: SimWorker, planner: PrefillPlanner, events: EventHeap, policy: SchedulingPolicy, *, pauses: bool
    ) -> None:
        self.running: Segment | None = None
        self._worker = worker
        self._batch = worker.batch
        self._queue = worker.queue
        self._memory = worker.memory
        self._planner = planner
        self._events = events
        self._pauses = pauses
        self._corrects = policy.corrects
        self._prefills_take_turns = pauses and policy.chunk.chunk == "slack"
        self._num_ends = 0  # of segments, as planned: only the last counts

    def look_again(self, now: float) -> None:
        """Something changed: end the running segment at its next step, or start one."""
        running = self.running
        if running is None:
            self._start(now)
            return
        num_done = int((now - running.started_at) / running.step_s) + 1
        if num_done < running.num_steps:
            self._give_back(running, running.num_steps - num_done)
            running.num_steps = num_done
            self._plan_end(running)

    def _plan_end(self, segment: Segment) -> None:
        self._num_ends += 1
        self._events.at(segment.started_at + segment.num_steps * segment.step_s, self._end, self._num_ends)

    def _give_back(self, segment: Segment, num_steps: int) -> None:
        """The segment is cut short by so many steps, and memory was taken for them."""
        if segment.decodes:
            self._memory.num_used -= self._batch.size * num_steps
        for prefill, chunk in segment.chunks:
            self._memory.grow(prefill.kv, -chunk * num_steps)

    # ------------------------------------------------------------------------------------ start

    def _start(self, now: float) -> None:
        worker, batch, queue = self._worker, self._batch, self._queue
        if not worker.alive:
            return
        batch.begin_joining(now)
        while True:
            can_prefill = queue.waiting and not self._owes_decode()
            chunks, budget, most_steps = self._planner.plan(now) if can_prefill else ([], 0, 0)
            num_decoding = 0 if chunks and self._pauses else batch.size
            if num_decoding == 0 and not chunks:
                if queue.waiting:
                    worker.wait_for_room(now)
                return
            num_steps = self._count_chunk_steps(chunks, budget) if chunks else MAX_SEGMENT_STEPS
            num_steps = min(num_steps, most_steps or MAX_SEGMENT_STEPS)
            if num_decoding:
                num_steps = min(num_steps, batch.next_finish() - batch.tick)
            if chunks or self._memory.make_room(num_decoding * num_steps, now):
                break
            num_steps = self._memory.num_free // num_decoding
            if num_steps:
                break
            worker.preemption.preempt(batch.find_youngest(), now)
        self._run(chunks, num_decoding, num_steps if not self._owes_decode() else 1, now)

    def _owes_decode(self) -> bool:
        """With pauses, slack-sized chunks take turns with decode steps; a fixed prefill stops the batch to its end."""
        return self._prefills_take_turns and self._batch.paused_s > 0.0 and self._batch.size > 0

    def _count_chunk_steps(self, chunks: list[Chunk], budget: int) -> int:
        """Several equal steps, when one prefill fills them all."""
        if len(chunks) > 1 or chunks[0][1] < budget:
            return 1
        prefill, chunk = chunks[0]
        if self._planner.is_aged_turn(prefill):
            return 1
        num_steps = min(MAX_CHUNK_STEPS, prefill.num_missing // chunk)
        return max(1, min(num_steps, (self._memory.num_free - self._batch.size * num_steps) // chunk))

    def _run(self, chunks: list[Chunk], num_decoding: int, num_steps: int, now: float) -> None:
        mean_context = self._batch.mean_context + num_steps / 2 if num_decoding else 0.0
        parts = [
            (prefill.kv.num_tokens + chunk * (num_steps - 1) // 2, chunk) for prefill, chunk in chunks
        ]  # the history before the chunk, in the middle step
        step_s = self._worker.costs.step_s(num_decoding, mean_context, parts)
        if self._corrects:
            self._correct(num_decoding, mean_context, parts, step_s, num_steps)
        for prefill, chunk in chunks:
            self._memory.grow(prefill.kv, chunk * num_steps)
            if prefill.round.started_at < 0.0:
                prefill.round.started_at = now
        self._memory.num_used += num_decoding * num_steps
        self.running = Segment(now, step_s, num_steps, num_decoding > 0, chunks)
        self._plan_end(self.running)

    def _correct(
        self, batch: int, mean_context: float, parts: list[tuple[int, int]], step_s: float, num_steps: int
    ) -> None:
        """The scheduler hears how long the steps take against what it believes."""
        load = self._worker.load
        if load.costs.scale == self._worker.costs.scale:  # the same profile: nothing to hear
            return
        predicted_s = load.costs.step_s(batch, mean_context, parts)
        if parts:
            load.prefill_correction = correct(load.prefill_correction, predicted_s, step_s, num_steps)
        else:
            load.decode_correction = correct(load.decode_correction, predicted_s, step_s, num_steps)

    # -------------------------------------------------------------------------------------- end

    def _end(self, number: int, now: float) -> None:
        segment = self.running
        if number != self._num_ends or segment is None:
            return
        worker, batch = self._worker, self._batch
        self.running = None
        if segment.decodes:
            for round_ in batch.advance(segment.num_steps, segment.step_s, now):
                worker.end_round(round_, now)
        elif batch.size:
            batch.paused_s += now - segment.started_at
        for prefill, _ in segment.chunks:
            if prefill.kv.num_tokens >= prefill.stop and prefill in self._queue.waiting:
                worker.end_prefill(prefill, now)
            else:
                prefill.note_progress()
        worker.remote.stage_next(now)
        if self.running is None:  # an ended round may have brought the next one, which started a segment
            self._start(now)

    def drop(self, prefill: SimPrefill) -> None:
        """The running segment goes on without it."""
        segment = self.running
        if segment is None:
            return
        num_planned = segment.num_steps * sum(chunk for one, chunk in segment.chunks if one is prefill)
        self._memory.grow(prefill.kv, -num_planned)
        segment.chunks = [(one, chunk) for one, chunk in segment.chunks if one is not prefill]

    def stop(self, now: float) -> None:
        """The worker dies in the middle of a step: those before it have been taken."""
        segment, self.running = self.running, None
        if segment is None:
            return
        num_done = min(int((now - segment.started_at) / segment.step_s), segment.num_steps - 1)
        self._give_back(segment, segment.num_steps - num_done)
        if segment.decodes and num_done:
            self._batch.advance(num_done, segment.step_s, segment.started_at + num_done * segment.step_s)
