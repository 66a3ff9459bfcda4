"""What only a GPU can show. The token-equality suite (tests/unit/test_engine_equality.py) has a cuda variant too:

pytest -m gpu tests/unit/test_engine_equality.py tests/gpu
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shared.core.types import KvLayout, Segment
from shared.engine.kv_pool import KvPool
from shared.engine.model_runner import ModelRunner
from shared.engine.step import StepItem
from shared.errors import KvTransferError
from shared.messages import SamplingParams

pytestmark = pytest.mark.gpu

LAYOUT = KvLayout(model="m", num_layers=4, num_kv_heads=2, head_dim=64, block_size=16, dtype="bfloat16")


def filled(device: str) -> KvPool:
    pool = KvPool(LAYOUT, 12, device)
    values = torch.randn(pool.tensor.shape, generator=torch.Generator().manual_seed(1))
    pool.tensor.copy_(values.to(torch.bfloat16))
    return pool


@pytest.mark.parametrize("segment", [Segment(0, 4, 0, 64), Segment(1, 3, 5, 50), Segment(2, 3, 16, 32)])
def test_segments_have_the_same_bytes_as_on_the_cpu(segment: Segment) -> None:
    host, device = filled("cpu"), filled("cuda")
    table = [7, 2, 11, 4]
    data = host.read_segment(table, segment)
    assert bytes(device.read_segment(table, segment)) == bytes(data)
    other = random.Random(2).randbytes(len(data))
    device.write_segment(table, segment, other)
    host.write_segment(table, segment, other)
    assert torch.equal(device.tensor.cpu().view(torch.int16), host.tensor.view(torch.int16))


def test_device_memory_has_no_host_views() -> None:
    assert not filled("cuda").has_views, "transfers and the host tier copy"
    with pytest.raises(KvTransferError, match="read_segment"):
        filled("cuda").segment_views([1], Segment(0, 1, 0, 4))


def test_kv_computed_on_the_cpu_continues_on_the_gpu(tmp_path: Path) -> None:
    """The layouts are equal, so the two may exchange KV; in float32 the greedy tokens agree."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    cpu = ModelRunner.load(tmp_path, dtype="float32", num_blocks=16)
    gpu = ModelRunner.load(tmp_path, dtype="float32", device="cuda", num_blocks=16)
    assert cpu.layout.layout_hash == gpu.layout.layout_hash
    tokens = random.Random(6).choices(range(200), k=40)
    [token] = cpu.step([StepItem(tokens, 0, [5, 9, 2], SamplingParams())])
    gpu.pool.write_segment([8, 1, 3], Segment(0, 3, 0, 40), cpu.pool.read_segment([5, 9, 2], Segment(0, 3, 0, 40)))
    for position in range(40, 48):
        assert token is not None
        [ours] = cpu.step([StepItem([token], position, [5, 9, 2], SamplingParams())])
        [theirs] = gpu.step([StepItem([token], position, [8, 1, 3], SamplingParams())])
        assert ours == theirs
        token = ours


def make_model(folder: Path) -> None:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=512,
        intermediate_size=2_048,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def test_a_layer_that_is_announced_can_be_read_beside_the_forward_pass(tmp_path: Path) -> None:
    """On another thread and stream, at once, while later layers are computed: the bytes are the final ones."""
    make_model(tmp_path)
    runner = ModelRunner.load(tmp_path, device="cuda", num_blocks=130)
    table = list(range(1, 129))
    read: dict[int, bytes] = {}

    def read_layer(layer: int) -> None:
        read[layer] = bytes(runner.pool.read_segment(table, Segment(layer, layer + 1, 0, 2_000)))

    tokens = random.Random(6).choices(range(200), k=2_000)
    runner.step([StepItem(tokens, 0, table, None, on_layer=read_layer)])
    assert sorted(read) == list(range(12))
    for layer, data in read.items():
        assert data == bytes(runner.pool.read_segment(table, Segment(layer, layer + 1, 0, 2_000)))
    runner.close()


def test_kv_is_in_the_pool_when_a_step_returns_that_has_sampled_nothing(tmp_path: Path) -> None:
    make_model(tmp_path)
    runner = ModelRunner.load(tmp_path, device="cuda", num_blocks=130)
    table = list(range(1, 129))
    tokens = random.Random(6).choices(range(200), k=2_000)
    runner.step([StepItem(tokens, 0, table, None)])
    first = bytes(runner.pool.read_segment(table, Segment(0, 12, 0, 2_000)))
    torch.cuda.synchronize()
    assert bytes(runner.pool.read_segment(table, Segment(0, 12, 0, 2_000))) == first
    runner.close()
