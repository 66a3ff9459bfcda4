"""`tiny-random`: a seeded random Llama of 0.9 M parameters and a byte-level tokenizer, for fast tests."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from shared.engine.model_tokenizer import SpecialTokens, write_tokenizer

CACHE_KEY = "tiny-random-v1"  # count up when what write_tiny_random writes changes
SEED = 20260214
MAX_POSITIONS = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Standard deviations, in units of 1/sqrt(fan in). Measured over six prompts of 40 tokens and 300 greedy tokens each:
# smaller ones fall into loops of one or two tokens, larger ones double the rounding noise of the logits (8e-6 here).
WEIGHT_GAIN = 1.5
LOGIT_GAIN = 1.0

VOCAB_SIZE, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 512, 128, 384, 4, 4, 2, 32
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_POSITIONS,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def write_tiny_random(folder: Path) -> None:
    """Write the whole model folder, the same weights every time."""
    special = SpecialTokens(bos="<|im_start|>", eos="<|im_end|>", pad="<|pad|>", unk="<|endoftext|>")
    write_tokenizer(folder, _make_tokenizer(), chat_template=CHATML, special=special, max_positions=MAX_POSITIONS)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    save_file(_draw_weights(), folder / "model.safetensors", metadata={"format": "pt"})


def _draw_weights() -> dict[str, NDArray[np.float32]]:
    """Every tensor of a Llama, under transformers' names; matrices are [rows out, columns in]."""
    random = np.random.Generator(np.random.PCG64(SEED))

    def matrix(rows: int, columns: int, std: float) -> NDArray[np.float32]:
        return random.standard_normal((rows, columns), dtype=np.float32) * np.float32(std)

    def linear(rows: int, columns: int) -> NDArray[np.float32]:
        return matrix(rows, columns, WEIGHT_GAIN / math.sqrt(columns))

    ones = np.ones(HIDDEN, dtype=np.float32)
    weights = {"model.embed_tokens.weight": matrix(VOCAB_SIZE, HIDDEN, 1.0), "model.norm.weight": ones}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        weights |= {
            f"{name}.input_layernorm.weight": ones,
            f"{name}.self_attn.q_proj.weight": linear(HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.k_proj.weight": linear(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.v_proj.weight": linear(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.o_proj.weight": linear(HIDDEN, HEADS * HEAD_DIM),
            f"{name}.post_attention_layernorm.weight": ones,
            f"{name}.mlp.gate_proj.weight": linear(INTERMEDIATE, HIDDEN),
            f"{name}.mlp.up_proj.weight": linear(INTERMEDIATE, HIDDEN),
            f"{name}.mlp.down_proj.weight": linear(HIDDEN, INTERMEDIATE),
        }
    weights["lm_head.weight"] = matrix(VOCAB_SIZE, HIDDEN, LOGIT_GAIN / math.sqrt(HIDDEN))
    return weights


def _make_tokenizer() -> Tokenizer:
    """512 tokens: 4 special, 256 bytes, 252 two-character merges, so that a token is not always one byte."""
    pairs = [
        *(a + b for a, b in product("bcdfghjklmnpqrstvwxyz", "aeiou")),
        *(a + b for a, b in product("aeiou", "bcdfghjklmnpqrstvwxyz")),
        *("Ġ" + a for a in "abcdefghijklmnopqrstuvwxyz"),  # Ġ is the byte alphabet's name for the space
        *("th", "sh", "ch", "ph", "wh", "ck", "st", "nd", "ng", "nt", "ll", "ss", "ee", "oo", "ea", "ou"),
    ]
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *pairs]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(pair[0], pair[1]) for pair in pairs]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer
