"""The trained model end to end: chat rounds, local and remote, equal `generate` on the whole conversation in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.engine.model_files import resolve_model
from shared.messages import ChatMessage, unpack_token_ids

QUESTIONS = ("What is the capital of France?", "Which river runs through it?", "Answer in one word: is it in Europe?")


@pytest.mark.slow
async def test_a_chat_in_three_rounds_equals_generate(start_cluster: Any) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2"), dtype=torch.float32).eval()
    cluster = await start_cluster(model="smollm2", policy="local", kv_memory_mb=128)
    async with await cluster.client.open_session() as session:
        conversation: list[int] = []
        texts, placements = [], []
        for question in QUESTIONS:
            stream = await session.submit([ChatMessage(role="user", content=question)], max_output_tokens=24)
            result = await stream.result()
            info = await session.inspect(include_tokens=True)
            tokens = unpack_token_ids(info.token_ids)
            output = list(result.token_ids)
            assert tokens[: len(conversation)] == conversation
            assert tokens[len(tokens) - len(output) :] == output
            prompt = torch.tensor([tokens[: len(tokens) - len(output)]])
            expected = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False
            )[0, prompt.shape[1] :].tolist()
            assert output == expected
            conversation = tokens
            texts.append(result.text)
            placements.append(result.usage.prefill)
    assert "Paris" in texts[0]
    assert placements == ["remote", "local", "local"]
    await cluster.assert_everything_returned()
