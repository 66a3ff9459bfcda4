"""Every set of workers that fits the nodes, found by search: nothing here knows the rule that the program uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product

from planner.planning.plans import PlanRole, SolvedPlan, WorkerCount
from planner.planning.program import PlanProblem
from planner.planning.solve import Solution

Workers = tuple[WorkerCount, ...]


def list_nodes(num_gpus: int, node_size: int) -> tuple[int, ...]:
    """GPUs of every node: full ones, and one with the rest."""
    rest = num_gpus % node_size
    return (node_size,) * (num_gpus // node_size) + ((rest,) if rest else ())


@lru_cache(maxsize=100_000)
def fits(sizes: tuple[int, ...], rooms: tuple[int, ...]) -> bool:
    """Whether workers of `sizes` (descending) fit nodes with `rooms` GPUs free, each in one node: tries every way."""
    if not sizes:
        return True
    size, rest = sizes[0], sizes[1:]
    for index, room in enumerate(rooms):
        if room >= size and room not in rooms[:index]:
            left = (*rooms[:index], room - size, *rooms[index + 1 :])
            if fits(rest, tuple(sorted(left))):
                return True
    return False


def list_slots(problem: PlanProblem, gpu_type: str) -> list[tuple[PlanRole, int]]:
    """(role, parallel degree) of the workers that may be used."""
    slots: list[tuple[PlanRole, int]] = []
    for kind in problem.kinds:
        if kind.gpu_type == gpu_type:
            slots += [("prefill", kind.parallel_degree)] if kind.can_prefill else []
            slots += [("both", kind.parallel_degree)] if kind.can_decode else []
    return slots


def nodes_of(problem: PlanProblem, gpu_type: str) -> tuple[int, ...]:
    sizes = [kind.profile.links.devices_per_node for kind in problem.kinds if kind.gpu_type == gpu_type]
    return list_nodes(problem.gpus[gpu_type], sizes[0])


def list_counts(degrees: Sequence[int], nodes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """How many workers of each degree: every combination that fits."""

    def extend(counts: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(counts) == len(degrees):
            yield counts
            return
        size, number = degrees[len(counts)], 0
        while fits(tuple(sorted((*sizes, *(size,) * number), reverse=True)), nodes):
            yield from extend((*counts, number), (*sizes, *(size,) * number))
            number += 1

    yield from extend((), ())


def list_workers(problem: PlanProblem) -> Iterator[Workers]:
    """Of every plan with at least one worker that decodes."""
    choices = []
    for gpu_type in problem.gpus:
        slots = list_slots(problem, gpu_type)
        choices.append(
            [
                tuple(
                    WorkerCount(role, gpu_type, degree, count)
                    for (role, degree), count in zip(slots, counts, strict=True)
                    if count
                )
                for counts in list_counts([degree for _, degree in slots], nodes_of(problem, gpu_type))
            ]
        )
    for parts in product(*choices):
        workers = tuple(one for part in parts for one in part)
        if any(one.role == "both" for one in workers):
            yield workers


def as_plan(workers: Workers, rate: float = 0.0) -> SolvedPlan:
    """A plan that no program has made."""
    nothing = Solution(status="optimal", objective=0.0, gap=0.0, seconds=0.0, values=())
    return SolvedPlan(workers=workers, rate=rate, objective=0.0, solution=nothing)


def does_fit(problem: PlanProblem, workers: Workers) -> bool:
    for gpu_type in problem.gpus:
        sizes = [one.parallel_degree for one in workers if one.gpu_type == gpu_type for _ in range(one.replicas)]
        if not fits(tuple(sorted(sizes, reverse=True)), nodes_of(problem, gpu_type)):
            return False
    return True
