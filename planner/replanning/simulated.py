"""Re-planning in the simulator: the same decisions as live, over simulated workers and rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.planning.worker_kinds import MeasuredKind
from planner.planning.workload_model import RoundShape
from planner.replanning.observed import ObservedWorkload
from planner.replanning.replanner import Proposal, Replanner, ReplanParameters
from planner.replanning.running import RunningWorker, pose_problem
from planner.simulator.outcome import attains
from planner.simulator.simulation import Simulation
from planner.simulator.worker import SimWorker
from shared.core.profile import Profile

INTERVAL_S = 10.0


@dataclass(slots=True)
class SimulatedReplanner:
    """Attach it to a simulation before that runs. `proposals`: (when, what) of all that asked for changes."""

    simulation: Simulation
    profile: Profile
    parameters: ReplanParameters = field(default_factory=ReplanParameters)
    window_s: float = 120.0
    proposals: list[tuple[float, Proposal]] = field(default_factory=list)
    _replanner: Replanner = field(init=False)
    _workload: ObservedWorkload = field(init=False)
    _num_seen: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._replanner = Replanner(self.parameters)
        self._workload = ObservedWorkload(self.window_s)
        self.simulation.every(INTERVAL_S, self._look)

    def _look(self, now: float) -> None:
        self._observe()
        model = self._workload.model(now)
        workers = [self._describe(worker) for worker in self.simulation.workers if worker.alive]
        if model is None or not workers:
            return
        profiles = {self.profile.name: self.profile}
        problem = pose_problem(workers, profiles, self._measure(), model, self.simulation.slo)
        proposal = self._replanner.propose(problem, workers, now, self._workload.attainment(now))
        if proposal.changes:
            for change in proposal.changes:
                self.simulation.change_role(change.worker_id, change.role, now)
            self._replanner.note_changed(len(proposal.changes), now)
            self.proposals.append((now, proposal))

    def _observe(self) -> None:
        ended = self.simulation.ended_rounds
        for round_ in ended[self._num_seen :]:
            if not round_.error:
                delay_s = round_.planned.delay_s if round_.index else 0.0
                shape = RoundShape(
                    round_.num_history, round_.planned.input_tokens, round_.planned.output_tokens, delay_s
                )
                on_time = attains(round_, self.simulation.slo)
                self._workload.add(str(round_.session.index), shape, round_.finished_at, on_time=on_time)
        self._num_seen = len(ended)

    def _describe(self, worker: SimWorker) -> RunningWorker:
        return RunningWorker(
            worker_id=worker.load.worker_id,
            gpu_type=self.profile.name,
            parallel_degree=worker.costs.parallel_degree,
            role=worker.load.role,
            num_kv_tokens=worker.load.num_active_tokens,
        )

    def _measure(self) -> Mapping[tuple[str, int], MeasuredKind]:
        return {
            (self.profile.name, worker.costs.parallel_degree): MeasuredKind(1.0, worker.costs.num_kv_tokens)
            for worker in self.simulation.workers
        }
