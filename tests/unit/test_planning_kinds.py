"""What a worker does with a workload: the load of a session, a worker's modes, and problems that make no sense."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_samples import SLO, make_profile, make_session, make_toy_problem, make_workload

from planner.planning.problem import MAX_GPUS, make_problem
from planner.planning.worker_kinds import (
    FULL_CHUNK,
    ITL_SHARE,
    MAX_BATCH,
    WorkerKind,
    list_modes,
    measure_kind,
    measure_load,
    split_rounds,
)
from planner.planning.workload_model import RoundShape, WorkloadModel
from shared.core.profile import Profile
from shared.core.step_costs import StepCosts
from shared.errors import AmpdError, ErrorCode
from shared.messages import Slo
from shared.profile_files import load_profile

PROFILE = make_profile(host_kv_bytes=10**9)
TWO = make_workload(make_session((1_000, 100, 0.0), (300, 50, 4.0)), make_session((2_000, 10, 0.0)))


def kind_of(
    profile: Profile = PROFILE, degree: int = 1, workload: WorkloadModel = TWO, slo: Slo = SLO, gpu_type: str = "toy"
) -> WorkerKind:
    return measure_kind(gpu_type, profile, degree, workload, measure_load(workload, slo), slo)


# ------------------------------------------------------------------------------------------- load


def test_the_load_of_a_session_is_a_mean_over_the_sessions() -> None:
    load = measure_load(TWO, Slo(ttft_s=2.0, itl_s=0.05))
    assert load.rounds == {"first": 1.0, "later": 0.5, "again": 0.5}
    assert load.num_rounds == 1.5
    assert load.output_tokens == 160 / 2
    assert load.decode_context == pytest.approx((100 * 1_050 + 50 * 1_425 + 10 * 2_005) / 160)
    assert load.idle_token_s == 4.0 * 1_100 / 2, "the history, for as long as the tool runs"
    assert load.moved_tokens == {
        "first": (1_000 + 2_000) / 2,
        "later": (100 + 300) / 2,  # what the decode worker has produced, and the new input
        "again": 1_100 / 2,
    }


def test_room_is_kept_to_a_rounds_end_and_from_its_beginning() -> None:
    load = measure_load(TWO, Slo(ttft_s=2.0, itl_s=0.05))
    assert load.reserved_context == pytest.approx((100 * 1_100 + 50 * 1_450 + 10 * 2_010) / 160)
    assert load.waiting_token_s == pytest.approx(2.0 * (1_100 + 1_450 + 2_010) / 2)
    assert load.reserved_context > load.decode_context


def test_rounds_with_a_history_are_later_ones_whoever_saw_their_beginning() -> None:
    rounds = [RoundShape(0, 5, 1, 0.0), RoundShape(6, 7, 1, 1.0), RoundShape(900, 8, 1, 1.0)]
    first, later = split_rounds(rounds)
    assert (first, later) == (rounds[:1], rounds[1:])
    unseen = make_workload((RoundShape(500, 20, 30, 2.0),))
    load = measure_load(unseen, SLO)
    assert load.rounds == {"first": 0.0, "later": 1.0, "again": 1.0}
    assert load.moved_tokens == {"first": 0.0, "later": 50.0, "again": 500.0}
    assert kind_of(workload=unseen).work_s["first"] == 0.0


# ------------------------------------------------------------------------------------------- work


def test_work_is_that_of_full_steps_and_a_prefill_alone_takes_longer() -> None:
    costs = StepCosts.from_profile(PROFILE, 1)
    kind = kind_of()
    assert kind.work_s["first"] == pytest.approx((costs.work_s(0, 1_000) + costs.work_s(0, 2_000)) / 2)
    assert kind.work_s["later"] == pytest.approx(costs.work_s(1_100, 300) / 2)
    assert kind.work_s["again"] == pytest.approx((costs.work_s(0, 1_400) - costs.work_s(1_100, 300)) / 2)
    assert kind.alone_s["first"] == pytest.approx((costs.prefill_s(0, 1_000) + costs.prefill_s(0, 2_000)) / 2)
    assert kind.alone_s["later"] == costs.prefill_s(1_100, 300)
    assert kind.alone_s["again"] == costs.prefill_s(0, 1_400)
    assert kind.alone_s["first"] > kind.work_s["first"], "its step is not full, and takes what a step takes at least"


def test_a_session_of_one_round_has_no_later_work() -> None:
    kind = kind_of(workload=make_workload(make_session((1_000, 10, 0.0))))
    assert (kind.work_s["later"], kind.work_s["again"]) == (0.0, 0.0)
    assert (kind.late_share["later"], kind.alone_s["later"]) == (0.0, 0.0)


def test_late_shares_are_of_the_rounds_that_take_too_long_alone() -> None:
    workload = make_workload(*(make_session((size, 10, 0.0)) for size in (100, 1_000, 2_000, 4_000)))
    costs = StepCosts.from_profile(PROFILE, 1)
    for size, share in ((100, 0.75), (1_000, 0.5), (2_000, 0.25), (4_000, 0.0)):
        slo = Slo(ttft_s=costs.prefill_s(0, size), itl_s=0.05)
        assert kind_of(workload=workload, slo=slo).late_share["first"] == share, "exactly on time is on time"


@pytest.mark.parametrize("name", ["h100-qwen3-32b", "h20-llama-3.1-70b", "h200-mixtral-8x7b"])
def test_computing_a_history_again_is_never_free(name: str) -> None:
    profile = load_profile(name)
    workload = make_workload(make_session((2_000, 100, 0.0), (50, 100, 1.0), (900, 20, 1.0)), make_session((9, 9, 0.0)))
    for degree in profile.degrees:
        kind = kind_of(profile, degree.parallel_degree, workload)
        assert kind.work_s["again"] > 0.0
        assert 0.0 < kind.work_s["later"] < kind.work_s["again"]


def test_memory_says_who_can_decode_and_who_can_prefill() -> None:
    """The longest session has 2,010 tokens."""
    for num_kv_tokens, can_prefill, can_decode in ((2_010, True, True), (2_009, True, False), (1_000, False, False)):
        kind = kind_of(make_profile(kv_tokens={1: num_kv_tokens}))
        assert (kind.can_prefill, kind.can_decode) == (can_prefill, can_decode)
        assert kind.num_kv_tokens == num_kv_tokens


def test_host_memory_is_that_of_all_devices_of_a_worker() -> None:
    assert kind_of(degree=1).num_host_tokens == 10_000
    assert kind_of(degree=4).num_host_tokens == 40_000
    assert kind_of(make_profile()).num_host_tokens == 0
    assert kind_of(degree=4, gpu_type="h9").name == "h9 x 4"


# ------------------------------------------------------------------------------------------ modes

slos = st.floats(0.012, 0.2)
contexts = st.integers(10, 30_000)


@given(slos, contexts, st.sampled_from((1, 2, 4)))
def test_every_mode_keeps_to_the_objective_and_promises_no_more_than_a_step_does(
    itl_s: float, context: int, degree: int
) -> None:
    workload = make_workload(make_session((context, 20, 0.0)))
    load = measure_load(workload, Slo(ttft_s=1.0, itl_s=itl_s))
    costs = StepCosts.from_profile(PROFILE, degree)
    prefill_only, *modes = list_modes(costs, load, itl_s)
    assert (prefill_only.batch, prefill_only.prefill_share, prefill_only.tokens_per_s) == (0, 1.0, 0.0)
    for mode in modes:
        assert 1 <= mode.batch <= MAX_BATCH
        assert mode.step_s <= ITL_SHARE * itl_s * (1 + 1e-9)
        assert 0.0 <= mode.prefill_share <= 1.0
        decode_s = costs.decode_step_s(mode.batch, load.decode_context)
        if mode.prefill_share == 0.0:
            assert mode.step_s == decode_s
        else:
            assert mode.step_s > decode_s, "the chunk takes time too"
            history = round(load.decode_context)
            most_work_s = costs.work_s(history, costs.largest_chunk(mode.batch, history, history, mode.step_s) + 17)
            assert mode.prefill_share * mode.step_s <= most_work_s
    assert bool(modes) == (costs.decode_step_s(1, load.decode_context) <= ITL_SHARE * itl_s)


def test_the_largest_batch_that_keeps_to_the_objective_is_a_mode() -> None:
    load = measure_load(TWO, SLO)
    costs = StepCosts.from_profile(PROFILE, 1)
    for itl_s in (0.0137, 0.0151, 0.02):
        batches = [mode.batch for mode in list_modes(costs, load, itl_s)]
        largest = max(batches)
        assert costs.decode_step_s(largest, load.decode_context) <= ITL_SHARE * itl_s
        assert largest == MAX_BATCH or costs.decode_step_s(largest + 1, load.decode_context) > ITL_SHARE * itl_s
    assert max(mode.batch for mode in list_modes(costs, load, 10.0)) == MAX_BATCH


def test_a_looser_objective_leaves_more_room_beside_a_batch() -> None:
    load = measure_load(TWO, SLO)
    costs = StepCosts.from_profile(PROFILE, 1)

    def share_beside(batch: int, itl_s: float) -> float:
        return max(mode.prefill_share for mode in list_modes(costs, load, itl_s) if mode.batch == batch)

    shares = [share_beside(8, itl_s) for itl_s in (0.015, 0.02, 0.05, 0.2)]
    assert shares == sorted(shares)
    assert shares[0] < 0.5 < shares[-1]
    longest_s = max(mode.step_s for mode in list_modes(costs, load, 100.0) if mode.batch)
    assert longest_s <= costs.step_s(MAX_BATCH, load.decode_context, [(round(load.decode_context), FULL_CHUNK)])


def test_nobody_decodes_under_an_objective_that_one_step_misses() -> None:
    kind = kind_of(slo=Slo(ttft_s=1.0, itl_s=0.001))
    assert (len(kind.modes), kind.can_decode, kind.can_prefill) == (1, False, True)


# ---------------------------------------------------------------------------------------- problems


def test_a_problem_has_a_kind_of_each_degree_and_type() -> None:
    profiles = {"a": make_profile("a"), "b": make_profile("b", kv_tokens={2: 9_000})}
    workload = make_workload(rate=3.0, burstiness=4.0)
    problem = make_problem(profiles, {"a": 4, "b": 2}, workload, SLO, target=0.8)
    assert [kind.name for kind in problem.kinds] == ["a x 1", "a x 2", "a x 4", "b x 2"]
    assert (problem.rate, problem.target, problem.gpus) == (3.0, 0.8, {"a": 4, "b": 2})
    assert problem.variability == 2.5, "arrivals of 4, service of 1"


def test_no_worker_spans_nodes() -> None:
    problem = make_toy_problem(8, profile=make_profile(devices_per_node=2))
    assert [kind.parallel_degree for kind in problem.kinds] == [1, 2]


@pytest.mark.parametrize(
    ("profiles", "gpus", "target", "named"),
    [
        ({"a": make_profile("a")}, {}, 0.9, "--gpus N"),
        ({"a": make_profile("a")}, {"a": 0}, 0.9, "GPUs of a must be 1 to 65536, got 0"),
        ({"a": make_profile("a")}, {"a": MAX_GPUS + 1}, 0.9, "got 65537"),
        ({"a": make_profile("a")}, {"a": -1}, 0.9, "got -1"),
        ({"a": make_profile("a")}, {"a": 4}, 1.0, "between 0 and 1, got 1"),
        ({"a": make_profile("a")}, {"a": 4}, 0.0, "between 0 and 1, got 0"),
        (
            {"a": make_profile("a"), "b": make_profile("b", model="toy/other")},
            {"a": 4, "b": 4},
            0.9,
            r"profiles a and b differ in model \(toy/model and toy/other\)",
        ),
        (
            {"a": make_profile("a"), "b": msgspec.structs.replace(make_profile("b"), kv_bytes_per_token=1)},
            {"a": 4, "b": 4},
            0.9,
            r"differ in kv_bytes_per_token \(100000 and 1\)",
        ),
        (
            {"a": make_profile("a", kv_tokens={2: 100, 3: 200})},
            {"a": 4},
            0.9,
            "parallel degree of 3 is no multiple of 2",
        ),
        ({"a": make_profile("a", kv_tokens={2: 100, 1: 50, 6: 900, 4: 500})}, {"a": 4}, 0.9, "6 is no multiple of 4"),
        (
            {"a": make_profile("a", kv_tokens={4: 100}, devices_per_node=2)},
            {"a": 4},
            0.9,
            r"smallest parallel degree is 4, its nodes have 2 GPUs",
        ),
    ],
)
def test_a_problem_that_makes_no_sense_says_which_number(
    profiles: dict[str, Profile], gpus: dict[str, int], target: float, named: str
) -> None:
    with pytest.raises(AmpdError, match=named) as caught:
        make_problem(profiles, gpus, TWO, SLO, target=target)
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_a_rate_beyond_any_cluster_is_refused() -> None:
    with pytest.raises(AmpdError, match=r"the rate must be at most 1e\+06 sessions/s, got 1e\+12") as caught:
        make_toy_problem(4, workload=make_workload(rate=1e12))
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_a_degree_that_the_profile_does_not_have_is_refused() -> None:
    with pytest.raises(AmpdError, match="choose one of 1, 2, 4"):
        kind_of(degree=3)
