"""The program: which workers, and how the workload flows through them. docs/planning.md writes it out.

Rates are in sessions per second. Integer variables count workers; everything else is a flow, or a share of time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from planner.planning.linear_program import LinearProgram
from planner.planning.queueing import wait_quantile_s
from planner.planning.worker_kinds import PREFILL_CLASSES, PrefillClass, SessionLoad, WorkerKind

Objective = Literal["goodput", "min-gpus", "min-p95"]
Tier = Literal["device", "host", "peer", "dropped"]
TIERS: tuple[Tier, ...] = ("device", "host", "peer", "dropped")
KV_SHARE = 0.9  # of KV memory that may be in use on average: the rest is for fluctuations
LINK_SHARE = 0.8
EFFICIENCY = 0.9  # of workers' time: steps are not always full, and work does not come evenly to all
LEVELS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)  # min-p95: utilisations that latencies are known at


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanProblem:
    """gpus: how many there are of each type. rate: sessions per second to be served; what goodput maximises is not
    bounded by it. target: share of rounds that are to attain."""

    kinds: tuple[WorkerKind, ...]
    load: SessionLoad
    gpus: Mapping[str, int]
    rate: float
    target: float = 0.9
    variability: float = 1.0
    efficiency: float = EFFICIENCY


@dataclass(slots=True)
class PlanProgram:
    """The program with its variables' places. num_prefill, num_decode: by the place of the kind in the problem."""

    problem: PlanProblem
    lp: LinearProgram
    rate: int
    num_prefill: dict[int, int] = field(default_factory=dict)
    num_decode: dict[int, int] = field(default_factory=dict)  # workers that decode, and may prefill
    remote: dict[tuple[PrefillClass, int], int] = field(default_factory=dict)
    local: dict[tuple[PrefillClass, int], int] = field(default_factory=dict)
    decoded: dict[int, int] = field(default_factory=dict)
    mode_time: dict[tuple[int, int], int] = field(default_factory=dict)  # workers' time in each mode
    kept: dict[tuple[Tier, int], int] = field(default_factory=dict)  # idle sessions' KV
    latency: int | None = None

    @property
    def counts(self) -> list[int]:
        return [*self.num_prefill.values(), *self.num_decode.values()]

    def gpu_costs(self) -> dict[int, float]:
        degrees = [kind.parallel_degree for kind in self.problem.kinds]
        return {
            variable: float(degrees[place])
            for counts in (self.num_prefill, self.num_decode)
            for place, variable in counts.items()
        }


def build_program(problem: PlanProblem, objective: Objective) -> PlanProgram:
    lp = LinearProgram()
    is_fixed = objective != "goodput"
    rate = lp.add("rate", low=problem.rate if is_fixed else 0.0, high=problem.rate if is_fixed else float("inf"))
    program = PlanProgram(problem, lp, rate)
    _add_variables(program)
    _limit_gpus(program)
    _serve(program)
    _share_time(program)
    _keep_kv(program)
    _move_kv(program)
    _bound_misses(program)
    match objective:
        case "goodput":
            lp.minimise({rate: -1.0})
        case "min-gpus":
            lp.minimise(program.gpu_costs())
        case "min-p95":
            program.latency = _bound_latency(program)
            lp.minimise({program.latency: 1.0})
    return program


def _add_variables(program: PlanProgram) -> None:
    lp = program.lp
    for place, kind in enumerate(program.problem.kinds):
        most = program.problem.gpus[kind.gpu_type] // kind.parallel_degree
        if most == 0:
            continue
        if kind.can_prefill:
            program.num_prefill[place] = lp.add(f"prefill workers, {kind.name}", high=most, is_integer=True)
            for name in PREFILL_CLASSES:
                program.remote[name, place] = lp.add(f"remote {name}, {kind.name}")
        if kind.can_decode:
            program.num_decode[place] = lp.add(f"decode workers, {kind.name}", high=most, is_integer=True)
            program.decoded[place] = lp.add(f"decoded, {kind.name}")
            for name in PREFILL_CLASSES:
                program.local[name, place] = lp.add(f"local {name}, {kind.name}")
            for tier in TIERS:
                program.kept[tier, place] = lp.add(f"idle KV {tier}, {kind.name}")
            for number in range(len(kind.modes)):
                program.mode_time[place, number] = lp.add(f"time in mode {number}, {kind.name}")


def _limit_gpus(program: PlanProgram) -> None:
    """Degrees are powers of two and nodes hold a power of two: workers fit into nodes exactly when, for every degree,
    those of at least that degree take no more than the slots of that size (sizes that divide each other pack)."""
    problem = program.problem
    for gpu_type, num_gpus in problem.gpus.items():
        used = dict(_degrees_of(program, gpu_type))
        program.lp.require(f"gpus of {gpu_type}", {v: float(n) for v, n in used.items()}, high=float(num_gpus))
        sizes = [kind.profile.links.devices_per_node for kind in problem.kinds if kind.gpu_type == gpu_type]
        for degree in sorted({n for n in used.values() if n > 1}):
            slots = count_slots(num_gpus, sizes[0], degree)
            large = {v: float(n) for v, n in used.items() if n >= degree}
            program.lp.require(f"nodes of {gpu_type} at degree {degree}", large, high=float(degree * slots))


def count_slots(num_gpus: int, node_size: int, degree: int) -> int:
    """Workers of `degree` that fit into full nodes and one with the rest."""
    return (num_gpus // node_size) * (node_size // degree) + (num_gpus % node_size) // degree


def _degrees_of(program: PlanProgram, gpu_type: str) -> Iterator[tuple[int, int]]:
    for counts in (program.num_prefill, program.num_decode):
        for place, variable in counts.items():
            kind = program.problem.kinds[place]
            if kind.gpu_type == gpu_type:
                yield variable, kind.parallel_degree


def _serve(program: PlanProgram) -> None:
    """Every session is decoded somewhere and every prefill computed: on a prefill worker, or where it decodes."""
    lp, rate = program.lp, program.rate
    lp.require("sessions decoded", {**dict.fromkeys(program.decoded.values(), 1.0), rate: -1.0}, low=0.0, high=0.0)
    for name in PREFILL_CLASSES:
        flows = {v: 1.0 for table in (program.remote, program.local) for (one, _), v in table.items() if one == name}
        if name == "again":
            wanted = {v: -1.0 for (tier, _), v in program.kept.items() if tier == "dropped"}
        else:
            wanted = {rate: -1.0}
        lp.require(f"prefills of class {name}", {**flows, **wanted}, low=0.0, high=0.0)
    for (name, place), variable in program.local.items():
        lp.require(f"local {name} where decoded, {place}", {variable: 1.0, program.decoded[place]: -1.0}, high=0.0)


def _share_time(program: PlanProgram) -> None:
    problem, lp = program.problem, program.lp
    for place, count in program.num_prefill.items():
        work = {program.remote[name, place]: problem.kinds[place].work_s[name] for name in PREFILL_CLASSES}
        name = f"time of prefill workers, {problem.kinds[place].name}"
        lp.require(name, {**work, count: -problem.efficiency}, high=0.0)
    for place, count in program.num_decode.items():
        kind = problem.kinds[place]
        times = {program.mode_time[place, number]: mode for number, mode in enumerate(kind.modes)}
        spent = dict.fromkeys(times, 1.0)
        lp.require(f"time of decode workers, {kind.name}", {**spent, count: -problem.efficiency}, high=0.0)
        made = {variable: mode.tokens_per_s for variable, mode in times.items()}
        wanted = {program.decoded[place]: -problem.load.output_tokens}
        lp.require(f"tokens decoded, {kind.name}", {**made, **wanted}, low=0.0)
        room = {variable: -mode.prefill_share for variable, mode in times.items()}
        work = {program.local[name, place]: kind.work_s[name] for name in PREFILL_CLASSES}
        lp.require(f"local prefill, {kind.name}", {**work, **room}, high=0.0)


def _keep_kv(program: PlanProgram) -> None:
    """Rounds in flight have their KV on the device; while the tool runs it may be elsewhere, or be computed again."""
    problem, lp, load = program.problem, program.lp, program.problem.load
    for place, count in program.num_decode.items():
        kind, decoded = problem.kinds[place], program.decoded[place]
        somewhere = {program.kept[tier, place]: 1.0 for tier in TIERS}
        lp.require(f"idle KV is somewhere, {kind.name}", {**somewhere, decoded: -1.0}, low=0.0, high=0.0)
        idle = {program.kept["device", place]: load.idle_token_s}
        decoding = {
            program.mode_time[place, number]: mode.batch * load.reserved_context
            for number, mode in enumerate(kind.modes)
        }
        held = {**decoding, **idle, decoded: load.waiting_token_s, count: -KV_SHARE * kind.num_kv_tokens}
        lp.require(f"KV memory of decode workers, {kind.name}", held, high=0.0)
        on_host = {program.kept["host", place]: load.idle_token_s, count: -KV_SHARE * kind.num_host_tokens}
        lp.require(f"host memory, {kind.name}", on_host, high=0.0)
    at_peers = {v: load.idle_token_s for (tier, _), v in program.kept.items() if tier == "peer"}
    memory = {v: -KV_SHARE * problem.kinds[place].num_kv_tokens for place, v in program.num_prefill.items()}
    lp.require("KV memory of prefill workers", {**at_peers, **memory}, high=0.0)


def _move_kv(program: PlanProgram) -> None:
    problem, lp = program.problem, program.lp

    def moved(place: int) -> dict[int, float]:
        bytes_per_token = problem.kinds[place].profile.kv_bytes_per_token
        return {
            program.remote[name, place]: problem.load.moved_tokens[name] * bytes_per_token for name in PREFILL_CLASSES
        }

    for place, count in program.num_prefill.items():
        kind = problem.kinds[place]
        room = {count: -LINK_SHARE * kind.costs.link_bytes_per_s}
        lp.require(f"links of prefill workers, {kind.name}", {**moved(place), **room}, high=0.0)
    everything = {v: c for place in program.num_prefill for v, c in moved(place).items()}
    links = {v: -LINK_SHARE * problem.kinds[place].costs.link_bytes_per_s for place, v in program.num_decode.items()}
    lp.require("links of decode workers", {**everything, **links}, high=0.0)


def _bound_misses(program: PlanProgram) -> None:
    """Rounds that are late even alone on their worker, against what may be missed."""
    problem = program.problem
    missed = {
        variable: problem.load.rounds[name] * problem.kinds[place].late_share[name]
        for table in (program.remote, program.local)
        for (name, place), variable in table.items()
    }
    allowed = (1.0 - problem.target) * problem.load.num_rounds
    program.lp.require("rounds on time", {**missed, program.rate: -allowed}, high=0.0)


def _bound_latency(program: PlanProgram) -> int:
    """Z, the 95th percentile of TTFT on the slowest worker in use.

    Each pool of alike workers runs at one of LEVELS. `at` [pool, level] is binary, one of a pool's is 1 exactly when it
    has workers; `workers` [pool, level] is their number there (0 elsewhere), so that the product of a level and a
    number is linear. Z is at least the latency of every level that is taken.
    """
    problem, lp = program.problem, program.lp
    latest = lp.add("latency", low=0.0)
    pools = [("prefill", place, v) for place, v in program.num_prefill.items()]
    pools += [("decode", place, v) for place, v in program.num_decode.items()]
    for role, place, count in pools:
        kind = problem.kinds[place]
        most = lp.variables[count].high
        at = [lp.add(f"{role} {kind.name} at {level:g}", high=1.0, is_integer=True) for level in LEVELS]
        workers = [lp.add(f"{role} workers {kind.name} at {level:g}") for level in LEVELS]
        lp.require(f"one level, {role} {kind.name}", dict.fromkeys(at, 1.0), high=1.0)
        lp.require(f"all workers at a level, {role} {kind.name}", {**dict.fromkeys(workers, 1.0), count: -1.0},
                   low=0.0, high=0.0)  # fmt: skip
        for level, binary, number in zip(LEVELS, at, workers, strict=True):
            lp.require(f"only there, {role} {kind.name} {level:g}", {number: 1.0, binary: -most}, high=0.0)
            lp.require(f"a worker there, {role} {kind.name} {level:g}", {number: 1.0, binary: -1.0}, low=0.0)
            latency_s = latency_at(kind, level, problem.variability)
            lp.require(f"latency, {role} {kind.name} {level:g}", {latest: 1.0, binary: -latency_s}, low=0.0)
        limit = {number: -level for level, number in zip(LEVELS, workers, strict=True)}
        if role == "prefill":
            busy = {program.remote[name, place]: kind.work_s[name] for name in PREFILL_CLASSES}
        else:
            busy = {program.mode_time[place, number]: 1.0 for number in range(len(kind.modes))}
        lp.require(f"below the level, {role} {kind.name}", {**busy, **limit}, high=0.0)
    return latest


def latency_at(kind: WorkerKind, utilisation: float, variability: float) -> float:
    """95th percentile of TTFT on one worker: waiting, and the longer of the two classes' prefills."""
    service_s = max(kind.alone_s["first"], kind.alone_s["later"])
    return service_s + wait_quantile_s(utilisation, service_s, variability, 0.95)
