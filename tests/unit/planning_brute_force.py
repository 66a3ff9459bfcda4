"""The best plan by trying every number of workers of each kind: nothing here is taken from the program but its input.

Workers are packed into nodes by a search, and the flows of given workers are a linear program of its own, written out
from docs/planning.md.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import highspy
import numpy as np

from planner.planning.program import PlanProblem
from planner.planning.worker_kinds import WorkerKind

Kind = tuple[str, int]  # role, place of the kind in the problem
Counts = tuple[int, ...]  # workers, by the place of their Kind
LEVELS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
EFFICIENCY, KV_SHARE, LINK_SHARE = 0.9, 0.9, 0.8


# ---------------------------------------------------------------------------------------- packing


def fits_into_nodes(degrees: Sequence[int], num_gpus: int, node_size: int) -> bool:
    """Whether workers of these degrees fit into nodes, none across two: full nodes, and one with the rest."""
    nodes = [node_size] * (num_gpus // node_size) + [num_gpus % node_size]
    return _pack(tuple(sorted(degrees, reverse=True)), tuple(nodes))


def _pack(degrees: tuple[int, ...], nodes: tuple[int, ...]) -> bool:
    if not degrees:
        return True
    first, *rest = degrees
    for index, room in enumerate(nodes):
        if room >= first and room not in nodes[:index]:  # equal nodes are tried once
            others = (*nodes[:index], room - first, *nodes[index + 1 :])
            if _pack(tuple(rest), others):
                return True
    return False


def list_kinds(problem: PlanProblem) -> list[Kind]:
    kinds: list[Kind] = [("prefill", place) for place, kind in enumerate(problem.kinds) if kind.can_prefill]
    return kinds + [("both", place) for place, kind in enumerate(problem.kinds) if kind.can_decode]


def list_counts(problem: PlanProblem) -> Iterator[Counts]:
    """Every number of workers of each kind for which there are GPUs and places in nodes."""
    kinds = list_kinds(problem)
    ranges = []
    for _, place in kinds:
        kind = problem.kinds[place]
        ranges.append(range(problem.gpus[kind.gpu_type] // kind.parallel_degree + 1))
    for counts in itertools.product(*ranges):
        if _has_room(problem, kinds, counts):
            yield counts


def _has_room(problem: PlanProblem, kinds: Sequence[Kind], counts: Counts) -> bool:
    degrees: dict[str, list[int]] = {gpu_type: [] for gpu_type in problem.gpus}
    node_sizes: dict[str, int] = {}
    for (_, place), count in zip(kinds, counts, strict=True):
        kind = problem.kinds[place]
        degrees[kind.gpu_type] += [kind.parallel_degree] * count
        node_sizes[kind.gpu_type] = kind.profile.links.devices_per_node
    if any(sum(used) > problem.gpus[gpu_type] for gpu_type, used in degrees.items()):
        return False
    return all(
        fits_into_nodes(used, problem.gpus[gpu_type], node_sizes[gpu_type])
        for gpu_type, used in degrees.items()
        if used
    )


def count_gpus(problem: PlanProblem, counts: Counts) -> int:
    kinds = list_kinds(problem)
    return sum(n * problem.kinds[place].parallel_degree for (_, place), n in zip(kinds, counts, strict=True))


# ------------------------------------------------------------------------------------------ flows


class Flows:
    """The linear program of given workers. One for all numbers of workers: these are variables with equal bounds."""

    def __init__(self, problem: PlanProblem) -> None:
        self._problem = problem
        self._highs = highspy.Highs()  # type: ignore[no-untyped-call]
        self._highs.silent()
        self._num_variables = 0
        self._rate = self._add()
        kinds = list_kinds(problem)
        self._counts = [self._add() for _ in kinds]
        self._busy = [self._add() for _ in kinds]  # time that each kind's workers may be busy, of all of them together
        self._totals: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        for (role, place), count, busy in zip(kinds, self._counts, self._busy, strict=True):
            kind = problem.kinds[place]
            if role == "prefill":
                self._write_prefill_workers(kind, count, busy)
            else:
                self._write_decode_workers(kind, count, busy)
        self._write_totals()
        self._highs.changeColCost(self._rate, -1.0)

    def _add(self) -> int:
        self._highs.addVar(0.0, highspy.kHighsInf)
        self._num_variables += 1
        return self._num_variables - 1

    def _require(self, terms: Mapping[int, float], *, equal: bool = False) -> None:
        """The sum is at most 0, or exactly. Brought to the scale of 1."""
        scale = max((abs(c) for c in terms.values()), default=1.0) or 1.0
        indices, values = np.array(list(terms), dtype=np.int32), np.array([c / scale for c in terms.values()])
        self._highs.addRow(0.0 if equal else -highspy.kHighsInf, 0.0, len(terms), indices, values)

    def _write_prefills(self, kind: WorkerKind) -> dict[int, float]:
        """{sessions per second whose first, later and repeated prefills are here: seconds of a worker for each}."""
        load = self._problem.load
        prefills = {name: self._add() for name in ("first", "later", "again")}
        for name, variable in prefills.items():
            rounds = load.rounds["first"] if name == "first" else load.rounds["later"]
            self._totals[name][variable] += 1.0
            self._totals["late"][variable] += rounds * kind.late_share[name]  # type: ignore[index]
        return {variable: kind.work_s[name] for name, variable in prefills.items()}  # type: ignore[index]

    def _write_prefill_workers(self, kind: WorkerKind, count: int, busy: int) -> None:
        work_s = self._write_prefills(kind)
        self._require({**work_s, busy: -1.0})
        link = LINK_SHARE * kind.profile.links.inter_node_bytes_per_s * kind.parallel_degree
        tokens = (self._problem.load.moved_tokens[name] for name in ("first", "later", "again"))
        moved = {v: n * kind.profile.kv_bytes_per_token for v, n in zip(work_s, tokens, strict=True)}
        self._require({**moved, count: -link})
        self._totals["moved"].update(moved)
        self._totals["lent"][count] = -KV_SHARE * kind.num_kv_tokens

    def _write_decode_workers(self, kind: WorkerKind, count: int, busy: int) -> None:
        load = self._problem.load
        work_s = self._write_prefills(kind)
        decoded = self._add()
        for prefilled in work_s:
            self._require({prefilled: 1.0, decoded: -1.0})
        times = {self._add(): mode for mode in kind.modes}
        self._require({**dict.fromkeys(times, 1.0), busy: -1.0})
        self._require({**{v: -mode.batch / mode.step_s for v, mode in times.items()}, decoded: load.output_tokens})
        self._require({**work_s, **{v: -mode.prefill_share for v, mode in times.items()}})
        here, on_host, at_peer, nowhere = (self._add() for _ in range(4))
        self._require({**dict.fromkeys((here, on_host, at_peer, nowhere), 1.0), decoded: -1.0}, equal=True)
        memory = -KV_SHARE * kind.num_kv_tokens
        held = {v: mode.batch * load.reserved_context for v, mode in times.items()}
        self._require({**held, here: load.idle_token_s, decoded: load.waiting_token_s, count: memory})
        self._require({on_host: load.idle_token_s, count: -KV_SHARE * kind.num_host_tokens})
        self._totals["lent"][at_peer] = load.idle_token_s
        self._totals["again"][nowhere] -= 1.0
        self._totals["decoded"][decoded] = 1.0
        self._totals["moved"][count] = -LINK_SHARE * kind.profile.links.inter_node_bytes_per_s * kind.parallel_degree

    def _write_totals(self) -> None:
        """What all workers have to do with together."""
        load, totals = self._problem.load, self._totals
        for name in ("first", "later", "decoded"):
            self._require({**totals[name], self._rate: -1.0}, equal=True)
        self._require(totals["again"], equal=True)
        self._require(totals["lent"])
        self._require(totals["moved"])
        num_rounds = load.rounds["first"] + load.rounds["later"]
        self._require({**totals["late"], self._rate: -(1.0 - self._problem.target) * num_rounds})

    def find_most_rate(self, counts: Counts, shares: Sequence[float] | None = None) -> float:
        """Sessions per second of so many workers. shares: of their time that each kind's may be busy."""
        for index, count in enumerate(counts):
            busy = count * (EFFICIENCY if shares is None else min(EFFICIENCY, shares[index]))
            self._highs.changeColBounds(self._counts[index], float(count), float(count))
            self._highs.changeColBounds(self._busy[index], 0.0, busy)
        self._highs.run()
        assert self._highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
        return -float(self._highs.getInfo().objective_function_value)


# ------------------------------------------------------------------------------------- objectives


def find_rates(problem: PlanProblem) -> dict[Counts, float]:
    """The highest rate of every number of workers that fits; {} when there is no kind that decodes."""
    flows = Flows(problem)
    return {counts: flows.find_most_rate(counts) for counts in list_counts(problem)}


def find_least_latency(problem: PlanProblem, rates: Mapping[Counts, float]) -> float:
    """The lowest latency of the slowest pool at which the problem's rate is served; infinite when it never is."""
    flows, kinds = Flows(problem), list_kinds(problem)
    tables = [[latency_at(problem.kinds[place], level, problem.variability) for level in LEVELS] for _, place in kinds]
    best = math.inf
    for counts, rate in rates.items():
        if rate < problem.rate:
            continue
        tried = sorted({latency for n, table in zip(counts, tables, strict=True) if n for latency in table})
        slowest_idle = max(table[0] for n, table in zip(counts, tables, strict=True) if n)
        candidates = [latency for latency in tried if slowest_idle <= latency < best]
        low, high = 0, len(candidates)  # what is allowed at a higher latency includes what is at a lower one
        while low < high:
            middle = (low + high) // 2
            shares = [_highest_level(table, candidates[middle]) for table in tables]
            if flows.find_most_rate(counts, shares) >= problem.rate:
                high = middle
            else:
                low = middle + 1
        if low < len(candidates):
            best = candidates[low]
    return best


def _highest_level(table: Sequence[float], latency_s: float) -> float:
    return max((level for level, one in zip(LEVELS, table, strict=True) if one <= latency_s), default=0.0)


def latency_at(kind: WorkerKind, level: float, variability: float) -> float:
    """One prefill, and the 95th percentile of the wait for others in an M/M/1 queue: P(wait > t) is the utilisation
    times exp(-(1 - utilisation) t / service)."""
    service_s = max(kind.alone_s["first"], kind.alone_s["later"])
    wait_s = math.log(max(1.0, level / 0.05)) / (1.0 - level) * service_s * variability
    return service_s + wait_s
