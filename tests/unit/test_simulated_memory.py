"""The simulated worker's KV memory, and what its queue believes of a prefill that has lost its room."""

from __future__ import annotations

import pytest

from loadgen.plan import PlannedRound, PlannedSession
from planner.simulator.kv_memory import KvMemory, SimKv
from planner.simulator.prefill_queue import PrefillQueue, SimPrefill
from planner.simulator.rounds import SimRound, SimSession
from shared.core.load import WorkerLoad
from shared.core.policies import POLICIES
from shared.core.reordering import WaitingPrefill
from shared.core.step_costs import StepCosts
from shared.core.types import RoundKey
from shared.profile_files import load_profile

COSTS = StepCosts.from_profile(load_profile("h100-qwen3-32b"), 2)


def make_memory(capacity: int = 1_000, host: int = 500) -> KvMemory:
    return KvMemory(capacity, host, POLICIES["adaptive"], COSTS, "w")


def make_session(index: int) -> SimSession:
    rounds = (PlannedRound(input_tokens=100, output_tokens=10, delay_s=1.0),)
    return SimSession(PlannedSession(index=index, session_id=str(index), arrival_s=0.0, rounds=rounds))


def keep(memory: KvMemory, index: int, num_tokens: int, *, idle: bool = True) -> SimKv:
    kv = memory.hold(make_session(index))
    memory.grow(kv, num_tokens)
    if idle:
        memory.release(kv, float(index))
    return kv


@pytest.mark.parametrize(("asked", "granted"), [(300, True), (900, True), (901, False)])
def test_idle_sessions_lose_only_what_makes_enough_room(asked: int, granted: bool) -> None:
    memory = make_memory()
    busy, idle = keep(memory, 0, 100, idle=False), [keep(memory, index, 300) for index in (1, 2)]
    assert memory.make_room(asked, 10.0) is granted
    assert busy.num_tokens == 100
    lost = 600 - sum(kv.num_tokens for kv in idle)
    assert lost == (max(0, asked - 300) if granted else 0)
    memory.check_integrity()


def test_what_follows_a_hole_is_given_up() -> None:
    """A prefill has part of its history in host memory, and loses the part before it for which there is no room."""
    memory = make_memory(host=100)
    kv = keep(memory, 0, 400, idle=False)
    kv.num_host_tokens = memory.num_host_used = 100
    memory.swap_out(kv, 0.0)
    assert (kv.num_tokens, kv.num_host_tokens) == (0, 0)
    memory.check_integrity()


def test_the_work_of_a_prefill_is_what_is_to_be_computed() -> None:
    """Placed with 200 new tokens; its KV goes, half of it to host memory: now there are thousands to compute."""
    memory = make_memory(capacity=100_000)
    session = make_session(0)
    planned = session.planned.rounds[0]
    round_ = SimRound(session, 0, planned, 0.0, 1.0, None)  # type: ignore[arg-type]
    kv = memory.hold(session)
    load = WorkerLoad("w", 1, "both", COSTS, num_kv_tokens=100_000)
    round_.work_s = load.work_s(10_000, 200)
    waiting = WaitingPrefill(RoundKey("t", "s", 0, 1), 0.0, 0.0, 1.0, round_.work_s)
    prefill = SimPrefill(round_, waiting, kv, 10_200, 0.0, True, round_.work_s)
    kv.num_host_tokens = 5_000
    prefill.predict_again(load)
    assert waiting.work_s == load.work_s(5_000, 5_200)
    queue = PrefillQueue()
    queue.begin(prefill)
    memory.grow(kv, 5_000)  # it is back
    kv.num_host_tokens = 0
    memory.grow(kv, 2_600)
    prefill.note_progress()
    assert waiting.work_s == pytest.approx(load.work_s(5_000, 5_200) / 2)
