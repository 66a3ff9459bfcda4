"""Small made-up planning problems: profiles of round numbers, a few sessions, and random ones by their seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from planner.planning.problem import make_problem
from planner.planning.program import PlanProblem
from planner.planning.workload_model import RoundShape, SessionShape, WorkloadModel
from shared.core.profile import Curve, DegreeProfile, Grid, Links, Profile
from shared.messages import Slo

SLO = Slo(ttft_s=0.5, itl_s=0.05)
KV_TOKENS = {1: 40_000, 2: 100_000, 4: 220_000}


def make_profile(
    name: str = "toy",
    *,
    kv_tokens: Mapping[int, int] = KV_TOKENS,
    speed: float = 1.0,
    devices_per_node: int = 8,
    link_bytes_per_s: float = 25e9,
    host_kv_bytes: int = 0,
    model: str = "toy/model",
) -> Profile:
    """kv_tokens: {parallel degree: tokens of its KV memory}. Steps of degree n are n ** 0.8 times as fast."""
    return Profile(
        name=name,
        model=model,
        device="toy",
        provenance={},
        max_context_tokens=131_072,
        vocab_size=1_000,
        kv_bytes_per_token=100_000,
        host_kv_bytes=host_kv_bytes,
        links=Links(
            devices_per_node=devices_per_node,
            intra_node_bytes_per_s=100e9,
            inter_node_bytes_per_s=link_bytes_per_s,
            host_bytes_per_s=20e9,
            latency_s=1e-5,
        ),
        degrees=tuple(
            _make_degree(degree, num_tokens, speed * degree**0.8) for degree, num_tokens in kv_tokens.items()
        ),
    )


def _make_degree(degree: int, num_kv_tokens: int, speed: float) -> DegreeProfile:
    histories, chunks, batches, contexts = (0, 50_000), (1, 4_096, 16_384), (1, 256), (0, 50_000)
    tokens = (1, 128, 2_048, 16_384)
    return DegreeProfile(
        parallel_degree=degree,
        num_kv_tokens=num_kv_tokens,
        linear=Curve(at=tokens, s=tuple((0.012 + 4e-5 * max(0, n - 100)) / speed for n in tokens)),
        prefill_attention=Grid(
            rows=histories,
            columns=chunks,
            s=tuple(tuple((1e-4 + 1e-9 * n * (h + n / 2)) / speed for n in chunks) for h in histories),
        ),
        decode_attention=Grid(
            rows=batches,
            columns=contexts,
            s=tuple(tuple((1e-4 + 1e-8 * batch * context) / speed for context in contexts) for batch in batches),
        ),
    )


def make_session(*rounds: tuple[int, int, float]) -> SessionShape:
    """Rounds of (input tokens, output tokens, delay in seconds)."""
    num_history, shapes = 0, []
    for num_input, num_output, delay_s in rounds:
        shapes.append(RoundShape(num_history, num_input, num_output, delay_s))
        num_history += num_input + num_output
    return tuple(shapes)


def make_workload(*sessions: SessionShape, rate: float = 1.0, burstiness: float = 1.0) -> WorkloadModel:
    some = sessions or (make_session((1_000, 100, 0.0), (300, 80, 2.0)), make_session((2_000, 50, 0.0)))
    return WorkloadModel(sessions=some, sessions_per_s=rate, burstiness=burstiness)


def make_toy_problem(
    num_gpus: int = 4,
    *,
    profile: Profile | None = None,
    workload: WorkloadModel | None = None,
    slo: Slo = SLO,
    target: float = 0.9,
) -> PlanProblem:
    profiles = {"toy": profile or make_profile()}
    return make_problem(profiles, {"toy": num_gpus}, workload or make_workload(), slo, target=target)


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    profiles: dict[str, Profile]
    gpus: dict[str, int]
    workload: WorkloadModel
    slo: Slo
    target: float

    @property
    def problem(self) -> PlanProblem:
        return make_problem(self.profiles, self.gpus, self.workload, self.slo, target=self.target)


def make_random_problem(seed: int, *, most_gpus: int) -> PlanProblem:
    return draw_request(seed, most_gpus=most_gpus).problem


def draw_request(seed: int, *, most_gpus: int) -> PlanRequest:
    """One or two GPU types, whole and partial nodes; memory, links, hosts and objectives from scarce to plenty. Some
    cannot be served at all."""
    draws = random.Random(f"plan/{seed}")
    num_types = 1 if draws.random() < 0.6 else 2
    numbers = _split(draws.randint(1, most_gpus), num_types, draws)
    profiles: dict[str, Profile] = {}
    gpus: dict[str, int] = {}
    for index, number in enumerate(numbers):
        degrees = draws.choice(
            ((1, 2, 4), (1, 2, 4), (2, 4), (1, 4), (1, 2, 4, 8)) if num_types == 1 else ((1, 2), (2, 4))
        )
        room = 10 ** draws.uniform(4.3, 6.0)
        profiles[f"g{index}"] = make_profile(
            f"g{index}-toy",
            kv_tokens={degree: round(room * degree**1.2) for degree in degrees},
            speed=10 ** draws.uniform(-0.3, 0.3),
            devices_per_node=draws.choice((2, 4, 8)),
            link_bytes_per_s=10 ** draws.uniform(8.0, 10.0),
            host_kv_bytes=draws.choice((0, 0, 10**9)),
        )
        gpus[f"g{index}"] = number
    sessions = [_draw_session(draws) for _ in range(draws.randint(1, 12))]
    workload = WorkloadModel(sessions=tuple(sessions), sessions_per_s=1.0, burstiness=draws.uniform(0.5, 3.0))
    slo = Slo(ttft_s=10 ** draws.uniform(-1.0, 0.5), itl_s=10 ** draws.uniform(-2.0, -1.2))
    target = draws.choice((0.7, 0.9, 0.95))
    return PlanRequest(profiles=profiles, gpus=gpus, workload=workload, slo=slo, target=target)


def at_rate(problem: PlanProblem, rate: float) -> PlanProblem:
    return replace(problem, rate=rate)


def _split(total: int, parts: int, draws: random.Random) -> Sequence[int]:
    if parts == 1 or total == 1:
        return [total]
    first = draws.randint(1, total - 1)
    return [first, total - first]


def _draw_session(draws: random.Random) -> SessionShape:
    rounds = [
        (round(10 ** draws.uniform(2.0, 4.0)), round(10 ** draws.uniform(0.0, 2.4)), draws.choice((0.0, 3.0, 60.0)))
        for _ in range(draws.randint(1, 4))
    ]
    return make_session(*rounds)
