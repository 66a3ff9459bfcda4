"""The C++ kernels against torch, independent of batch and threads; and what happens where they cannot be used."""

from __future__ import annotations

import ctypes
import logging
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shared.core.types import KvLayout
from shared.engine import native
from shared.engine.attention import NativeAttention, SdpaAttention
from shared.engine.kv_pool import KvPool
from shared.engine.linear import PackedLinear, round_up
from shared.engine.model_runner import ModelRunner
from shared.engine.native import NativeUnavailable, load_kernels
from shared.engine.step import StepItem
from shared.engine.step_batch import StepBatch, build_step_batch
from shared.messages import SamplingParams

NUM_BLOCKS = 64


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return load_kernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 8, 13, 32, 100, 200])
def test_linear(kernels: ctypes.CDLL, dtype: torch.dtype, rows: int) -> None:
    """Two parts of odd sizes, one with a bias, more inputs than one block."""
    torch.manual_seed(rows)
    first = torch.nn.Linear(300, 37, bias=True, dtype=dtype)
    second = torch.nn.Linear(300, 90, bias=False, dtype=dtype)
    x = torch.randn(rows, 310)
    expected = [
        torch.nn.functional.linear(
            x[:, :300].double(), part.weight.double(), None if part.bias is None else part.bias.double()
        )
        for part in (first, second)
    ]
    packed = PackedLinear(kernels, [first, second], threads=1)
    assert packed.outputs == 48 + 96
    out = packed.apply(x, torch.full((rows, 150), float("nan")))
    torch.testing.assert_close(out[:, :37].double(), expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out[:, 48:138].double(), expected[1], atol=1e-4, rtol=1e-4)
    assert bool(out[:, packed.outputs :].isnan().all()), "written past the outputs"
    start = torch.randn(rows, 150)
    added = packed.apply(x, start.clone(), accumulate=True)
    torch.testing.assert_close(added[:, :37].double(), start[:, :37].double() + expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_other_rows(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    packed = PackedLinear(kernels, [torch.nn.Linear(600, 200, dtype=dtype)], threads=1)
    x = torch.randn(150, 600)
    together = packed.apply(x, torch.empty(150, round_up(200)))
    for count in (1, 2, 3, 4, 7, 20, 97):
        alone = packed.apply(x[:count], torch.empty(count, round_up(200)))
        assert torch.equal(alone, together[:count])


def make_attention_case(
    dtype: str, kv_heads: int, head_dim: int, block_size: int, lengths: list[tuple[int, int]]
) -> tuple[KvPool, StepBatch]:
    """`lengths` are (history, new tokens) of each sequence; slots beyond are NaN, as never written."""
    layout = KvLayout(
        model="m", num_layers=2, num_kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype
    )
    blocks = list(range(1, 400))
    random.Random(1).shuffle(blocks)
    pool = KvPool(layout, 400)
    items = []
    pool.tensor.fill_(float("nan"))
    for history, new in lengths:
        table = [blocks.pop() for _ in range(-(-(history + new) // block_size))]
        for position in range(history + new):
            pool.tensor[table[position // block_size], :, :, position % block_size] = torch.randn(
                2, 2, kv_heads, head_dim
            )
        items.append(StepItem([1] * new, history, table, None))
    return pool, build_step_batch(items, pool, 4096, 10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "head_dim", "block_size"),
    [(9, 3, 64, 16), (4, 4, 16, 16), (8, 1, 128, 16), (6, 2, 80, 5), (20, 1, 32, 32)],
)
def test_attention(
    kernels: ctypes.CDLL, dtype: str, query_heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    torch.manual_seed(0)
    lengths = [(0, 1), (63, 1), (64, 1), (130, 1), (0, 70), (50, 33), (1, 2)]
    pool, batch = make_attention_case(dtype, kv_heads, head_dim, block_size, lengths)
    queries = torch.randn(batch.num_tokens, query_heads, head_dim) * 3
    scaling = head_dim**-0.5
    ours = NativeAttention(kernels, 1).attend(1, queries, pool, batch, scaling)
    exact = KvPool(pool.layout, 2)
    exact.tensor = pool.tensor.double()
    expected = SdpaAttention().attend(1, queries.double(), exact, batch, scaling)
    torch.testing.assert_close(ours.double(), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_attention_does_not_depend_on_batch_or_chunk(kernels: ctypes.CDLL, threads: int) -> None:
    """The rows of one long prefill, computed alone, in chunks, and beside other sequences: the same bits."""
    torch.manual_seed(2)
    pool, whole = make_attention_case("float32", 3, 64, 16, [(0, 200)])
    queries = torch.randn(200, 9, 64)
    table = whole.items[0].block_table
    reference = NativeAttention(kernels, 1).attend(0, queries, pool, whole, 0.125)
    for start, stop in [(0, 1), (70, 71), (100, 103), (128, 200), (3, 199)]:
        items = [StepItem([1] * (stop - start), start, table, None), StepItem([1], 40, table, None)]
        batch = build_step_batch(items, pool, 4096, 10)
        rows = torch.cat([queries[start:stop], queries[40:41]])
        output = NativeAttention(kernels, threads).attend(0, rows, pool, batch, 0.125)
        assert torch.equal(output[:-1], reference[start:stop])
        assert torch.equal(output[-1], reference[40])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=144,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("native-model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(folder: Path, **options: str | int) -> ModelRunner:
    return ModelRunner.load(folder, num_blocks=NUM_BLOCKS, **{"dtype": "float32", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_is_the_same_bits_however_a_sequence_was_computed(folder: Path, dtype: str) -> None:
    """In one prefill, in chunks, token by token, beside others, with two threads."""
    tokens = random.Random(3).choices(range(300), k=90)
    other = random.Random(4).choices(range(300), k=40)
    one, two = load(folder, dtype=dtype), load(folder, dtype=dtype, threads=2)
    assert one.decoder_name == "native"
    tables = [list(range(1 + 6 * i, 7 + 6 * i)) for i in range(5)]
    one.step([StepItem(tokens, 0, tables[0], None)])
    expected = one.pool.tensor[tables[0]].flatten(0, 0)[:5]  # five whole blocks: 80 tokens
    for start in range(0, 90, 13):
        one.step([StepItem(tokens[start : start + 13], start, tables[1], None)])
    for index, token in enumerate(tokens):
        one.step([StepItem([token], index, tables[2], None)])
    one.step([StepItem(other, 0, tables[4], None), StepItem(tokens, 0, tables[3], None)])
    for table in tables[1:4]:
        assert torch.equal(one.pool.tensor[table][:5], expected)
    two.step([StepItem(tokens, 0, tables[0], None)])
    assert torch.equal(two.pool.tensor[tables[0]][:5], expected)


def test_bfloat16_follows_float32_to_its_precision(folder: Path) -> None:
    """The logits of a bfloat16 run differ from float32 by rounding, not by meaning."""
    tokens = random.Random(5).choices(range(300), k=60)
    logits = {}
    for dtype in ("float32", "bfloat16"):
        runner = load(folder, dtype=dtype)
        batch = build_step_batch([StepItem(tokens, 0, [3, 9, 1, 4], SamplingParams())], runner.pool, 512, 300)
        with torch.inference_mode():
            logits[dtype] = runner._decoder.forward(batch)[0]
    spread = float(logits["float32"].std())
    assert float((logits["float32"] - logits["bfloat16"]).abs().max()) < 0.1 * spread


def test_without_a_compiler_the_runner_says_so_and_uses_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    load_kernels.cache_clear()
    try:
        with pytest.raises(NativeUnavailable, match="install it"):
            load_kernels()
        with caplog.at_level(logging.WARNING):
            runner = load(folder, attention="native")
        assert runner.decoder_name == "transformers+padded"
        assert "no-such-compiler" in caplog.text
        assert "padded" in caplog.text
    finally:
        load_kernels.cache_clear()


def test_a_compiler_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "broken-compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho cannot compile >&2; exit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("AMPD_CACHE_DIR", str(tmp_path / "cache"))
    load_kernels.cache_clear()
    try:
        with pytest.raises(NativeUnavailable, match="cannot compile"):
            load_kernels()
    finally:
        load_kernels.cache_clear()


def test_the_kernels_are_built_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AMPD_CACHE_DIR", str(tmp_path))
    load_kernels.cache_clear()
    try:
        with caplog.at_level(logging.INFO, logger=native.__name__):
            load_kernels()
            assert "compiling" in caplog.text
            caplog.clear()
            load_kernels.cache_clear()
            load_kernels()
            assert "compiling" not in caplog.text
    finally:
        load_kernels.cache_clear()


def test_an_odd_head_size_goes_to_torch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        runner = load(tmp_path)
    assert runner.decoder_name == "transformers+padded"
    assert "head_dim 12" in caplog.text
