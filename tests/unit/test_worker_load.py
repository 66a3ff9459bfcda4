"""What routing knows of a worker: sums that never drift from what is there, and waits as a naive count gives them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shared.core.load import MAX_LATE_WORK_S, WorkerLoad
from shared.core.step_costs import StepCosts
from shared.core.types import SessionKey
from shared.profile_files import load_profile

COSTS = StepCosts.from_profile(load_profile("h100-qwen3-32b"), 2)
NOW = 1_000.0
keys = st.integers(0, 9).map(lambda number: SessionKey("t", f"s{number}"))
counts = st.integers(0, 5_000)


def make_load() -> WorkerLoad:
    return WorkerLoad("w", 1, "both", COSTS, num_kv_tokens=100_000)


class Bookkeeping(RuleBasedStateMachine):
    """Begin and end in any order, twice, or without the other, beside plain dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.load = make_load()
        self.now = NOW
        self.prefills: dict[SessionKey, tuple[int, float, float]] = {}
        self.decoding: dict[SessionKey, int] = {}
        self.active: dict[SessionKey, int] = {}

    @rule(key=keys, num_new=counts, work_s=st.floats(0.001, 20), due_s=st.floats(-5, 60), step_s=st.floats(0, 1))
    def begin_prefill(self, key: SessionKey, num_new: int, work_s: float, due_s: float, step_s: float) -> None:
        self.now += step_s
        self.load.begin_prefill(key, num_new, work_s, self.now + due_s, self.now)
        self.prefills[key] = (num_new, work_s, self.now + due_s)

    @rule(key=keys, step_s=st.floats(0, 1))
    def end_prefill(self, key: SessionKey, step_s: float) -> None:
        self.now += step_s
        self.load.end_prefill(key, self.now)
        self.prefills.pop(key, None)

    @rule(key=keys, num_tokens=counts)
    def begin_round(self, key: SessionKey, num_tokens: int) -> None:
        self.load.begin_round(key, num_tokens)
        self.active[key] = num_tokens
        self.decoding.pop(key, None)

    @rule(key=keys)
    def end_round(self, key: SessionKey) -> None:
        self.load.end_round(key)
        self.active.pop(key, None)
        self.decoding.pop(key, None)

    @rule(key=keys, num_tokens=counts)
    def begin_decoding(self, key: SessionKey, num_tokens: int) -> None:
        self.load.begin_decoding(key, num_tokens)
        self.decoding[key] = num_tokens

    @rule(key=keys)
    def end_decoding(self, key: SessionKey) -> None:
        self.load.end_decoding(key)
        self.decoding.pop(key, None)

    @invariant()
    def sums_are_of_what_is_there(self) -> None:
        load = self.load
        assert {key: (p.num_new_tokens, p.work_s, p.deadline) for key, p in load.prefills.items()} == self.prefills
        assert load.backlog_s == pytest.approx(sum(work_s for _, work_s, _ in self.prefills.values()), abs=1e-9)
        assert load.num_backlog_tokens == sum(num_new for num_new, _, _ in self.prefills.values())
        assert load.decoding == self.decoding
        assert load.num_context_tokens == sum(self.decoding.values())
        assert load.active == self.active
        assert load.num_active_tokens == sum(self.active.values())
        if not self.prefills:
            assert load.backlog_s == 0.0, "no drift is left behind"

    @invariant()
    def prefills_are_sorted_by_deadline(self) -> None:
        deadlines = [p.deadline for p in self.load.by_deadline]
        assert deadlines == sorted(deadlines)
        assert {id(p) for p in self.load.by_deadline} == {id(p) for p in self.load.prefills.values()}

    @invariant()
    def an_answer_is_of_what_is_there_now(self) -> None:
        fresh = replace(self.load)  # it has answered nothing yet
        for due_s in (2.0, 2.0, 20.0):
            asked = (NOW + due_s, self.now)
            assert self.load.wait_before_s(*asked) == fresh.wait_before_s(*asked)
        batch, context = len(self.decoding), sum(self.decoding.values()) / max(1, len(self.decoding))
        assert self.load.decode_step_s(1) == pytest.approx(COSTS.decode_step_s(batch + 1, context))

    @invariant()
    def waiting_is_never_more_than_the_backlog_nor_negative(self) -> None:
        for later_s in (0.0, 0.5, 100.0):
            wait_s = self.load.wait_s(self.now + later_s)
            assert -1e-9 <= wait_s <= self.load.backlog_s + 1e-9


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=60, stateful_step_count=40)


def wait_naively(
    prefills: list[tuple[float, float]], deadline: float, now: float, begun_s: float
) -> tuple[float, float]:
    """Serve by deadline; leave out who would be late; sum the work of those due no later; slack of the others.
    `begun_s` of the first one's work is done."""
    served: list[tuple[float, float]] = []
    for due, work_s in sorted(prefills, key=lambda one: one[0]):
        total_s = sum(work for _, work in served) + work_s
        if now - begun_s + total_s <= due:
            served.append((due, work_s))
    before = [work_s for due, work_s in served if due <= deadline]
    before_s = sum(before) - begun_s if before else 0.0
    slacks = [
        due - (now - begun_s + sum(work for _, work in served[: place + 1]))
        for place, (due, _) in enumerate(served)
        if due > deadline
    ]
    return max(0.0, before_s), min(slacks, default=float("inf"))


whole_seconds = st.tuples(st.integers(-2, 30), st.integers(1, 8))


@given(st.lists(whole_seconds, max_size=12, unique_by=lambda one: one[0]), st.integers(-2, 30), st.integers(0, 10))
def test_wait_before_a_deadline_is_what_a_naive_count_gives(
    drawn: list[tuple[int, int]], due_s: int, later_s: int
) -> None:
    load = make_load()
    for number, (due, work_s) in enumerate(drawn):
        load.begin_prefill(SessionKey("t", f"{number}"), 1, float(work_s), NOW + due, NOW)
    now = NOW + later_s
    first_s = load.by_deadline[0].work_s if drawn else 0.0
    expected = wait_naively(
        [(NOW + due, float(work_s)) for due, work_s in drawn], NOW + due_s, now, min(float(later_s), first_s)
    )
    assert load.wait_before_s(NOW + due_s, now) == pytest.approx(expected)


late_or_not = st.tuples(st.floats(-20, 60), st.floats(0.01, 25), st.integers(0, 5_000), st.booleans())


@given(st.lists(late_or_not, max_size=12))
def test_pressing_tokens_leave_out_the_rounds_that_are_late(drawn: list[tuple[float, float, int, bool]]) -> None:
    """A prefill is late when its work no longer fits before its deadline. Rounds without a prefill here press."""
    load = make_load()
    pressing = 0
    for number, (due_s, work_s, num_tokens, decodes_here) in enumerate(drawn):
        key = SessionKey("t", f"{number}")
        load.begin_prefill(key, 1, work_s, NOW + due_s, NOW)
        if decodes_here:
            load.begin_round(key, num_tokens)
            pressing += num_tokens if NOW + due_s >= NOW + work_s else 0
    load.begin_round(SessionKey("t", "decodes"), 700)
    assert load.count_pressing_tokens(NOW) == pressing + 700


def test_a_prefill_due_far_from_now_is_not_late() -> None:
    load = make_load()
    load.begin_round(SessionKey("t", "a"), 100)
    load.begin_prefill(SessionKey("t", "a"), 1, MAX_LATE_WORK_S + 20.0, NOW + MAX_LATE_WORK_S + 10.0, NOW)
    assert load.count_pressing_tokens(NOW) == 100


def test_what_is_predicted_is_corrected() -> None:
    load = make_load()
    load.prefill_correction, load.decode_correction = 1.5, 2.0
    assert load.prefill_s(0, 1_000) == pytest.approx(1.5 * COSTS.prefill_s(0, 1_000))
    assert load.work_s(0, 1_000) == pytest.approx(1.5 * COSTS.work_s(0, 1_000))
    assert load.decode_step_s(1) == pytest.approx(2.0 * COSTS.decode_step_s(1, 0.0))


def test_roles_say_what_a_worker_takes() -> None:
    taken = {}
    for role in ("prefill", "decode", "both"):
        load = WorkerLoad("w", 1, role, COSTS, num_kv_tokens=1)
        taken[role] = (load.takes_prefill, load.takes_decode)
    assert taken == {"prefill": (True, False), "decode": (False, True), "both": (True, True)}
