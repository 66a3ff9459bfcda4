"""What tensor parallelism costs here: steps of N ranks against one, and copies out of and into the ranks' pools.

Ranks share this machine's cores, so steps show the price of summing over processes, not a gain. Copies are those of
KV transfers: a plain pool's bytes lie in the order of the wire and are only here copied at all, for comparison.

Example:
    python benchmarks/bench_tensor_parallel.py --model smollm2 --parallel-degree 3 --out tensor_parallel.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_output import describe_machine, read_commit, show_table
from rich.console import Console

from shared.core.types import KvLayout, Segment
from shared.engine.kv_pool import KvPool
from shared.engine.model_files import resolve_model
from shared.engine.model_runner import ModelRunner
from shared.engine.sharded_pool import ShardedKvPool
from shared.engine.step import StepItem
from shared.messages import SamplingParams
from shared.transport.region import allocate_region

POOL = KvLayout(model="m", num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
POOL_BLOCKS, POOL_TOKENS = 64, 512  # 64 MiB, as of an 8B model
COPY_DEGREES = (1, 2)
CONTEXT, PREFILL, BATCH = 128, 256, 8
GREEDY = SamplingParams()


def measure_s(action: Callable[[], object], repeats: int) -> float:
    """Median wall seconds of `action`, after one run that is not counted."""
    action()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure_copies(num_ranks: int, repeats: int) -> dict[str, float]:
    """GiB/s of one thread, blocks scattered."""
    if num_ranks == 1:
        pool: KvPool | ShardedKvPool = KvPool(POOL, POOL_BLOCKS)
    else:
        shard = POOL_BLOCKS * POOL.bytes_per_block // num_ranks
        pool = ShardedKvPool(POOL, POOL_BLOCKS, [allocate_region(shard, shared=False) for _ in range(num_ranks)])
    table = (np.random.default_rng(1).permutation(POOL_BLOCKS - 1) + 1).tolist()
    speeds = {}
    for name, segment in (
        ("all layers", Segment(0, POOL.num_layers, 0, POOL_TOKENS)),
        ("a layer", Segment(3, 4, 0, POOL_TOKENS)),
    ):
        data = bytes(pool.read_segment(table, segment))
        for what, action in (
            ("read", lambda segment=segment: pool.read_segment(table, segment)),
            ("write", lambda segment=segment, data=data: pool.write_segment(table, segment, data)),
        ):
            speeds[f"{what} {name}"] = len(data) / measure_s(action, repeats) / 2**30
    return speeds


def measure_steps(runner: ModelRunner, repeats: int) -> dict[str, float]:
    """Milliseconds a step."""
    blocks = iter(range(1, runner.pool.num_blocks))
    tables = [[next(blocks) for _ in range(-(-(CONTEXT + 1) // 16))] for _ in range(BATCH)]
    prefill_table = [next(blocks) for _ in range(PREFILL // 16)]
    decode = [StepItem([7], CONTEXT, table, GREEDY) for table in tables]
    tokens = [index % 400 + 4 for index in range(PREFILL)]
    steps = {
        "decode, batch 1": decode[:1],
        f"decode, batch {BATCH}": decode,
        f"prefill {PREFILL}": [StepItem(tokens, 0, prefill_table, GREEDY)],
    }
    return {name: 1000 * measure_s(lambda items=items: runner.step(items), repeats) for name, items in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-random", help="as of ampd up (default: %(default)s)")
    parser.add_argument("--parallel-degree", type=int, default=2, help="ranks (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="measured repeats of each case (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the report as JSON to this file")
    args = parser.parse_args()
    degrees = (1, args.parallel_degree)
    report: dict[str, Any] = {"machine": describe_machine(), "commit": read_commit(), "model": args.model}
    for degree in degrees:
        started = time.perf_counter()
        runner = ModelRunner.load(
            resolve_model(args.model), dtype="float32", num_blocks=256, attention="padded", parallel_degree=degree
        )
        try:
            report[str(degree)] = {
                "load_s": time.perf_counter() - started,
                "step_ms": measure_steps(runner, args.repeats),
            }
        finally:
            runner.close()
    copies = {degree: measure_copies(degree, args.repeats) for degree in COPY_DEGREES}
    report["copy_gib_per_s"] = {str(degree): speeds for degree, speeds in copies.items()}
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    one, many = (report[str(degree)] for degree in degrees)
    console = Console()
    rows = [("start, s", *(f"{r['load_s']:.1f}" for r in (one, many)))]
    rows += [(f"{name}, ms", f"{one['step_ms'][name]:.2f}", f"{many['step_ms'][name]:.2f}") for name in one["step_ms"]]
    show_table(console, f"{args.model}, float32", ("", *(f"{degree} rank(s)" for degree in degrees)), rows)
    rows = [(name, *(f"{copies[degree][name]:.2f}" for degree in COPY_DEGREES)) for name in copies[1]]
    show_table(console, "KV copies, GiB/s", ("", *(f"{degree} rank(s)" for degree in COPY_DEGREES)), rows)


if __name__ == "__main__":
    main()
