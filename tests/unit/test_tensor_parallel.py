"""A worker of two ranks computes what a worker of one computes: the same greedy tokens in float32, and the same KV.

The ranks are real processes, as in service.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tensor_parallel_models import NUM_BLOCKS, Sequence, decode, make_sequences, step, write_model

from shared.core.types import KvLayout, Segment
from shared.engine.attention import SdpaAttention
from shared.engine.kv_pool import KvPool
from shared.engine.model_runner import ModelRunner
from shared.engine.step import StepItem
from shared.engine.step_batch import build_step_batch
from shared.engine.transformers_decoder import TransformersDecoder, attend_paged

KV_TOLERANCE = 1e-4  # sums over ranks come in another order; KV is of size 1 to 10 here


@dataclass
class Runners:
    one: ModelRunner
    two: ModelRunner


@pytest.fixture(scope="module", params=[("llama", "native"), ("llama-with-biases", "padded"), ("qwen3", "sdpa")])
def runners(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runners]:
    family, attention = request.param
    folder = write_model(family, tmp_path_factory.mktemp(family))
    one, two = (
        ModelRunner.load(folder, dtype="float32", num_blocks=NUM_BLOCKS, attention=attention, parallel_degree=degree)
        for degree in (1, 2)
    )
    try:
        every_block = Segment(0, one.layout.num_layers, 0, (NUM_BLOCKS - 1) * 16)
        nan = np.full(every_block.num_bytes(one.layout) // 4, np.nan, dtype=np.float32).tobytes()
        for runner in (one, two):  # what stands in blocks nobody wrote must never reach a result
            runner.pool.write_segment(range(1, NUM_BLOCKS), every_block, nan)
        yield Runners(one, two)
    finally:
        two.close()


def serve(runner: ModelRunner, seed: int) -> list[Sequence]:
    """Chunked and whole prefills, steps that sample nothing, mixed batches, decoding, a second round."""
    first, second, third, fourth = sequences = make_sequences(seed, [70, 3, 33, 16])
    step(runner, (first, first.item(17)), (third, third.item(32)))
    step(runner, (first, first.item(18)))
    step(runner, (first, first.item()), (second, second.item()), (third, third.item()))
    decode(runner, [first, second, third], 5)
    step(runner, (first, first.item()), (fourth, fourth.item()), (second, second.item()))
    decode(runner, sequences, 6)
    for sequence in sequences:
        sequence.tokens += [5, 6, 7, 8]
    step(runner, *((sequence, sequence.item()) for sequence in sequences))
    decode(runner, sequences, 6)
    return sequences


def read_kv(runner: ModelRunner, sequence: Sequence) -> bytes:
    return bytes(runner.pool.read_segment(sequence.table, whole(runner, sequence)))


def whole(runner: ModelRunner, sequence: Sequence) -> Segment:
    return Segment(0, runner.layout.num_layers, 0, sequence.cached)


def assert_kv_close(one: bytes, two: bytes) -> None:
    assert len(one) == len(two)
    np.testing.assert_allclose(
        np.frombuffer(two, np.float32), np.frombuffer(one, np.float32), rtol=0, atol=KV_TOLERANCE
    )


@pytest.mark.parametrize("seed", range(2))
def test_tokens_and_kv_are_those_of_one_rank(runners: Runners, seed: int) -> None:
    alone, together = serve(runners.one, seed), serve(runners.two, seed)
    assert [sequence.tokens for sequence in together] == [sequence.tokens for sequence in alone]
    assert runners.one.layout.layout_hash == runners.two.layout.layout_hash
    for a, b in zip(alone, together, strict=True):
        assert_kv_close(read_kv(runners.one, a), read_kv(runners.two, b))


@pytest.mark.parametrize("direction", ["one to two", "two to one"])
def test_kv_of_one_degree_feeds_the_other(runners: Runners, direction: str) -> None:
    """Prefill here, decode there, back for a second round: as if nothing had moved."""
    source, target = (runners.one, runners.two) if direction == "one to two" else (runners.two, runners.one)
    [stay] = make_sequences(11, [50])
    [moved] = make_sequences(11, [50])
    for runner, sequence in ((runners.one, stay), (source, moved)):
        step(runner, (sequence, sequence.item()))
    other_table = make_sequences(12, [50])[0].table
    for runner, table in ((target, other_table), (source, moved.table)):
        data = read_kv(source if runner is target else target, moved)
        segment = whole(runner, moved)
        moved.table = table
        runner.pool.write_segment(table, segment, data)
        assert bytes(runner.pool.read_segment(table, segment)) == data
        decode(runner, [moved], 10)
        decode(runners.one, [stay], 10)
        assert moved.tokens == stay.tokens
        moved.tokens += [9, 10, 11]
        stay.tokens += [9, 10, 11]


def test_a_layer_is_announced_when_it_is_in_every_ranks_pool(runners: Runners) -> None:
    """What can be read at the announcement is what the layer holds at the end, on both ranks' heads."""
    [sequence] = make_sequences(21, [40])
    seen: dict[int, bytes] = {}

    def read_layer(layer: int) -> bytes:
        return bytes(runners.two.pool.read_segment(sequence.table, Segment(layer, layer + 1, 0, 40)))

    step(
        runners.two,
        (sequence, sequence.item(on_layer=lambda layer: seen.__setitem__(layer, read_layer(layer)))),
    )
    num_layers = runners.two.layout.num_layers
    assert list(seen) == list(range(num_layers)), "in order, each once"
    assert seen == {layer: read_layer(layer) for layer in range(num_layers)}
    assert not any(np.isnan(np.frombuffer(data, np.float32)).any() for data in seen.values())


class SummingModel:
    """Stands in for a transformers model of two layers: attention, then the sum over the ranks."""

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def __call__(self, *, paged: Any, paged_batch: Any, **_: Any) -> Any:
        for layer in range(2):
            module = torch.nn.Module()
            module.layer_idx = layer
            rows = torch.ones(1, 2, 1, 4)
            attend_paged(module, rows, rows, rows, None, scaling=1.0, paged=paged, paged_batch=paged_batch)
            self._events.append(f"summed {layer}")
        return type("Output", (), {"logits": torch.zeros(1, 1, 8)})


@pytest.mark.parametrize(
    ("is_shard", "order"),
    [
        (False, ["announced 0", "summed 0", "announced 1", "summed 1"]),
        (True, ["summed 0", "announced 0", "summed 1", "announced 1"]),
    ],
)
def test_a_rank_announces_a_layer_after_its_sum(is_shard: bool, order: list[str]) -> None:
    events: list[str] = []
    pool = KvPool(KvLayout(model="m", num_layers=2, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32"), 4)
    decoder = TransformersDecoder(SummingModel(events), pool, SdpaAttention(), is_shard=is_shard)
    item = StepItem([1], 0, [1], None, on_layer=lambda layer: events.append(f"announced {layer}"))
    decoder.forward(build_step_batch([item], pool, 16, 8))
    assert events == order
