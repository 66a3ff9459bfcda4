"""What a scheduling decision costs: routing, ordering a queue, sizing a chunk. One thread, no I/O.

    python benchmarks/bench_decisions.py --out decisions.json

Routing: one decision of every policy with --workers prefill workers (four of them hold KV of the session) and --queued
prefills waiting on them in all; `adaptive` may also move the session to any of as many workers.
Every worker decodes 32 sequences beside. The round has --new-tokens: a few fit into one step beside these, many do not,
and then `adaptive` seeks the largest chunk for every option. Ordering: a queue of
--queued prefills, by the paper's window and by Moore-Hodgson, of which half cannot be on time. Chunk: the largest that
fits the objective beside a batch. Medians over --repeats runs of the mean CPU time in a run. AMPD (arXiv 2602.14516)
reports 0.39 ms for routing and 0.45 ms for reordering.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is not installed

from benchmarks.bench_output import describe_machine
from shared.core.load import WorkerLoad
from shared.core.policies import POLICIES, SchedulingPolicy, with_options
from shared.core.reordering import OrderName, OrderParameters, PrefillOrder, WaitingPrefill
from shared.core.routing import RoutingView
from shared.core.step_costs import StepCosts
from shared.core.types import RoundKey, SessionKey
from shared.messages import Role, Slo, WindowStats
from shared.profile_files import load_profile

NOW = 1_000.0
SLO = Slo(ttft_s=2.0, itl_s=0.05)
NUM_ROUNDS = 8
TARGET_ROUTING_US = 50.0
TARGET_ORDERING_US = 1_000.0


def draw_worker(draws: random.Random, costs: StepCosts, role: Role, number: int, num_queued: int) -> WorkerLoad:
    load = WorkerLoad(f"{role}-{number:03d}", 1, role, costs, num_kv_tokens=400_000, node=number // 4)
    load.ttft = WindowStats(count=50, mean=draws.uniform(0.5, 3.0))
    load.itl = WindowStats(count=5_000, mean=draws.uniform(0.02, 0.06))
    for index in range(num_queued):
        key = SessionKey("bench", f"{load.worker_id}/waiting/{index}")
        num_new = draws.randint(50, 4_000)
        load.begin_prefill(key, num_new, load.work_s(8_000, num_new), NOW + draws.uniform(-0.5, 2.0), NOW)
    for index in range(32):
        key = SessionKey("bench", f"{load.worker_id}/decoding/{index}")
        load.begin_round(key, 9_000)
        load.begin_decoding(key, draws.randint(1_000, 9_000))
    return load


def make_views(num_workers: int, num_queued: int, num_new: int) -> list[RoutingView]:
    """Rounds that come one after the other, of slightly more tokens each: nothing that is remembered of one decision
    but the workers' state is of use to the next."""
    draws = random.Random(0)
    costs = StepCosts.from_profile(load_profile("h100-qwen3-32b"), 2)
    each = num_queued // num_workers
    prefill = [draw_worker(draws, costs, "prefill", number, each) for number in range(num_workers)]
    movable = [draw_worker(draws, costs, "both", number, each) for number in range(1, num_workers + 1)]
    decode = draw_worker(draws, costs, "both", 0, each)
    resident = {load.worker_id: draws.randint(1_000, 8_000) for load in prefill[:: max(1, num_workers // 4)]}
    return [
        RoutingView(
            now=NOW + 0.001 * number,
            num_cached_tokens=8_000,
            num_total_tokens=8_000 + num_new + number,
            first_round=False,
            slo=SLO,
            decode=decode,
            prefill_workers=prefill,
            movable=movable,
            num_needed_tokens=9_200,
            resident=resident,
        )
        for number in range(NUM_ROUNDS)
    ]


def make_queue(num_queued: int) -> list[WaitingPrefill]:
    draws = random.Random(1)
    total_s = 0.0
    queue: list[WaitingPrefill] = []
    for number in range(num_queued):
        work_s = draws.uniform(0.005, 0.3)
        total_s += work_s
        arrival = NOW - 2.0 + 2.0 * number / num_queued
        deadline = NOW + draws.uniform(0.0, 0.1 * num_queued)
        queue.append(WaitingPrefill(RoundKey("bench", f"{number}", 0, 1), arrival, arrival, deadline, work_s))
    return queue


def measure_us(call: Callable[[], object], repeats: int, min_s: float) -> dict[str, float]:
    """Median, least and most of the mean time of a call, in microseconds."""
    call()
    num_calls = 1
    while (took_s := _time_calls(call, num_calls)) < min_s:
        num_calls = max(num_calls * 2, int(num_calls * min_s / max(took_s, 1e-6)))
    means = [_time_calls(call, num_calls) / num_calls * 1e6 for _ in range(repeats)]
    return {
        "median_us": round(statistics.median(means), 2),
        "min_us": round(min(means), 2),
        "max_us": round(max(means), 2),
    }


def _route_next(policy: SchedulingPolicy, rounds: Iterator[RoutingView]) -> None:
    policy.route(next(rounds), policy.routing)


def _time_calls(call: Callable[[], object], num_calls: int) -> float:
    started = time.thread_time()
    for _ in range(num_calls):
        call()
    return time.thread_time() - started


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(what: str, target_us: float | None, call: Callable[[], object]) -> None:
        measured = measure_us(call, args.repeats, args.min_s)
        met = target_us is None or measured["median_us"] <= target_us
        rows.append({"what": what, **measured, "target_us": target_us, "met": met})

    variants = dict(POLICIES)
    variants["ampd, live terms"] = with_options(POLICIES["ampd"], {"routing.live_terms": True})
    views = {size: make_views(args.workers, args.queued, size) for size in args.new_tokens}
    for size, rounds in views.items():
        for name, policy in variants.items():
            add(f"routing: {name}, {size} tokens", TARGET_ROUTING_US, partial(_route_next, policy, cycle(rounds)))
    queue = make_queue(args.queued)
    orders: tuple[OrderName, ...] = ("fcfs", "program_fcfs", "window", "moore_hodgson")
    for order in orders:
        orderer = PrefillOrder(OrderParameters(order=order))
        target_us = TARGET_ORDERING_US if order in ("window", "moore_hodgson") else None
        add(f"ordering: {order}", target_us, partial(orderer.order, queue, NOW))
    aged = PrefillOrder(OrderParameters(order="moore_hodgson", ageing=0.0, aged_every=1))
    add("ordering: moore_hodgson, aged turn", TARGET_ORDERING_US, partial(aged.order, queue, NOW))
    costs = views[args.new_tokens[0]][0].decode.costs
    add("largest chunk", None, partial(costs.largest_chunk, 32, 5_000.0, 8_000, 0.045))
    return rows


def show(document: dict[str, Any]) -> None:
    config = document["config"]
    table = Table(title=f"A decision, {config['workers']} workers, {config['queued']} queued (microseconds)")
    for column in ("what", "median", "least", "most", "target", "met"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in document["decisions"]:
        target = "" if row["target_us"] is None else f"{row['target_us']:.0f}"
        times = (f"{row[name]:.1f}" for name in ("median_us", "min_us", "max_us"))
        table.add_row(row["what"], *times, target, "yes" if row["met"] else "NO")
    console = Console(stderr=True)
    console.print(table)
    console.print(document["machine"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here; default: standard output")
    parser.add_argument("--workers", type=int, default=64, help="prefill workers (default 64)")
    parser.add_argument("--queued", type=int, default=1_000, help="prefills that wait (default 1000)")
    parser.add_argument(
        "--new-tokens", type=int, nargs="+", default=[300, 2_000], help="of the round that is placed (default 300 2000)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="runs of which the median is taken (default 7)")
    parser.add_argument("--min-s", type=float, default=0.2, help="least duration of a run in seconds (default 0.2)")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    rows = measure_all(args)
    config = {"workers": args.workers, "queued": args.queued, "new_tokens": args.new_tokens, "repeats": args.repeats}
    document = {"decisions": rows, "config": config, "machine": describe_machine()}
    show(document)
    text = json.dumps(document, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    else:
        print(text)
    return 1 if args.check and not all(row["met"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
