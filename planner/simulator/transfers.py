"""KV that goes from worker to worker without being asked for: of remote prefills, and of sessions whose tool runs."""

from __future__ import annotations

from planner.simulator.bindings import Bindings
from planner.simulator.event_heap import EventHeap
from planner.simulator.kv_memory import SimKv
from planner.simulator.links import Links
from planner.simulator.placement import Placement
from planner.simulator.round_book import Counters
from planner.simulator.rounds import SimRound, SimSession
from planner.simulator.worker import SimWorker
from shared.core.load import transfer_s

RETRY_S = 0.02
MAX_RETRIES = 100
MIN_STAGED_TOKENS = 64


class HandOvers:
    """Remote prefills that are done: their KV goes to the decode worker, most of it while it was computed."""

    def __init__(self, events: EventHeap, links: Links, placement: Placement) -> None:
        self._events = events
        self._links = links
        self._placement = placement

    def begin(self, round_: SimRound, source: SimWorker, kv: SimKv, now: float, retries: int = 0) -> None:
        decode = round_.decode
        held = decode.memory.entries[round_.session]
        num_moved = round_.num_prompt + max(0, round_.num_produced - 1) - held.num_tokens
        if not decode.take_kv(round_, now):
            if retries < MAX_RETRIES:
                self._events.at(now + RETRY_S, self._retry, (round_, round_.attempt, source, kv, retries + 1))
                return
            source.release_remote(kv, now)
            self._placement.place_locally(round_, source, now)
            return
        num_bytes = num_moved * source.costs.kv_bytes_per_token
        round_.kv_bytes_written += num_bytes
        done_at = self._links.transfer(source, decode, num_moved, now, now - round_.started_at)
        round_.transfer_s += done_at - now
        self._events.at(done_at, self._end, (round_, round_.attempt, source, kv))

    def _retry(self, argument: tuple[SimRound, int, SimWorker, SimKv, int], now: float) -> None:
        round_, attempt, source, kv, retries = argument
        if self._goes_on(round_, attempt, source, kv, now):
            self.begin(round_, source, kv, now, retries)
        else:
            source.release_remote(kv, now)

    def _goes_on(self, round_: SimRound, attempt: int, source: SimWorker, kv: SimKv, now: float) -> bool:
        """Whether the KV that `source` sends is still there and still wanted; if it is gone, the round starts again."""
        if attempt != round_.attempt or round_.error:
            return False
        if not source.memory.holds(kv):
            self._placement.restart(round_, source, now)
            return False
        return True

    def _end(self, argument: tuple[SimRound, int, SimWorker, SimKv], now: float) -> None:
        round_, attempt, source, kv = argument
        goes_on = self._goes_on(round_, attempt, source, kv, now)
        source.release_remote(kv, now)
        if not goes_on:
            return
        round_.note_token(now)
        self._placement.note_decoding(round_)
        if round_.num_produced >= round_.planned.output_tokens:
            round_.decode.end_round(round_, now)
        else:
            round_.decode.join(round_, now)


class Staging:
    """`gap_factor`: tool times are mispredicted by it."""

    def __init__(
        self, events: EventHeap, links: Links, bindings: Bindings, counters: Counters, gap_factor: float
    ) -> None:
        self._events = events
        self._links = links
        self._bindings = bindings
        self._counters = counters
        self._gap_factor = gap_factor

    def stage(self, session: SimSession, now: float) -> None:
        """While the tool runs, the KV that the holder of the session's prefix lacks moves there."""
        if not session.resident or session.decode is None:
            return
        worker_id = max(session.resident, key=lambda one: (session.resident[one], one))
        holder, decode = self._bindings.by_id[worker_id], session.decode
        kv = holder.memory.entries.get(session)
        source = decode.memory.entries.get(session)
        if holder is decode or not holder.load.takes_prefill or kv is None or source is None or kv.busy or source.busy:
            return
        num_tokens = source.num_tokens - kv.num_tokens
        if num_tokens < MIN_STAGED_TOKENS or self._links.idle_at(decode, holder) > now:
            return
        if transfer_s(decode.load, holder.load, num_tokens) > session.gaps.mean_s * self._gap_factor:
            return
        if not holder.memory.make_room(num_tokens, now, evict=False):
            return
        kv = holder.memory.hold(session)
        source = decode.memory.hold(session)
        holder.memory.grow(kv, num_tokens)
        done_at = self._links.transfer(decode, holder, num_tokens, now, 0.0)
        self._counters.staged += 1
        self._counters.staged_tokens += num_tokens
        self._events.at(done_at, self._staged, (session, holder, kv, decode, source))

    def _staged(self, argument: tuple[SimSession, SimWorker, SimKv, SimWorker, SimKv], now: float) -> None:
        session, holder, kv, decode, source = argument
        holder.memory.release(kv, now)
        decode.memory.release(source, now)
        if holder.memory.holds(kv):
            session.resident[holder.load.worker_id] = kv.num_tokens
