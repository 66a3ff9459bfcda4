"""The tokenizer files of a model folder that we make: tokenizer.json, tokenizer_config.json, chat_template.jinja."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer


class SpecialTokens(NamedTuple):
    bos: str
    eos: str
    pad: str
    unk: str


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, *, chat_template: str, special: SpecialTokens, max_positions: int
) -> None:
    """Write the three files; both transformers and shared.text read them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special.bos,
        "eos_token": special.eos,
        "pad_token": special.pad,
        "unk_token": special.unk,
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
