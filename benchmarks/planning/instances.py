"""Random problems of few GPUs: made-up profiles or parts of those that ship, made-up workloads and objectives."""

from __future__ import annotations

import random
from dataclasses import dataclass

from msgspec.structs import replace

from benchmarks.planning.packing import list_workers
from planner.planning.problem import make_problem
from planner.planning.program import PlanProblem
from planner.planning.workload_model import RoundShape, SessionShape, WorkloadModel
from shared.core.profile import Curve, DegreeProfile, Grid, Links, Profile
from shared.core.step_costs import StepCosts
from shared.errors import AmpdError
from shared.messages import Slo
from shared.profile_files import load_profile

SHIPPED = {
    "qwen3-32b": ("a100", "h100", "h20", "h200"),
    "llama-3.1-70b": ("h20", "h200", "h100"),
    "mixtral-8x7b": ("a100", "h100", "h200"),
}
DEGREES = (1, 2, 4, 8)
MOST_DEGREES = {1: 4, 2: 3}  # of a GPU type, by how many types there are: brute force tries every combination
KEPT_EMPTY = 0.05  # of the instances without a plan, which say little; the others are drawn again


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    number: int
    problem: PlanProblem
    description: str


def draw_instance(number: int, seed: int, max_gpus: int) -> Instance:
    draws = random.Random(f"{seed}/{number}")
    while True:
        try:
            instance = _draw(draws, number, max_gpus)
        except AmpdError:
            continue  # a profile whose workers fit no node, for one
        if next(list_workers(instance.problem), None) is not None or draws.random() < KEPT_EMPTY:
            return instance


def _draw(draws: random.Random, number: int, max_gpus: int) -> Instance:
    num_types = 1 if max_gpus < 2 else draws.choice((1, 1, 2))
    profiles = draw_shipped(draws, num_types) if draws.random() < 0.5 else draw_made_up(draws, num_types)
    gpus = _split(draws, draws.randint(max(num_types, max_gpus // 3), max_gpus), list(profiles))
    workload = draw_workload(draws, min(profile.max_context_tokens for profile in profiles.values()))
    slo = draw_slo(draws, profiles, workload)
    problem = make_problem(profiles, gpus, workload, slo, target=draws.choice((0.8, 0.9, 0.95)))
    degrees = {name: [one.parallel_degree for one in profile.degrees] for name, profile in profiles.items()}
    return Instance(number=number, problem=problem, description=f"{gpus} GPUs, degrees {degrees}")


def _split(draws: random.Random, num_gpus: int, names: list[str]) -> dict[str, int]:
    if len(names) == 1:
        return {names[0]: num_gpus}
    first = draws.randint(1, num_gpus - 1)
    return {names[0]: first, names[1]: num_gpus - first}


def draw_shipped(draws: random.Random, num_types: int) -> dict[str, Profile]:
    """Some of their degrees, and sometimes smaller nodes."""
    model, types = draws.choice(list(SHIPPED.items()))
    profiles = {}
    for gpu_type in draws.sample(types, num_types):
        profile = load_profile(f"{gpu_type}-{model}")
        most = min(MOST_DEGREES[num_types], len(profile.degrees))
        chosen = draws.sample(profile.degrees, draws.randint(min(2, most), most))
        degrees = tuple(sorted(chosen, key=lambda one: one.parallel_degree))
        links = replace(
            profile.links,
            devices_per_node=draws.choice((4, 8)),
            inter_node_bytes_per_s=profile.links.inter_node_bytes_per_s * draws.choice((1.0, 1.0, 0.02)),
        )
        profiles[gpu_type] = replace(profile, links=links, degrees=degrees)
    return profiles


def draw_made_up(draws: random.Random, num_types: int) -> dict[str, Profile]:
    kv_bytes = draws.choice((50_000, 200_000))
    profiles = {}
    for number in range(num_types):
        degrees = sorted(draws.sample(DEGREES, draws.randint(1, MOST_DEGREES[num_types])))
        token_s = 10 ** draws.uniform(-5.0, -3.5)
        profiles[f"made-up-{number}"] = Profile(
            name=f"made-up-{number}",
            model="made up",
            device="none",
            provenance={},
            max_context_tokens=8_192,
            vocab_size=1_000,
            kv_bytes_per_token=kv_bytes,
            host_kv_bytes=draws.choice((0, 4_000_000_000)),
            links=Links(
                devices_per_node=draws.choice((2, 4, 8)),
                intra_node_bytes_per_s=1e11,
                inter_node_bytes_per_s=10 ** draws.uniform(8.0, 10.5),
                host_bytes_per_s=2e10,
                latency_s=1e-5,
            ),
            degrees=tuple(_draw_degree(draws, degree, token_s) for degree in degrees),
        )
    return profiles


def _draw_degree(draws: random.Random, degree: int, token_s: float) -> DegreeProfile:
    """More devices are faster, by less than their number."""
    speed = degree ** draws.uniform(0.4, 1.0)
    least_s = draws.uniform(0.002, 0.02) / speed
    per_token_s = token_s / speed
    attended_s = per_token_s * 10 ** draws.uniform(-5.0, -4.0)  # a token and token of history
    return DegreeProfile(
        parallel_degree=degree,
        num_kv_tokens=round(degree * 10 ** draws.uniform(3.7, 5.0)),
        linear=Curve(at=(1, 256, 8_192), s=(least_s, least_s + 128 * per_token_s, least_s + 8_064 * per_token_s)),
        prefill_attention=Grid(
            rows=(0, 8_192),
            columns=(1, 8_192),
            s=((1e-4, 1e-4 + 3e7 * attended_s), (2e-4, 2e-4 + 9e7 * attended_s)),
        ),
        decode_attention=Grid(
            rows=(1, 256),
            columns=(1, 8_192),
            s=((1e-4, 1e-4 + 8_192 * attended_s), (2e-4, 2e-4 + 2e6 * attended_s)),
        ),
    )


def draw_workload(draws: random.Random, longest: int) -> WorkloadModel:
    """Sessions of one kind each: chat, short rounds, long documents, no output to speak of."""
    first = 10 ** draws.uniform(1.5, 4.0)
    later, output = 10 ** draws.uniform(0.5, 3.0), 10 ** draws.uniform(0.3, 2.7)
    most_rounds, gap_s = draws.randint(1, 12), 10 ** draws.uniform(-2.0, 1.5)
    sessions: list[SessionShape] = []
    for _ in range(draws.randint(3, 12)):
        history, rounds = 0, []
        for index in range(draws.randint(1, most_rounds)):
            new = max(1, round(draws.expovariate(1.0 / (later if index else first))))
            out = max(1, round(draws.expovariate(1.0 / output)))
            if history + new + out > longest:
                break
            rounds.append(RoundShape(history, new, out, draws.expovariate(1.0 / gap_s) if index else 0.0))
            history += new + out
        if rounds:
            sessions.append(tuple(rounds))
    if not sessions:
        sessions = [(RoundShape(0, 100, 10, 0.0),)]
    return WorkloadModel(sessions=tuple(sessions), sessions_per_s=1.0, burstiness=draws.choice((0.5, 1.0, 4.0)))


def draw_slo(draws: random.Random, profiles: dict[str, Profile], workload: WorkloadModel) -> Slo:
    """From hardly possible to ample, on the largest worker."""
    profile = draws.choice(list(profiles.values()))
    costs = StepCosts.from_profile(profile, profile.degrees[-1].parallel_degree)
    longest = max(costs.prefill_s(one.num_history_tokens, one.num_input_tokens) for s in workload.sessions for one in s)
    return Slo(
        ttft_s=longest * 10 ** draws.uniform(-0.3, 1.0),
        itl_s=costs.decode_step_s(1, 1_000) * 10 ** draws.uniform(0.0, 1.0),
    )
