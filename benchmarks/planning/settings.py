"""What is planned and simulated: model, workload and GPUs, with the objectives of the scheduling benchmark."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.scheduling.cells import make_cell
from loadgen.traces import read_trace
from loadgen.workload import choose_workload, plan_workload
from planner.planning.problem import make_problem
from planner.planning.program import PlanProblem
from planner.planning.simulated import Setting
from planner.planning.workload_model import model_sessions
from planner.simulator.scenario import choose_warm_up_s
from shared.core.policies import find_policy
from shared.messages import Slo

GPU_TYPE = "h100"
POLICY = "adaptive"
TARGET = 0.9


@dataclass(frozen=True, slots=True)
class Spec:
    model: str
    workload: str
    num_gpus: int

    @property
    def name(self) -> str:
        return f"{self.model}.{self.workload}.{self.num_gpus}"


SPECS = (
    Spec("qwen3-32b", "mooncake", 16),
    Spec("qwen3-32b", "hotpotqa", 8),
    Spec("qwen3-32b", "toolbench", 24),
    Spec("qwen3-32b", "claude_code", 32),
    Spec("llama-3.1-70b", "mooncake", 32),
    Spec("llama-3.1-70b", "hotpotqa", 16),
    Spec("llama-3.1-70b", "toolbench", 8),
    Spec("llama-3.1-70b", "claude_code", 24),
    Spec("mixtral-8x7b", "mooncake", 24),
    Spec("mixtral-8x7b", "hotpotqa", 32),
    Spec("mixtral-8x7b", "toolbench", 16),
    Spec("mixtral-8x7b", "claude_code", 8),
)
SMALL_SPECS = (
    Spec("qwen3-32b", "hotpotqa", 4),
    Spec("qwen3-32b", "hotpotqa", 6),
    Spec("qwen3-32b", "toolbench", 5),
    Spec("qwen3-32b", "mooncake", 6),
    Spec("mixtral-8x7b", "toolbench", 6),
    Spec("mixtral-8x7b", "mooncake", 6),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The problem's rate is 1 a second: what goodput maximises is not bounded by it."""

    problem: PlanProblem
    setting: Setting
    slo: Slo


def prepare(spec: Spec, traces: Path) -> Prepared:
    """As `ampd plan` does, with arrivals that are Poisson, as the simulated ones are."""
    cell = make_cell(f"{GPU_TYPE}-{spec.model}", spec.workload, traces)
    workload = replace(cell.workload, duration=None, sample=True)
    trace = list(read_trace(Path(workload.file), workload.format))
    sessions = plan_workload(choose_workload(trace, workload), workload).sessions
    model = model_sessions(sessions, 1.0)
    profiles = {GPU_TYPE: cell.profile}
    return Prepared(
        problem=make_problem(profiles, {GPU_TYPE: spec.num_gpus}, model, cell.slo, target=TARGET),
        setting=Setting(
            profiles=profiles,
            workload=workload,
            warm_up_s=choose_warm_up_s(sessions, cell.slo),
            rounds_per_session=model.num_rounds / len(model.sessions),
            policy=find_policy(POLICY),
            slo=cell.slo,
            target=TARGET,
        ),
        slo=cell.slo,
    )


def select(specs: tuple[Spec, ...], wanted: list[str]) -> tuple[Spec, ...]:
    """Those whose name contains one of `wanted`; all where nothing is."""
    return tuple(one for one in specs if not wanted or any(part in one.name for part in wanted))
