"""The real model: trained weights and the right tokenizer out of its package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.engine.model_files import resolve_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return resolve_model("smollm2")


def test_it_knows_the_capital_of_france(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        output = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    answer = tokenizer.decode(output[prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>"), "the configuration's EOS is the one the model was trained to write"


def test_its_special_tokens_are_single_ids(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>", add_special_tokens=False) == [0, 1, 2]
    assert tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == 8192


def test_its_pre_tokenizer_sets_every_digit_apart(smollm2: Path) -> None:
    """As the GGUF's `smollm` says: the two spaces stay one token, which GPT-2's pattern alone would split."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("a  31 b") == ["a", "ĠĠ", "3", "1", "Ġb"]


def test_its_template_is_chatml_with_the_default_system_prompt(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
