"""Re-planning over simulated workers: a shift of traffic changes roles, a steady load none, and nobody is lost."""

from __future__ import annotations

import random

from loadgen.plan import PlannedRound, PlannedSession
from planner.replanning.simulated import SimulatedReplanner
from planner.simulator.cluster import Cluster, WorkerGroup
from planner.simulator.outcome import summarise
from planner.simulator.simulation import Result, Simulation
from shared.core.policies import find_policy
from shared.messages import Slo
from shared.profile_files import load_profile

PROFILE = load_profile("h100-qwen3-32b")
SLO = Slo(ttft_s=3.0, itl_s=0.05)


def make_sessions(
    rate: float, since: float, until: float, num_input: int, num_output: int, seed: int
) -> list[PlannedSession]:
    rng, at, sessions = random.Random(seed), since, []
    while (at := at + rng.expovariate(rate)) < until:
        rounds = tuple(PlannedRound(num_input if not i else 200, num_output, 2.0 if i else 0.0) for i in range(3))
        sessions.append(PlannedSession(0, f"{since}-{len(sessions)}", at, rounds))
    return sessions


def make_simulation(sessions: list[PlannedSession], num_prefill: int, num_both: int) -> Simulation:
    numbered = [PlannedSession(i, s.session_id, s.arrival_s, s.rounds) for i, s in enumerate(sessions)]
    groups = (
        WorkerGroup(role="prefill", count=num_prefill, parallel_degree=2),
        WorkerGroup(role="both", count=num_both, parallel_degree=2),
    )
    return Simulation(Cluster(profile=PROFILE, groups=groups), find_policy("adaptive"), numbered, SLO)


def replan(simulation: Simulation) -> tuple[Result, SimulatedReplanner]:
    replanner = SimulatedReplanner(simulation, PROFILE, window_s=60.0)
    return simulation.run(), replanner


def test_a_shift_to_long_outputs_has_prefill_workers_decode_and_loses_no_round() -> None:
    before = make_sessions(2.0, 0.0, 60.0, 4_000, 20, 1)
    after = make_sessions(3.0, 60.0, 300.0, 500, 900, 2)
    result, replanner = replan(make_simulation([*before, *after], 2, 1))
    assert replanner.proposals
    assert all(change.role == "both" for _, proposal in replanner.proposals for change in proposal.changes)
    assert min(at for at, _ in replanner.proposals) > 60.0
    assert result.counters.role_changes == sum(len(proposal.changes) for _, proposal in replanner.proposals)
    assert len(result.rounds) == result.num_offered
    assert not [r for r in result.rounds if r.error]
    as_it_was = make_simulation([*before, *after], 2, 1).run()
    recovered, pressed = (summarise(one, SLO, warm_s=250.0, until_s=300.0).attainment for one in (result, as_it_was))
    assert recovered > 0.95 > pressed


def test_a_steady_load_changes_no_role() -> None:
    result, replanner = replan(make_simulation(make_sessions(1.0, 0.0, 900.0, 1_000, 100, 3), 1, 1))
    assert replanner.proposals == []
    assert result.counters.role_changes == 0
