"""Make the profiles that ship: python -m planner.gpu_profiles --out shared/profiles

One file per GPU and model, from aiconfigurator's measured tables (gpu_timing), or for a GPU that it has none for, from
the tables of a relative moved by the roofline. What the numbers rest on goes into each file's provenance.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import msgspec

from planner.gpu_fit import HELD_OUT, TOKENS, Changes, Errors, fit_degree, measure_errors
from planner.gpu_models import (
    DEVICES_PER_NODE,
    EFFECTIVE_LINK,
    GIB,
    GPUS,
    HOST_KV_BYTES,
    LINK_LATENCY_S,
    MODELS,
    Gpu,
    Model,
)
from planner.gpu_timing import (
    MAX_STEP_TOKENS,
    MEMORY_FRACTION,
    CompiledEngine,
    MeasuredTimes,
    RooflineTimes,
    StepTimes,
    compile_engine,
    model_folder,
    package_version,
)
from shared.core.profile import DegreeProfile, Links, Profile, decode_profile
from shared.errors import AmpdError, ErrorCode

DEGREES = (1, 2, 4, 8)
LEAST_KV_TOKENS = 16_384  # a worker with less holds no useful batch: the degree is left out
CHECK_CHUNKS = tuple(product((0, 2_048, 16_384), (128, 512, 2_048, 8_192)))  # history, chunk
CHECK_DECODES = tuple(product((1, 8, 32, 128), (512, 2_048, 8_192)))  # batch, context

EXAMPLE = """example:
  python -m planner.gpu_profiles --out shared/profiles --only h100-qwen3-32b"""


def profile_names() -> list[str]:
    return [f"{gpu.name}-{model.name}" for gpu in GPUS for model in MODELS]


def make_profile(gpu: Gpu, model: Model, *, seed: int = 0) -> Profile:
    """Raises AmpdError INVALID_REQUEST if the package or its tables are missing, or no degree fits."""
    degrees: list[DegreeProfile] = []
    notes: dict[str, Any] = {}
    left_out: dict[str, int] = {}
    version = package_version()
    links = make_links(gpu)
    with model_folder(model) as folder:
        for parallel_degree in DEGREES:
            engine = compile_engine(gpu, model, folder, parallel_degree)
            if engine.num_kv_tokens < LEAST_KV_TOKENS:
                left_out[str(parallel_degree)] = engine.num_kv_tokens
                continue
            measured = MeasuredTimes(engine.handle)
            times: StepTimes = RooflineTimes(engine, *_ratios(gpu)) if gpu.scaled else measured
            degree, changes = fit_degree(times, parallel_degree, engine.num_kv_tokens, model.max_context_tokens)
            errors = measure_errors(degree, times, links, model.max_context_tokens, model.kv_bytes_per_token, seed)
            degrees.append(degree)
            notes[str(parallel_degree)] = _note_degree(engine, measured, errors, changes)
        if not degrees:
            raise AmpdError(ErrorCode.INVALID_REQUEST, f"{model.name} fits no degree of {gpu.device}: take another GPU")
        provenance = _make_provenance(gpu, model, version, engine, notes, left_out)
        if gpu.scaled:
            provenance["method_check"] = check_roofline(model, folder, degrees[-1].parallel_degree)
    return Profile(
        name=f"{gpu.name}-{model.name}",
        model=model.config,
        device=gpu.device,
        provenance=provenance,
        max_context_tokens=model.max_context_tokens,
        vocab_size=model.vocab_size,
        kv_bytes_per_token=model.kv_bytes_per_token,
        host_kv_bytes=HOST_KV_BYTES,
        links=links,
        degrees=tuple(degrees),
    )


def make_links(gpu: Gpu) -> Links:
    return Links(
        devices_per_node=DEVICES_PER_NODE,
        intra_node_bytes_per_s=EFFECTIVE_LINK * gpu.intra_node_bytes_per_s,
        inter_node_bytes_per_s=EFFECTIVE_LINK * gpu.inter_node_bytes_per_s,
        host_bytes_per_s=EFFECTIVE_LINK * gpu.host_bytes_per_s,
        latency_s=LINK_LATENCY_S,
    )


def check_roofline(model: Model, folder: str, parallel_degree: int) -> dict[str, dict[str, float]]:
    """The base device's tables moved to the devices that have their own: median |moved / measured - 1| of each part."""
    base = _find_base()
    engine = compile_engine(base, model, folder, parallel_degree)
    found: dict[str, dict[str, float]] = {}
    for target in (gpu for gpu in GPUS if not gpu.scaled and gpu.name != base.name):
        measured = MeasuredTimes(compile_engine(target, model, folder, parallel_degree).handle)
        moved = RooflineTimes(engine, *_ratios(target))
        ratios = {
            "linear": [moved.linear_s(n) / measured.linear_s(n) for n in TOKENS],
            "prefill_attention": [
                moved.prefill_attention_s(h, c) / measured.prefill_attention_s(h, c) for h, c in CHECK_CHUNKS
            ],
            "decode_attention": [
                moved.decode_attention_s(b, c) / measured.decode_attention_s(b, c) for b, c in CHECK_DECODES
            ],
        }
        found[f"{base.name} moved to {target.name}, degree {parallel_degree}"] = {
            part: round(statistics.median(abs(ratio - 1.0) for ratio in values), 3) for part, values in ratios.items()
        }
    return found


def encode_profile(profile: Profile) -> bytes:
    """Compact JSON, a degree a line; checked before it is returned."""
    text = msgspec.json.encode(profile).decode()
    for start in ('"provenance":', '"links":', '{"parallel_degree"'):
        text = text.replace(start, "\n" + start)
    data = (text + "\n").encode()
    decode_profile(data, profile.name)
    return data


def _find_base() -> Gpu:
    return next(gpu for gpu in GPUS if gpu.name == "h100")


def _ratios(gpu: Gpu) -> tuple[float, float]:
    base = _find_base()
    return base.peak_flops / gpu.peak_flops, base.memory_bytes_per_s / gpu.memory_bytes_per_s


def _note_degree(engine: CompiledEngine, measured: MeasuredTimes, errors: Errors, changes: Changes) -> dict[str, Any]:
    return {
        "errors": errors,
        "largest_monotone_changes": changes,
        "time_share_by_source": engine.source_shares(),
        "fallback_tiers": sorted(measured.fallbacks),
        "num_kv_tokens_beside_weights_alone": engine.num_kv_tokens_beside_weights,
        "memory_gib": {k: round(v / 2**30, 2) for k, v in engine.memory_bytes.items()},
    }


def _make_provenance(
    gpu: Gpu, model: Model, version: str, engine: CompiledEngine, notes: dict[str, Any], left_out: dict[str, int]
) -> dict[str, Any]:
    base = _find_base()
    source = f"aiconfigurator-core {version}, tables of {gpu.system} with {engine.backend} {engine.backend_version}"
    provenance: dict[str, Any] = {
        "kind": "measured tables",
        "source": source,
        "made_by": f"python -m planner.gpu_profiles --out shared/profiles --only {gpu.name}-{model.name}",
        "made_on": datetime.date.today().isoformat(),
        "weights_and_kv": "bfloat16, tensor parallel" + (", experts too" if model.experts else ""),
        "parts": "linear: all but attention, by tokens of the step; a decode step alone (CUDA graphs) and a mixed step"
        " have the same linear part in this source. prefill_attention: prefill of one request minus linear",
        "monotone": "measured times that wiggle are made ascending (planner/gpu_fit.py): linear by the geometric mean"
        " of the running maximum and the running minimum from the far end, attention by the latter;"
        " largest_monotone_changes are shares of the step's time",
        "errors": f"|ours / theirs - 1| at {HELD_OUT} random sizes off the grid: prefill alone (all, and those of 256"
        " tokens or more), decode alone, mixed step",
        "degrees": notes,
        "num_kv_tokens": f"{MEMORY_FRACTION} of device memory minus memory_gib (aiconfigurator's KVCacheEstimator for"
        f" vLLM, {MAX_STEP_TOKENS} tokens a step)",
        "degrees_left_out": {d: f"{n} KV tokens, fewer than {LEAST_KV_TOKENS}" for d, n in left_out.items()},
        "max_context_tokens": model.context_note,
        "link_rates": f"{EFFECTIVE_LINK} of nominal bandwidth per device and direction; latency assumed",
        "host_kv_bytes": "assumed: 128 GiB a device, half of a 2 TB host of 8 devices",
        "assumed_figures": {
            "memory_gib": gpu.memory_bytes / GIB,
            "bf16_tflops": gpu.peak_flops / 1e12,
            "memory_gb_per_s": gpu.memory_bytes_per_s / 1e9,
        },
    }
    if gpu.scaled:
        provenance["kind"] = "roofline, not measured"
        provenance["method"] = (
            f"each operation on {base.device}: max(r' + t - r, r' / {RooflineTimes.MOST_OF_ROOFLINE}); t measured,"
            f" r its roofline there, r' here (FLOPs and bytes scaled by the devices' peaks); all-reduce unchanged."
            " errors are against these moved times, not against a device; time_share_by_source is the base device's"
        )
    return provenance


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    try:
        return write_profiles(arguments.out, arguments.only or profile_names(), arguments.seed)
    except AmpdError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m planner.gpu_profiles",
        description="Make profiles of GPUs from aiconfigurator's tables (pip install aiconfigurator-core==0.12.*).",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the JSON files go")
    parser.add_argument(
        "--only",
        action="append",
        choices=profile_names(),
        metavar="NAME",
        help=f"this one; may be given again (default: all of {', '.join(profile_names())})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the held-out points (default: %(default)s)")
    return parser


def write_profiles(folder: Path, names: Sequence[str], seed: int) -> int:
    """0; raises AmpdError. Each file is complete or absent."""
    from rich.console import Console
    from rich.progress import track

    if not folder.is_dir():
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"{folder} is not a folder: make it, or give another --out")
    console = Console(stderr=True)
    pairs = [(gpu, model) for gpu in GPUS for model in MODELS if f"{gpu.name}-{model.name}" in names]
    for gpu, model in track(pairs, description="profiles", console=console):
        profile = make_profile(gpu, model, seed=seed)
        partial = folder / f".{profile.name}.partial"
        partial.write_bytes(encode_profile(profile))
        partial.replace(folder / f"{profile.name}.json")
        degrees = ", ".join(str(degree.parallel_degree) for degree in profile.degrees)
        console.print(f"{profile.name}: degrees {degrees}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
