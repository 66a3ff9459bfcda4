"""What the whole path (client, bus, coordinator, worker) adds to the engine's own time to first token.

One session at a time. For each repetition, side by side: the engine alone prefills the prompt in this process, then a
cluster serves the same prompt, prefilled locally and (second cluster) remotely, its KV sent over a socket.

    python benchmarks/bench_ttft_overhead.py --model smollm2 --out out/bench/bench_ttft_overhead.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from services.local import ClusterOptions, LocalCluster
from shared.client import AmpdClient
from shared.engine.kv_memory import blocks_in_memory
from shared.engine.model_files import resolve_model
from shared.engine.model_runner import ModelRunner
from shared.engine.step import StepItem
from shared.messages import SamplingParams, StopConditions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    report = asyncio.run(measure(args))
    show(report)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    model_dir = resolve_model(args.model)
    runner = ModelRunner.load(
        model_dir,
        dtype=args.dtype,
        num_blocks=blocks_in_memory(
            model_dir, dtype=args.dtype, device="cpu", block_size=16, kv_memory_bytes=256_000_000
        ),
    )
    placements = {"local": ("local", 0), "remote": ("remote", 1)}
    rows = []
    for placement, (policy, num_prefill) in placements.items():
        cluster = LocalCluster(
            ClusterOptions(
                num_prefill=num_prefill, model=args.model, dtype=args.dtype, policy=policy, kv_memory_mb=256
            ),
            lambda line: None,
        )
        await cluster.start()
        try:
            async with await AmpdClient.connect(cluster.url) as client:
                for num_tokens in args.prompt_tokens:
                    row = await compare(client, runner, num_tokens, args.repeat, placement)
                    rows.append(row)
        finally:
            await cluster.stop(asyncio.Event())
    return {
        "benchmark": "ttft_overhead",
        "model": args.model,
        "dtype": args.dtype,
        "repeat": args.repeat,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "rows": rows,
    }


async def compare(
    client: AmpdClient, runner: ModelRunner, num_tokens: int, repeat: int, placement: str
) -> dict[str, Any]:
    rng = random.Random(num_tokens)
    engine_s, ttft_s, added_s = [], [], []
    for number in track(range(repeat + 2), f"{placement}, {num_tokens} tokens", transient=True):
        prompt = [rng.randrange(runner.vocab_size // 2, runner.vocab_size) for _ in range(num_tokens)]
        alone_s = await asyncio.to_thread(time_engine, runner, prompt)
        async with await client.open_session() as session:
            stream = await session.submit(prompt, stop=StopConditions(max_output_tokens=2, ignore_eos=True))
            result = await stream.result()
        assert result.usage.prefill == placement
        if number < 2:  # warm-up
            continue
        engine_s.append(alone_s)
        ttft_s.append(result.first_token_s - result.sent_s)
        added_s.append(ttft_s[-1] - result.usage.prefill_s)
    return {
        "placement": placement,
        "prompt_tokens": num_tokens,
        "engine_alone_ms": round(1e3 * statistics.median(engine_s), 2),
        "ttft_ms": round(1e3 * statistics.median(ttft_s), 2),
        "overhead_ms": round(1e3 * (statistics.median(ttft_s) - statistics.median(engine_s)), 2),
        "outside_prefill_ms": round(1e3 * statistics.median(added_s), 2),
    }


def time_engine(runner: ModelRunner, prompt: list[int]) -> float:
    blocks = range(1, 2 + len(prompt) // runner.layout.block_size)
    started = time.perf_counter()
    runner.step([StepItem(prompt, 0, tuple(blocks), SamplingParams())])
    return time.perf_counter() - started


def show(report: dict[str, Any]) -> None:
    table = Table(title=f"TTFT, one session, {report['model']} {report['dtype']} (medians of {report['repeat']}, ms)")
    for column in ("prefill", "prompt tokens", "engine alone", "client's TTFT", "added", "TTFT outside the prefill"):
        table.add_column(column, justify="right")
    for row in report["rows"]:
        table.add_row(
            row["placement"],
            str(row["prompt_tokens"]),
            *(f"{row[name]:.1f}" for name in ("engine_alone_ms", "ttft_ms", "overhead_ms", "outside_prefill_ms")),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
