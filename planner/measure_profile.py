"""`ampd profile`: run steps of our engine on this machine, time them, and fit a profile to the times.

Every repeat goes through all points in a new random order, so that a machine that becomes slower for a while does so
for all of them alike; a point's time is the median of its repeats.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from planner.busy_neighbours import busy_neighbours
from planner.fit_profile import StepSample, StepShape, fit_degree
from planner.fit_summary import describe_points, summarise_fit
from planner.measure_links import LinkRates, measure_links
from planner.profile_points import BLOCK_SIZE, PointLimits, choose_held_out_shapes, choose_training_shapes
from planner.step_meter import ProfileOptions, StepMeter, load_runner
from shared.core.profile import Links, Profile

LONG_STEP_TOKENS = 600  # a step of more tokens takes seconds: every other repeat leaves it out
SHORT_STEP_TOKENS, SHORT_STEP_RUNS = 64, 3  # a step of fewer takes milliseconds: several runs in a row
DEVICES_PER_NODE = 2

Meter = Callable[[StepShape], float]
Progress = Callable[[str, int, int], None]  # (what, done, of how many)


def measure_profile(options: ProfileOptions, provenance: Mapping[str, Any], progress: Progress) -> Profile:
    """Measure and fit; `provenance` (machine, versions, command) is kept, with the points and the fit's errors.

    Takes 10 seconds to 10 minutes of one core (of `threads`). Raises AmpdError INVALID_REQUEST that says what to
    change: a model that cannot be served, a pool too small for one context, a context the model does not have.
    """
    runner = load_runner(options)
    num_kv_tokens = (runner.pool.num_blocks - 1) * BLOCK_SIZE
    limits = PointLimits(num_kv_tokens=num_kv_tokens, max_context_tokens=options.max_context)
    training = choose_training_shapes(limits, quick=options.quick)
    held_out = choose_held_out_shapes(limits, quick=options.quick, seed=options.seed)
    meter = StepMeter(runner, options.threads, random.Random(options.seed), alone=options.workers == 1)
    # the longest step first: buffers grow to their final size, and no measured step pays for that
    meter(max(training, key=lambda shape: shape.num_tokens))
    with busy_neighbours(options, options.workers - 1):
        taken, num_repeats = measure_steps(
            meter,
            [*training, *held_out],
            repeats=options.repeats,
            time_limit_s=options.time_limit_s,
            rng=random.Random(options.seed),
            clock=time.monotonic,
            progress=progress,
        )
    samples = [StepSample(shape, taken[shape], held_out=index >= len(training))
               for index, shape in enumerate([*training, *held_out])]  # fmt: skip
    links = measure_links(runner.layout, repeats=3 if options.quick else 9)
    degree = fit_degree(samples, parallel_degree=1, num_kv_tokens=num_kv_tokens, max_context_tokens=options.max_context)
    measurement = {
        "num_repeats": num_repeats,
        "clock": meter.clock_name,
        "running_over_wall": _round(meter.running_s / meter.wall_s),
        "decoder": runner.decoder_name,
        "dtype": runner.dtype,
        "links": _describe_links(links),
        "points": describe_points(samples),
    }
    profile = Profile(
        name=options.name,
        model=options.model,
        device=str(provenance.get("machine", {}).get("cpu", "cpu")),
        provenance={**provenance, **NOTES, **measurement},
        max_context_tokens=options.max_context,
        vocab_size=runner.vocab_size,
        kv_bytes_per_token=runner.layout.bytes_per_token,
        host_kv_bytes=options.host_kv_mb * 1_000_000,
        links=Links(
            devices_per_node=DEVICES_PER_NODE,
            intra_node_bytes_per_s=_round(links.unix_bytes_per_s),
            inter_node_bytes_per_s=_round(links.tcp_bytes_per_s),
            host_bytes_per_s=_round(links.copy_bytes_per_s),
            latency_s=_round(links.latency_s),
        ),
        degrees=(degree,),
    )
    summary = summarise_fit(profile)
    profile.provenance["fit"] = {key: summary[key] for key in summary if key not in {"name", "rows"}}
    return profile


NOTES: dict[str, Any] = {
    "source": "ampd profile: our engine's own steps, timed on this machine",
    "linear": "tokens of the step; every prefill chunk samples one token, as the last chunk of a prefill does",
    "prefill_attention": "history x chunk; chunks longer than the longest measured one follow pairs of tokens, "
    "chunk x (history + chunk / 2)",
    "decode_attention": "sequences x mean context; includes the logits of every sequence; where sequences x context "
    "exceeds the pool, it follows the straight-line model of the fit",
    "num_kv_tokens": "--kv-memory-mb over the bytes of a token, in whole blocks, without the padding block",
    "devices_per_node": f"{DEVICES_PER_NODE}: a device is a core with a worker of --threads threads; workers on one "
    "machine share its memory bandwidth, which only a profile with --workers shows",
    "intra_node": "KV pulls over a Unix socket between two processes, our own data plane",
    "inter_node": "the same over TCP loopback: one machine has no other network to measure",
    "host": "one thread's memory copy (numpy.copyto)",
}


def measure_steps(
    meter: Meter,
    shapes: Sequence[StepShape],
    *,
    repeats: int,
    time_limit_s: float,
    rng: random.Random,
    clock: Callable[[], float],
    progress: Progress,
) -> tuple[dict[StepShape, float], int]:
    """The median seconds of every shape, and how many repeats were made.

    No repeat is begun that would, at the pace so far, end after time_limit_s; the first one is always completed.
    """
    seconds: dict[StepShape, list[float]] = {shape: [] for shape in shapes}
    started = clock()
    done = 0
    total = sum(len(_order_repeat(seconds, repeat, rng=None)) for repeat in range(repeats))
    for repeat in range(repeats):
        elapsed_s = clock() - started
        if repeat > 0 and elapsed_s * (repeat + 1) / repeat > time_limit_s:
            progress("steps", total, total)
            return _take_medians(seconds), repeat
        for shape in _order_repeat(seconds, repeat, rng):
            runs = SHORT_STEP_RUNS if shape.num_tokens <= SHORT_STEP_TOKENS else 1
            seconds[shape] += [meter(shape) for _ in range(runs)]
            done += 1
            progress("steps", done, total)
    return _take_medians(seconds), repeats


def _order_repeat(shapes: Mapping[StepShape, object], repeat: int, rng: random.Random | None) -> list[StepShape]:
    chosen = [shape for shape in shapes if repeat % 2 == 0 or shape.num_tokens <= LONG_STEP_TOKENS]
    if rng is not None:
        rng.shuffle(chosen)
    return chosen


def _take_medians(seconds: Mapping[StepShape, Sequence[float]]) -> dict[StepShape, float]:
    return {shape: statistics.median(taken) for shape, taken in seconds.items()}


def _describe_links(links: LinkRates) -> list[dict[str, Any]]:
    return [
        {"family": family, "bytes": num_bytes, "median_s": _round(seconds)}
        for family, num_bytes, seconds in links.samples
    ]


def _round(value: float) -> float:
    return float(f"{value:.5g}")
