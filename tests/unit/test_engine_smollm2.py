"""The engine on the real model: the same greedy tokens as `generate`, batched, over several rounds, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.engine.model_files import resolve_model
from shared.engine.model_runner import ModelRunner
from shared.engine.step import StepItem
from shared.messages import SamplingParams

pytestmark = pytest.mark.slow

NUM_NEW = 16
SESSIONS = [
    ["The capital of France is", " Its most famous tower is called"],
    ["def fibonacci(n):\n", "\n# the same with memoization\n"],
    ["Once upon a time, in a small village by the sea,", " The next morning"],
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model("smollm2")


def test_rounds_of_batched_sessions_equal_generate(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    runner = ModelRunner.load(folder, dtype="float32", num_blocks=64)
    assert runner.decoder_name == "native"
    assert runner.eos_token_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    tables = [list(range(1 + index, 61, 3)) for index in range(3)]
    conversations: list[list[int]] = [[], [], []]
    cached = [0, 0, 0]
    for round_index in range(2):
        for index, texts in enumerate(SESSIONS):
            conversations[index] += tokenizer.encode(texts[round_index])
        expected = [generate(reference, tokens) for tokens in conversations]
        lengths = [len(tokens) for tokens in conversations]
        for _ in range(NUM_NEW):
            items = [
                StepItem(tokens[cached[i] :], cached[i], tables[i], SamplingParams())
                for i, tokens in enumerate(conversations)
            ]
            sampled = runner.step(items)
            for i, token in enumerate(sampled):
                assert token is not None
                cached[i] = len(conversations[i])
                conversations[i].append(token)
        assert [tokens[length:] for tokens, length in zip(conversations, lengths, strict=True)] == expected
    assert "Paris" in tokenizer.decode(conversations[0])


def generate(reference: Any, tokens: list[int]) -> list[int]:
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        output = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=NUM_NEW,
            max_new_tokens=NUM_NEW,
            do_sample=False,
            pad_token_id=0,
        )
    new: list[int] = output[0, len(tokens) :].tolist()
    return new
