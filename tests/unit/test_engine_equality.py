"""Every attention back end gives, in float32, exactly the greedy tokens of transformers' `generate`.

The models are tiny and random, of four architectures; no dimension that may be odd is a multiple of a vector
length. Block tables are scattered: a table whose blocks happen to follow each other would hide a wrong lookup.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from shared.engine.model_runner import ModelRunner
from shared.engine.step import StepItem
from shared.messages import SamplingParams

NUM_NEW = 12
VOCABULARY = 199
NUM_BLOCKS = 96
GREEDY = SamplingParams()
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 42,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # spreads the logits: ties between tokens are then out of the question
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama3-rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 48}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}
BACKENDS = ["sdpa", "padded", "native"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (config_class, model_class, extra) in FAMILIES.items():
        torch.manual_seed(7)
        made[name] = tmp_path_factory.mktemp(name)
        model = model_class(config_class(**{**SHAPE, **extra}))
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros, which would hide a forgotten one
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Reference:
    """`generate` of the untouched model, remembering its answers: every back end is asked the same questions.

    Where the two best tokens are closer than rounding, float32 does not say which one is right, in transformers
    either. `prompt` chooses prompts that never lead there: the smallest margin is 50 times the rounding.
    """

    def __init__(self, folder: Path, device: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        self.model = model.to(device).eval()
        self.known: dict[tuple[int, ...], tuple[list[int], float]] = {}

    def generate(self, tokens: list[int]) -> list[int]:
        return self._ask(tokens)[0]

    def prompt(self, length: int, seed: int, *, after: Sequence[int] = ()) -> list[int]:
        """`length` random tokens, such that the greedy continuation of `after` and them is beyond doubt."""
        for attempt in range(20):
            tokens = random.Random(seed + 1000 * attempt).choices(range(VOCABULARY), k=length)
            if self._ask([*after, *tokens])[1] > 1e-3:
                return tokens
        raise AssertionError(f"no prompt of {length} tokens from seed {seed} has a clear continuation")

    def _ask(self, tokens: list[int]) -> tuple[list[int], float]:
        if tuple(tokens) not in self.known:
            ids = torch.tensor([tokens], device=self.model.device)
            with torch.inference_mode():
                output = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NUM_NEW,
                    do_sample=False,
                    pad_token_id=0,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            best = torch.cat(output.logits).topk(2).values
            margin = float((best[:, 0] - best[:, 1]).min())
            self.known[tuple(tokens)] = (output.sequences[0, len(tokens) :].tolist(), margin)
        return self.known[tuple(tokens)]


@pytest.fixture(scope="session")
def references(folders: dict[str, Path]) -> dict[tuple[str, str], Reference]:
    return {}


@pytest.fixture
def reference(
    references: dict[tuple[str, str], Reference], folders: dict[str, Path], family: str, device: str
) -> Reference:
    if (family, device) not in references:
        references[family, device] = Reference(folders[family], device)
    return references[family, device]


@pytest.fixture(scope="module", params=BACKENDS)
def runner(request: pytest.FixtureRequest, folders: dict[str, Path], family: str, device: str) -> ModelRunner:
    if device == "cuda" and request.param == "native":
        pytest.skip("the native back end is for the CPU")
    loaded = ModelRunner.load(
        folders[family],
        dtype="float32",
        device=device,
        threads=1,
        num_blocks=NUM_BLOCKS,
        attention=request.param,
    )
    assert request.param in loaded.decoder_name
    # What stands in blocks nobody wrote must never reach a result.
    loaded.pool.tensor.fill_(float("nan"))
    loaded.pool.tensor[0] = 0.0
    return loaded


class Blocks:
    """Hands out blocks in a shuffled order, so that neighbours in a sequence are not neighbours in the pool."""

    def __init__(self, seed: int) -> None:
        self.free = list(range(1, NUM_BLOCKS))
        random.Random(seed).shuffle(self.free)

    def table(self, num_tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-num_tokens // 16))]


def decode(
    runner: ModelRunner, tables: list[list[int]], lengths: list[int], last: list[int], count: int
) -> list[list[int]]:
    """`count` more tokens for every sequence, batched; `lengths` tokens of each have their KV in the pool."""
    outputs: list[list[int]] = [[] for _ in tables]
    for index in range(count):
        items = [
            StepItem([last[i]], lengths[i] + index, table, GREEDY, output_index=index) for i, table in enumerate(tables)
        ]
        for i, token in enumerate(runner.step(items)):
            assert token is not None
            outputs[i].append(token)
            last[i] = token
    return outputs


def continue_greedily(runner: ModelRunner, table: list[int], length: int, first: int | None) -> list[int]:
    assert first is not None
    return [first, *decode(runner, [table], [length], [first], NUM_NEW - 1)[0]]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 130])
def test_single_sequence(runner: ModelRunner, reference: Reference, length: int) -> None:
    tokens = reference.prompt(length, seed=length)
    table = Blocks(length).table(length + NUM_NEW)
    [first] = runner.step([StepItem(tokens, 0, table, GREEDY)])
    assert continue_greedily(runner, table, length, first) == reference.generate(tokens)


def test_batch_of_different_lengths(runner: ModelRunner, reference: Reference) -> None:
    lengths = [3, 40, 17, 1, 64, 16, 99, 5, 33]
    prompts = [reference.prompt(length, seed=100 + length) for length in lengths]
    blocks = Blocks(1)
    tables = [blocks.table(length + NUM_NEW) for length in lengths]
    first = runner.step([StepItem(tokens, 0, table, GREEDY) for tokens, table in zip(prompts, tables, strict=True)])
    assert None not in first
    rest = decode(runner, tables, lengths, [token for token in first if token is not None], NUM_NEW - 1)
    for tokens, start, continued in zip(prompts, first, rest, strict=True):
        assert [start, *continued] == reference.generate(tokens)


@pytest.mark.parametrize("chunk", [1, 7, 16, 50])
def test_chunked_prefill(runner: ModelRunner, reference: Reference, chunk: int) -> None:
    tokens = reference.prompt(101, seed=3)
    table = Blocks(chunk).table(101 + NUM_NEW)
    sampled: list[int | None] = []
    for start in range(0, 101, chunk):
        part = tokens[start : start + chunk]
        last = start + len(part) == 101
        sampled = runner.step([StepItem(part, start, table, GREEDY if last else None)])
        assert (sampled == [None]) is not last
    assert continue_greedily(runner, table, 101, sampled[0]) == reference.generate(tokens)


def test_rounds_of_a_session(runner: ModelRunner, reference: Reference) -> None:
    """The KV of a round's last sampled token does not exist yet: the next round's increment feeds it first."""
    table = Blocks(9).table(300)
    conversation: list[int] = []
    cached = 0
    for index, length in enumerate([21, 30, 1, 48]):
        conversation += reference.prompt(length, seed=200 + index, after=conversation)
        [first] = runner.step([StepItem(conversation[cached:], cached, table, GREEDY)])
        output = continue_greedily(runner, table, len(conversation), first)
        assert output == reference.generate(conversation)
        conversation += output
        cached = len(conversation) - 1


def test_mixed_batch(runner: ModelRunner, reference: Reference) -> None:
    """Decode, an increment, a first prefill and a chunk that wants no token, all in one step."""
    blocks = Blocks(4)
    decoding, history, fresh, partial = (reference.prompt(n, seed=300 + n) for n in (31, 60, 18, 70))
    tables = [blocks.table(120) for _ in range(4)]
    runner.step([StepItem(decoding[:-1], 0, tables[0], None), StepItem(history[:40], 0, tables[1], None)])
    sampled = runner.step(
        [
            StepItem(decoding[-1:], 30, tables[0], GREEDY),
            StepItem(partial[:33], 0, tables[3], None),
            StepItem(history[40:], 40, tables[1], GREEDY),
            StepItem(fresh, 0, tables[2], GREEDY),
        ]
    )
    assert sampled[1] is None
    [ended] = runner.step([StepItem(partial[33:], 33, tables[3], GREEDY)])
    firsts = [(decoding, tables[0], sampled[0]), (history, tables[1], sampled[2]), (fresh, tables[2], sampled[3])]
    for tokens, table, first in [*firsts, (partial, tables[3], ended)]:
        assert continue_greedily(runner, table, len(tokens), first) == reference.generate(tokens)


def test_kv_moved_as_bytes_continues_the_same(runner: ModelRunner, reference: Reference) -> None:
    """What a transfer does: the bytes of one table's segments go into other blocks, and decoding goes on there."""
    from shared.core.types import Segment

    tokens = reference.prompt(45, seed=5)
    blocks = Blocks(5)
    source, target = blocks.table(45), blocks.table(45 + NUM_NEW)
    [first] = runner.step([StepItem(tokens, 0, source, GREEDY)])
    for layer in range(runner.layout.num_layers):
        segment = Segment(layer, layer + 1, 0, 45)
        runner.pool.write_segment(target, segment, runner.pool.read_segment(source, segment))
    assert continue_greedily(runner, target, 45, first) == reference.generate(tokens)


def test_layers_are_announced_in_order_with_their_kv_in_the_pool(runner: ModelRunner, reference: Reference) -> None:
    table = Blocks(6).table(20)
    seen: list[tuple[int, bool]] = []

    def on_layer(layer: int) -> None:
        written = runner.pool.tensor[table[0], layer, :, :16]
        seen.append((layer, bool(torch.isfinite(written).all())))

    runner.pool.tensor[table] = float("nan")
    runner.step([StepItem(reference.prompt(20, seed=6), 0, table, None, on_layer=on_layer)])
    assert seen == [(layer, True) for layer in range(runner.layout.num_layers)]


def test_layout_describes_the_model(runner: ModelRunner, reference: Reference) -> None:
    layout = runner.layout
    kv_heads = reference.model.config.num_key_value_heads
    assert (layout.num_layers, layout.num_kv_heads, layout.block_size) == (3, kv_heads, 16)
    assert layout.head_dim == reference.model.model.layers[0].self_attn.head_dim
    assert runner.pool.tensor.shape == (NUM_BLOCKS, 3, 2, 16, kv_heads, layout.head_dim)
    assert (runner.vocab_size, runner.max_context_tokens, runner.dtype) == (VOCABULARY, 512, "float32")


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (StepItem([], 0, [1], GREEDY), "at least one new token"),
        (StepItem([1] * 17, 0, [1], GREEDY), "need 2 blocks"),
        (StepItem([1], 0, [0], GREEDY), "block 0"),
        (StepItem([1], 0, [NUM_BLOCKS], GREEDY), "not in the pool"),
        (StepItem([1], 512, list(range(1, 40)), GREEDY), "exceed the model's context"),
        (StepItem([VOCABULARY], 0, [1], GREEDY), "vocabulary"),
        (StepItem([-1], 0, [1], GREEDY), "vocabulary"),
    ],
)
def test_items_that_cannot_be_run_are_refused(runner: ModelRunner, item: StepItem, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        runner.step([item])
