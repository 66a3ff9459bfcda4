"""Tiny random models whose heads two ranks can share, and what is asked of engines that serve them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from shared.engine.model_runner import ModelRunner
from shared.engine.step import StepItem
from shared.messages import SamplingParams

VOCABULARY = 199  # odd: the ranks' parts of it differ in size
NUM_BLOCKS = 64
GREEDY = SamplingParams()
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 101,
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
    "llama-with-biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}


def write_model(family: str, folder: Path) -> Path:
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(7)
    model = model_class(config_class(**{**SHAPE, **extra}))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases start as ones and zeros, which would hide one added per rank
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return folder


class Sequence:
    """One sequence in scattered blocks, with a runner's tokens so far; `cached` of them have their KV in the pool."""

    def __init__(self, table: list[int], tokens: list[int]) -> None:
        self.table = table
        self.tokens = list(tokens)
        self.cached = 0

    def item(self, stop: int | None = None, **options: Any) -> StepItem:
        """Feed the tokens up to `stop` (then without sampling) or all of them."""
        fed = self.tokens[self.cached : stop]
        item = StepItem(fed, self.cached, self.table, GREEDY if stop is None else None, **options)
        self.cached += len(fed)
        return item


def step(runner: ModelRunner, *fed: tuple[Sequence, StepItem]) -> None:
    for (sequence, item), token in zip(fed, runner.step([item for _, item in fed]), strict=True):
        assert (token is None) is (item.sampling is None)
        if token is not None:
            sequence.tokens.append(token)


def decode(runner: ModelRunner, sequences: list[Sequence], count: int) -> None:
    for _ in range(count):
        step(runner, *((sequence, sequence.item()) for sequence in sequences))


def make_sequences(seed: int, lengths: list[int]) -> list[Sequence]:
    """Random prompts of these lengths, with room for 60 tokens each; no block is in two tables."""
    rng = random.Random(seed)
    blocks = rng.sample(range(1, NUM_BLOCKS), NUM_BLOCKS - 1)
    return [
        Sequence(
            [blocks.pop() for _ in range(-(-(length + 60) // 16))], [rng.randrange(VOCABULARY) for _ in range(length)]
        )
        for length in lengths
    ]
