"""What routing knows of one worker: kept up to date by what is routed there and what ends, not by asking.

The coordinator and the simulator keep the same objects. Times are of one monotonic clock, in seconds.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from operator import attrgetter

from shared.core.chunk_prediction import predict_stretch
from shared.core.chunking import ChunkParameters
from shared.core.decoding_rounds import DecodingRounds
from shared.core.step_costs import StepCosts
from shared.core.types import SessionKey
from shared.messages import Role, WindowStats

MAX_LATE_WORK_S = 30.0  # a prefill due later than this from now is not late, whatever it takes
_EMPTY_WINDOW = WindowStats()
_DEADLINE = attrgetter("deadline")


@dataclass(slots=True, eq=False)
class PrefillLoad:
    """A prefill that was routed to a worker and has not ended. work_s: its share of the worker's time."""

    key: SessionKey
    num_new_tokens: int
    work_s: float
    deadline: float  # of its first token


@dataclass(slots=True, eq=False)
class WorkerLoad:
    """One worker, as far as decisions need to know it."""

    worker_id: str
    incarnation: int
    role: Role
    costs: StepCosts
    num_kv_tokens: int
    node: int = 0
    ttft: WindowStats = _EMPTY_WINDOW  # of its newest heartbeat
    itl: WindowStats = _EMPTY_WINDOW
    prefills: dict[SessionKey, PrefillLoad] = field(default_factory=dict)
    by_deadline: list[PrefillLoad] = field(default_factory=list)
    backlog_s: float = 0.0  # work of all of them
    num_backlog_tokens: int = 0
    progress_at: float = 0.0  # when the last of them ended, or the first came
    decoding: dict[SessionKey, int] = field(default_factory=dict)  # rounds that decode here, with their contexts
    num_context_tokens: int = 0
    num_promised_tokens: int = 0  # KV of the sessions bound here
    active: dict[SessionKey, int] = field(default_factory=dict)  # KV that each round in flight needs where it decodes
    num_active_tokens: int = 0
    num_sessions: int = 0
    prefill_correction: float = 1.0  # measured / predicted of the steps that prefill, a running mean
    decode_correction: float = 1.0  # of those that only decode
    # the last question to decode_step_s and its answer: binding asks every worker, and few have changed
    _step_asked: tuple[int, int, int, float, float, StepCosts] | None = field(default=None, init=False, repr=False)
    _step_s: float = field(default=0.0, init=False, repr=False)
    # the last question to stretch and its answer
    _stretch_asked: tuple[int, int, float, float, StepCosts, ChunkParameters] | None = field(
        default=None, init=False, repr=False
    )
    _stretch: float = field(default=1.0, init=False, repr=False)
    # the last question to wait_before_s and its answer: a decision asks twice
    _wait_asked: tuple[float, float, float] | None = field(default=None, init=False, repr=False)
    _waits: tuple[float, float] = field(default=(0.0, 0.0), init=False, repr=False)

    @property
    def takes_prefill(self) -> bool:
        return self.role != "decode"

    @property
    def takes_decode(self) -> bool:
        return self.role != "prefill"

    @property
    def mean_context(self) -> float:
        return self.num_context_tokens / len(self.decoding) if self.decoding else 0.0

    @property
    def kv_share(self) -> float:
        """KV promised to the sessions bound here, in units of the pool."""
        return self.num_promised_tokens / self.num_kv_tokens

    def has_room(self, num_tokens: int, now: float) -> bool:
        """For one more round that needs so much KV, beside those in flight."""
        if self.num_active_tokens + num_tokens <= self.num_kv_tokens:
            return True
        return self.count_pressing_tokens(now) + num_tokens <= self.num_kv_tokens

    def count_pressing_tokens(self, now: float) -> int:
        """KV that the rounds in flight need, those left out whose prefill is late already: they yield their room."""
        num_tokens = self.num_active_tokens
        for load in self.by_deadline:
            if load.deadline >= now + MAX_LATE_WORK_S:
                break
            if load.deadline < now + load.work_s:
                num_tokens -= self.active.get(load.key, 0)
        return num_tokens

    @property
    def active_share(self) -> float:
        """KV that the rounds in flight need, in units of the pool."""
        return self.num_active_tokens / self.num_kv_tokens

    @property
    def num_to_decode(self) -> int:
        """Rounds in flight that will decode here, and do not yet."""
        return len(self.active) - len(self.decoding)

    # ------------------------------------------------------------------------------ predictions

    def work_s(self, num_history: int, num_new: int) -> float:
        """Time that a prefill takes of the worker when steps are full: its tokens at the best rate, its attention."""
        return self.prefill_correction * self.costs.work_s(num_history, num_new)

    def prefill_s(self, num_history: int, num_new: int) -> float:
        """T_pre alone, corrected by what was measured here."""
        return self.prefill_correction * self.costs.prefill_s(num_history, num_new)

    def decode_step_s(self, num_more: int = 0) -> float:
        costs = self.costs
        asked = (num_more, len(self.decoding), self.num_context_tokens, self.decode_correction, costs.scale, costs)
        if asked != self._step_asked:
            batch = len(self.decoding) + num_more
            self._step_s = self.decode_correction * costs.decode_step_s(batch, self.mean_context)
            self._step_asked = asked
        return self._step_s

    def stretch(self, chunk: ChunkParameters, itl_slo_s: float) -> float:
        """How much longer the queue here takes beside the decodes than its work alone."""
        if not self.decoding:
            return 1.0
        costs = self.costs
        asked = (len(self.decoding), self.num_context_tokens, itl_slo_s, costs.scale, costs, chunk)
        if asked != self._stretch_asked:
            beside = DecodingRounds(len(self.decoding), self.mean_context, itl_slo_s)
            self._stretch = predict_stretch(chunk, costs, beside)
            self._stretch_asked = asked
        return self._stretch

    def wait_s(self, now: float) -> float:
        """Work ahead of a prefill that joins at the end."""
        if self.backlog_s <= 0.0:
            return 0.0
        head_s = self.by_deadline[0].work_s
        return self.backlog_s - min(now - self.progress_at, head_s)

    def wait_before_s(self, deadline: float, now: float, stretch: float = 1.0) -> tuple[float, float]:
        """(time of prefills that go before one with this deadline, the least slack of those that go after).

        `stretch`: how much longer than its work each takes, beside the decodes there. Prefills that are late already go
        after everybody who is not (see order_moore_hodgson): they count in neither.
        """
        asked = (deadline, now, stretch)
        if asked == self._wait_asked:
            return self._waits
        starts = finish = now
        least_slack_s = float("inf")
        if self.by_deadline:
            finish -= min(now - self.progress_at, self.by_deadline[0].work_s * stretch)
        for load in self.by_deadline:
            due, after = load.deadline, finish + load.work_s * stretch
            if after > due:
                continue
            finish = after
            if due <= deadline:
                starts = after
            elif due - after < least_slack_s:
                least_slack_s = due - after
        self._wait_asked, self._waits = asked, (max(0.0, starts - now), least_slack_s)
        return self._waits

    # ------------------------------------------------------------------------------ bookkeeping

    def begin_prefill(self, key: SessionKey, num_new: int, work_s: float, deadline: float, now: float) -> None:
        self.end_prefill(key, now)
        self._wait_asked = None
        if not self.prefills:
            self.progress_at = now
        load = PrefillLoad(key, num_new, work_s, deadline)
        self.prefills[key] = load
        insort(self.by_deadline, load, key=_DEADLINE)
        self.backlog_s += work_s
        self.num_backlog_tokens += num_new

    def end_prefill(self, key: SessionKey, now: float) -> None:
        load = self.prefills.pop(key, None)
        if load is None:
            return
        self._wait_asked = None
        index = bisect_left(self.by_deadline, load.deadline, key=_DEADLINE)
        while self.by_deadline[index] is not load:
            index += 1
        del self.by_deadline[index]
        self.progress_at = now
        self.num_backlog_tokens -= load.num_new_tokens
        self.backlog_s = self.backlog_s - load.work_s if self.prefills else 0.0

    def begin_round(self, key: SessionKey, num_tokens: int) -> None:
        """A round will decode here and needs KV of `num_tokens` until it ends."""
        self.end_round(key)
        self.active[key] = num_tokens
        self.num_active_tokens += num_tokens

    def end_round(self, key: SessionKey) -> None:
        self.num_active_tokens -= self.active.pop(key, 0)
        self.end_decoding(key)

    def begin_decoding(self, key: SessionKey, num_context_tokens: int) -> None:
        self.end_decoding(key)
        self.decoding[key] = num_context_tokens
        self.num_context_tokens += num_context_tokens

    def end_decoding(self, key: SessionKey) -> None:
        self.num_context_tokens -= self.decoding.pop(key, 0)


def transfer_s(source: WorkerLoad, destination: WorkerLoad, num_tokens: int) -> float:
    """T_kv: bytes over the slower end's link, and the latency; 0 for no tokens."""
    if num_tokens <= 0:
        return 0.0
    a, b = source.costs, destination.costs
    if source.node == destination.node:
        rate = min(a.node_bytes_per_s, b.node_bytes_per_s)
    else:
        rate = min(a.link_bytes_per_s, b.link_bytes_per_s)
    return a.latency_s + num_tokens * a.kv_bytes_per_token / rate
