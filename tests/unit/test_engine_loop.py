"""The engine loop on a real (tiny) model: sessions of several rounds, batched, chunked, preempted and evicted, give
exactly the tokens of `generate` on each whole conversation, and every block comes back."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.core.batching import Sequence, SessionKv
from shared.core.sequences import PlannedItem
from shared.core.types import RoundKey, SessionKey
from shared.engine.engine_loop import EngineLoop, build_scheduler
from shared.engine.model_files import resolve_model
from shared.engine.model_runner import ModelRunner
from shared.engine.step import StepItem
from shared.messages import SamplingParams


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return resolve_model("tiny-random")


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # the rounds here run to their length
    return model


def generate(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    inputs = torch.tensor([prompt])
    output = model.generate(  # type: ignore[operator]
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


class RoundRunner:
    """Runs rounds of sessions through an EngineLoop, as the decode role does for local prefills."""

    def __init__(self, engine: EngineLoop) -> None:
        self.engine = engine

    async def run(self, kv: SessionKv, round_index: int, prompt: list[int], num_tokens: int) -> list[int]:
        kv.tokens.extend(prompt)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sequence = Sequence(
            RoundKey(*kv.key[:2], round_index, 1), kv, SamplingParams(), kv.num_tokens, arrival=self.engine.clock()
        )

        def on_token(ended: Sequence, token: int) -> None:
            if ended.kv.num_tokens - ended.output_start == num_tokens:
                self.engine.finish(ended)
                done.set_result(None)

        self.engine.submit(sequence, on_token)
        await done
        return kv.tokens[sequence.output_start :].tolist()


@pytest.mark.parametrize(
    ("num_blocks", "chunk"), [(400, 64), (400, 5), (48, 16)], ids=["roomy", "chunked", "preempting"]
)
async def test_rounds_equal_generate(model_dir: Path, reference: torch.nn.Module, num_blocks: int, chunk: int) -> None:
    runner = ModelRunner.load(model_dir, dtype="float32", num_blocks=num_blocks)
    scheduler = build_scheduler(runner, chunk_tokens=chunk, max_prefill_tokens=3 * chunk, max_batch=16)
    engine = EngineLoop(runner, scheduler, clock=time.monotonic)
    loop_task = asyncio.create_task(engine.run())
    rng = random.Random(5)

    async def session(name: int) -> None:
        key = SessionKey("t", str(name))
        kv = scheduler.sessions[key] = SessionKv(key)
        conversation: list[int] = []
        for round_index in range(rng.randint(2, 4)):
            prompt = [rng.randrange(300) for _ in range(rng.randint(1, 90))]
            conversation += prompt
            expected = generate(reference, conversation, 12)
            assert await RoundRunner(engine).run(kv, round_index, prompt, 12) == expected
            conversation += expected

    try:
        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            for name in range(8):
                group.create_task(session(name))
    finally:
        loop_task.cancel()
        await asyncio.gather(loop_task, return_exceptions=True)
    if num_blocks < 100:
        assert scheduler.preemption.num_preemptions + scheduler.memory.num_evictions > 0, (
            "the small pool was to be too small"
        )
    for key in list(scheduler.sessions):
        scheduler.drop(key)
    scheduler.check_integrity()
    assert scheduler.allocator.num_free == scheduler.allocator.num_usable


async def test_a_step_takes_from_the_end_of_the_one_before(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done between two steps makes the second's tokens later; what the engine waited for work does not."""
    now_s = 0.0
    taken_s: list[float] = []
    runner = ModelRunner.load(model_dir, dtype="float32", num_blocks=100)
    scheduler = build_scheduler(runner, chunk_tokens=8, max_prefill_tokens=8, max_batch=4)
    engine = EngineLoop(runner, scheduler, clock=lambda: now_s)
    step, plan_step = runner.step, scheduler.plan_step
    idle = asyncio.Event()

    def take_a_second(items: list[StepItem]) -> list[int | None]:
        nonlocal now_s
        now_s += 1.0
        return step(items)

    def plan(at_s: float) -> list[PlannedItem]:
        planned = plan_step(at_s)
        if not planned:
            idle.set()
        return planned

    monkeypatch.setattr(runner, "step", take_a_second)
    monkeypatch.setattr(scheduler, "plan_step", plan)
    monkeypatch.setattr(scheduler.predictor, "observe", lambda *step: taken_s.append(step[-1]))
    loop_task = asyncio.create_task(engine.run())
    try:
        for name in ("first", "second"):
            key = SessionKey("t", name)
            kv = scheduler.sessions[key] = SessionKv(key)
            kv.tokens.extend(range(5))
            idle.clear()

            def on_token(sequence: Sequence, token: int) -> None:
                nonlocal now_s
                now_s += 0.25
                if sequence.kv.num_tokens == 8:
                    engine.finish(sequence)

            round_key = RoundKey(*key, 0, 1)
            engine.submit(Sequence(round_key, kv, SamplingParams(), kv.num_tokens, arrival=now_s), on_token)
            await asyncio.wait_for(idle.wait(), 30)
            now_s += 100.0
    finally:
        loop_task.cancel()
        await asyncio.gather(loop_task, return_exceptions=True)
    assert taken_s == [1.0, 1.25, 1.25] * 2


async def test_remove_waits_for_the_step_that_uses_the_blocks(model_dir: Path) -> None:
    runner = ModelRunner.load(model_dir, dtype="float32", num_blocks=100)
    engine = EngineLoop(
        runner, build_scheduler(runner, chunk_tokens=8, max_prefill_tokens=8, max_batch=4), clock=time.monotonic
    )
    key = SessionKey("t", "s")
    kv = engine.scheduler.sessions[key] = SessionKv(key)
    kv.tokens.extend(range(200))
    sequence = Sequence(RoundKey("t", "s", 0, 1), kv, SamplingParams(), kv.num_tokens, arrival=0.0)
    in_layer, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def on_layer(layer: int, start: int, stop: int) -> None:
        loop.call_soon_threadsafe(in_layer.set)
        go_on.wait(10)

    sequence.on_layer = on_layer
    loop_task = asyncio.create_task(engine.run())
    engine.submit(sequence, lambda ended, token: None)
    await in_layer.wait()
    removing = asyncio.create_task(engine.remove(sequence))
    await asyncio.sleep(0)
    assert not removing.done()
    assert kv.sequence is sequence
    go_on.set()
    await removing
    assert kv.sequence is None
    engine.scheduler.drop(key)
    assert engine.scheduler.allocator.num_free == engine.scheduler.allocator.num_usable
    loop_task.cancel()
    await asyncio.gather(loop_task, return_exceptions=True)
