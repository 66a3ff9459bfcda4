"""Loading: which folders and options are served, what is refused and how, and the folder's fingerprint."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from shared.engine.model_fingerprint import fingerprint_model
from shared.engine.model_loading import choose_dtype
from shared.engine.model_runner import ModelRunner
from shared.engine.step import StepItem
from shared.errors import AmpdError, ErrorCode
from shared.messages import SamplingParams

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


def save_llama(path: Path, seed: int = 1, **changes: Any) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def edit_config(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(AmpdError) as caught:
        ModelRunner.load(folder, num_blocks=8, **options)
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    return caught.value.message


def test_bad_options_are_refused_by_name(folder: Path) -> None:
    assert "float64" in refused(folder, dtype="float64")
    assert "'tpu'" in refused(folder, device="tpu")
    assert "flash" in refused(folder, attention="flash")
    assert "threads (0)" in refused(folder, threads=0)
    assert "block_size (0)" in refused(folder, block_size=0)
    if not torch.cuda.is_available():
        assert "no CUDA" in refused(folder, device="cuda")


def test_folders_that_are_not_models_are_refused(tmp_path: Path, folder: Path) -> None:
    assert "config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "safetensors" in refused(tmp_path)
    unknown = edit_config(folder, tmp_path / "unknown", model_type="no-such-model", architectures=["NoSuchModel"])
    assert "no-such-model" in refused(unknown)


def test_sliding_windows_are_refused(tmp_path: Path, folder: Path) -> None:
    MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=32)).save_pretrained(tmp_path / "mistral")
    assert "sliding_window" in refused(tmp_path / "mistral")
    qwen = edit_config(
        folder,
        tmp_path / "qwen2",
        model_type="qwen2",
        architectures=["Qwen2ForCausalLM"],
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=1,
    )
    assert "sliding" in refused(qwen)


def test_weights_that_are_cut_off_are_refused(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be loaded" in refused(tmp_path / "cut")


def test_missing_weights_are_refused(tmp_path: Path, folder: Path) -> None:
    """transformers would fill them with random values and go on."""
    deeper = edit_config(folder, tmp_path / "deeper", num_hidden_layers=3)
    assert "model.layers.2" in refused(deeper)


def test_a_model_with_its_own_arithmetic_keeps_it(tmp_path: Path) -> None:
    """Granite has Llama's modules but scales between them: native attention inside transformers' own layers."""
    torch.manual_seed(3)
    config = GraniteConfig(**SHAPE, residual_multiplier=0.5, logits_scaling=2.0, attention_multiplier=0.2)
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    native = ModelRunner.load(tmp_path, dtype="float32", num_blocks=8)
    reference = ModelRunner.load(tmp_path, dtype="float32", num_blocks=8, attention="sdpa")
    assert native.decoder_name == "transformers+native"
    tokens = [5, 9, 2, 7, 1, 8]
    num_cached = 0
    for _ in range(20):
        items = [StepItem(tokens[num_cached:], num_cached, [3, 1], SamplingParams())]
        [ours], [theirs] = native.step(items), reference.step(items)
        assert ours == theirs
        assert ours is not None
        num_cached = len(tokens)
        tokens.append(ours)


def test_dtype_auto_follows_the_processor(folder: Path) -> None:
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    assert choose_dtype("cpu") == ("bfloat16" if has_bf16 else "float32")
    assert choose_dtype("cuda:1") == "bfloat16"
    runner = ModelRunner.load(folder, num_blocks=4)
    assert runner.dtype == runner.layout.dtype == choose_dtype("cpu")


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"), [(7, None, {7}), (7, [3, 4], {3, 4}), (None, None, set())]
)
def test_eos_comes_from_the_generation_config_first(
    tmp_path: Path, folder: Path, in_config: int | None, in_generation: list[int] | None, expected: set[int]
) -> None:
    target = edit_config(folder, tmp_path / "model", eos_token_id=in_config)
    (target / "generation_config.json").unlink()
    if in_generation is not None:
        (target / "generation_config.json").write_text(json.dumps({"eos_token_id": in_generation}))
    assert ModelRunner.load(target, num_blocks=4).eos_token_ids == expected


def test_any_thread_may_be_the_one_that_steps(folder: Path) -> None:
    runner = ModelRunner.load(folder, dtype="float32", num_blocks=4, threads=1)
    items = [StepItem([1, 2, 3], 0, [2], SamplingParams())]
    here = runner.step(items)
    there: list[Any] = []
    thread = threading.Thread(target=lambda: there.append((runner.step(items), torch.get_num_threads())))
    thread.start()
    thread.join()
    assert there == [(here, 1)]


def test_sampled_tokens_depend_on_seed_and_index_alone(folder: Path) -> None:
    runner = ModelRunner.load(folder, dtype="float32", num_blocks=8)
    params = SamplingParams(temperature=1.5, seed=5)
    alone = [runner.step([StepItem([4, 8, 15], 0, [1], params, output_index=index)])[0] for index in range(30)]
    beside = [
        runner.step(
            [
                StepItem([9] * 20, 0, [2, 3], SamplingParams(temperature=1.0, seed=1)),
                StepItem([4, 8, 15], 0, [5], params, output_index=index),
            ]
        )[1]
        for index in range(30)
    ]
    assert alone == beside
    assert len(set(alone)) > 5


def test_the_fingerprint_is_the_folder_s_content(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint_model(tmp_path / "copy") == fingerprint_model(folder)
    renamed = edit_config(folder, tmp_path / "renamed", transformers_version="0", _name_or_path="elsewhere")
    assert fingerprint_model(renamed) == fingerprint_model(folder)
    other_config = edit_config(folder, tmp_path / "other-config", rms_norm_eps=1e-3)
    assert fingerprint_model(other_config) != fingerprint_model(folder)
    other_weights = save_llama(tmp_path / "other-weights", seed=2)
    assert fingerprint_model(other_weights) != fingerprint_model(folder)
