"""Other engines that are busy on this machine while one is measured: workers share its memory bandwidth.

Each is a process of its own that runs steps of the measured shapes in random order until it is killed, or its parent is
gone.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import IO, NoReturn

from planner.profile_points import BLOCK_SIZE, PointLimits, choose_training_shapes
from planner.step_meter import ProfileOptions, StepMeter, load_runner
from shared.child_process import dying_with_this_process
from shared.errors import AmpdError, ErrorCode

READY = "ready"
START_TIMEOUT_S = 300.0


@contextmanager
def busy_neighbours(options: ProfileOptions, count: int) -> Iterator[None]:
    """`count` engines run while the block does. Raises AmpdError INTERNAL for one that does not start."""
    with ExitStack() as stack:
        children = [stack.enter_context(_start(options)) for _ in range(count)]
        for child in children:
            assert child.stdout is not None
            _wait_until_ready(child.stdout)
        yield


@contextmanager
def _start(options: ProfileOptions) -> Iterator[subprocess.Popen[str]]:
    content = json.dumps({**asdict(options), "model_dir": str(options.model_dir)})
    with subprocess.Popen(
        [sys.executable, "-m", "planner.busy_neighbours", content],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=dying_with_this_process(),
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def _wait_until_ready(output: IO[str]) -> None:
    with DefaultSelector() as selector:
        selector.register(output, EVENT_READ)
        line = output.readline() if selector.select(START_TIMEOUT_S) else ""
    if line.strip() != READY:
        raise AmpdError(ErrorCode.INTERNAL, "an engine that should run beside the measured one did not start")


def run_steps(options: ProfileOptions) -> NoReturn:
    rng = random.Random(options.seed + 1)
    runner = load_runner(options)
    meter = StepMeter(runner, options.threads, rng)
    limits = PointLimits(
        num_kv_tokens=(runner.pool.num_blocks - 1) * BLOCK_SIZE, max_context_tokens=options.max_context
    )
    shapes = choose_training_shapes(limits, quick=options.quick)
    meter(rng.choice(shapes))
    print(READY, flush=True)
    while True:
        meter(rng.choice(shapes))


def main() -> NoReturn:
    content = json.loads(sys.argv[1])
    run_steps(ProfileOptions(**{**content, "model_dir": Path(content["model_dir"])}))


if __name__ == "__main__":
    main()
