"""The KV memory of one simulated worker: device memory, a host tier, and who loses what when there is no room."""

from __future__ import annotations

from dataclasses import dataclass

from planner.simulator.rounds import SimSession
from shared.core.policies import SchedulingPolicy
from shared.core.retention import IdleKv, choose_victim
from shared.core.step_costs import StepCosts


@dataclass(slots=True, eq=False)
class SimKv(IdleKv[SimSession]):
    """KV of one session here: positions [0, num_tokens) in device memory, the next num_host_tokens in host memory."""

    num_host_tokens: int = 0
    busy: int = 0  # a round or a transfer uses it: not to be evicted
    is_resident: bool = False  # kept for a session that is bound elsewhere


class KvMemory:
    """Counts tokens. Invariant: num_used is the device tokens of every entry, and never above capacity."""

    def __init__(
        self, capacity: int, host_capacity: int, policy: SchedulingPolicy, costs: StepCosts, worker_id: str
    ) -> None:
        self.capacity = capacity
        self.host_capacity = host_capacity if policy.host_tier else 0
        self.num_used = 0
        self.num_host_used = 0
        self.entries: dict[SimSession, SimKv] = {}
        self.idle: dict[SimSession, SimKv] = {}  # with device tokens that nobody uses
        self.num_idle = 0  # these tokens
        self.num_evicted_tokens = 0
        self.host_free_at = 0.0
        self._policy = policy
        self._costs = costs
        self._worker_id = worker_id

    @property
    def num_free(self) -> int:
        return self.capacity - self.num_used

    def hold(self, session: SimSession) -> SimKv:
        """The session's entry, busy from now on."""
        kv = self.entries.get(session)
        if kv is None:
            kv = self.entries[session] = SimKv(session, 0, 0.0, 0.0, 0.0)
        if self.idle.pop(session, None) is not None:
            self.num_idle -= kv.num_tokens
        kv.busy += 1
        return kv

    def release(self, kv: SimKv, now: float) -> None:
        """One user less; without any the entry is idle."""
        kv.busy -= 1
        if kv.busy or not self.holds(kv):
            return
        if kv.num_tokens == 0 and kv.num_host_tokens == 0:
            self.forget(kv.key)
            return
        kv.idle_since = now
        kv.mean_gap_s = kv.key.gaps.mean_s
        if self._policy.retention == "expected_return":
            kv.restore_s = self._restore_s(kv)
        if kv.num_tokens:
            self.idle[kv.key] = kv
            self.num_idle += kv.num_tokens

    def holds(self, kv: SimKv) -> bool:
        """Whether it is still there: the worker may have died since."""
        return self.entries.get(kv.key) is kv

    def grow(self, kv: SimKv, num_tokens: int) -> None:
        kv.num_tokens += num_tokens
        self.num_used += num_tokens

    def shrink(self, kv: SimKv, num_tokens: int) -> None:
        """Forget the device tokens behind position `num_tokens`."""
        if kv.num_tokens > num_tokens:
            self.num_used -= kv.num_tokens - num_tokens
            kv.num_tokens = num_tokens

    def forget(self, session: SimSession) -> None:
        kv = self.entries.pop(session, None)
        if kv is not None:
            self.num_used -= kv.num_tokens
            self.num_host_used -= kv.num_host_tokens
            if self.idle.pop(session, None) is not None:
                self.num_idle -= kv.num_tokens
            kv.num_tokens = kv.num_host_tokens = 0
            session.resident.pop(self._worker_id, None)

    def make_room(self, num_tokens: int, now: float, *, evict: bool = True) -> bool:
        """Free room for `num_tokens`, at the cost of idle sessions; False, and none loses anything, when that is not
        enough."""
        if self.capacity - self.num_used >= num_tokens:
            return True
        if not evict or not self.has_room(num_tokens):
            return False
        while self.capacity - self.num_used < num_tokens:
            victim = choose_victim(self.idle.values(), now, self._policy.retention)
            assert isinstance(victim, SimKv)
            self._evict(victim, num_tokens - (self.capacity - self.num_used), now)
        return True

    def has_room(self, num_tokens: int) -> bool:
        """For so many, if idle sessions lose theirs."""
        return self.capacity - self.num_used + self.num_idle >= num_tokens

    def _evict(self, victim: SimKv, num_missing: int, now: float) -> None:
        """Take from the tail what is missing; with a host tier it goes there."""
        num_tokens = min(victim.num_tokens, num_missing)
        self.num_evicted_tokens += num_tokens
        self.num_idle -= num_tokens
        self.shrink(victim, victim.num_tokens - num_tokens)
        if self.host_capacity and not victim.is_resident and self._make_host_room(num_tokens, victim, now):
            victim.num_host_tokens += num_tokens
            self.num_host_used += num_tokens
            self.use_host_link(num_tokens, now)
        elif victim.num_host_tokens:  # what follows a hole is of no use
            self.num_host_used -= victim.num_host_tokens
            victim.num_host_tokens = 0
        if victim.is_resident:
            victim.key.resident[self._worker_id] = victim.num_tokens
        if victim.num_tokens == 0:
            if victim.num_host_tokens:
                del self.idle[victim.key]  # nothing left to take here
            else:
                self.forget(victim.key)

    def _make_host_room(self, num_tokens: int, keep: SimKv, now: float) -> bool:
        while self.host_capacity - self.num_host_used < num_tokens:
            out = [kv for kv in self.entries.values() if kv.num_host_tokens and not kv.busy and kv is not keep]
            victim = choose_victim(out, now, self._policy.retention)
            if victim is None:
                return False
            assert isinstance(victim, SimKv)
            self.num_host_used -= victim.num_host_tokens
            victim.num_host_tokens = 0
            if victim.num_tokens == 0:
                self.forget(victim.key)
        return True

    def use_host_link(self, num_tokens: int, now: float) -> float:
        """When the link to host memory has moved `num_tokens`."""
        duration_s = num_tokens * self._costs.kv_bytes_per_token / self._costs.host_bytes_per_s
        self.host_free_at = max(self.host_free_at, now) + duration_s
        return self.host_free_at

    def restore(self, kv: SimKv, now: float) -> float | None:
        """Bring the host tokens back: when that is done, None if there is no room now."""
        num_tokens = kv.num_host_tokens
        if not self.make_room(num_tokens, now):
            return None
        self.num_host_used -= num_tokens
        kv.num_host_tokens = 0
        self.grow(kv, num_tokens)
        return self.use_host_link(num_tokens, now)

    def swap_out(self, kv: SimKv, now: float) -> None:
        """A running round loses its device memory: to host memory if there is some, else altogether."""
        num_tokens = kv.num_tokens
        if self.host_capacity and self._make_host_room(num_tokens, kv, now):
            kv.num_host_tokens += num_tokens
            self.num_host_used += num_tokens
            self.use_host_link(num_tokens, now)
        elif kv.num_host_tokens:  # what follows a hole is of no use
            self.num_host_used -= kv.num_host_tokens
            kv.num_host_tokens = 0
        self.shrink(kv, 0)

    def _restore_s(self, kv: SimKv) -> float:
        num_tokens = kv.num_tokens + kv.num_host_tokens
        if self.host_capacity:
            return num_tokens * self._costs.kv_bytes_per_token / self._costs.host_bytes_per_s
        return self._costs.prefill_s(0, num_tokens)

    def check_integrity(self) -> None:
        assert self.num_used == sum(kv.num_tokens for kv in self.entries.values())
        assert self.num_host_used == sum(kv.num_host_tokens for kv in self.entries.values())
        assert 0 <= self.num_used <= self.capacity
        assert all(not kv.busy for kv in self.idle.values())
        assert self.num_idle == sum(kv.num_tokens for kv in self.idle.values())
