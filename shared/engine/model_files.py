"""Where a model's weights are: a name or a folder in, a checked Hugging Face folder out. Never asks a hub.

`python -m shared.engine.model_files NAME` prints the folder; making it once may take half a minute, and says so.
torch is imported only when a folder is really made, so resolving one that exists costs milliseconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from shared.engine.model_cache import default_cache_dir, make_once
from shared.errors import AmpdError, ErrorCode
from shared.json_files import read_json_object

Progress = Callable[[str], None]
BUILT_IN_MODELS = ("smollm2", "tiny-random")


def resolve_model(name: str, *, cache_dir: Path | None = None, progress: Callable[[str], None] | None = None) -> Path:
    """The folder of a causal language model: config.json, safetensors weights and, for text, its tokenizer.

    `name` is `smollm2`, `tiny-random` or the path of a folder. The first two are made once and kept in
    `cache_dir` (else $AMPD_CACHE_DIR, $XDG_CACHE_HOME/ampd, ~/.cache/ampd); any number of processes may ask
    at the same time, one makes it. `progress` gets a line at each step that takes time.

    Raises AmpdError INVALID_REQUEST, naming what is missing.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it at import; nothing here may reach a hub
    report = progress or _say_nothing
    cache = cache_dir or default_cache_dir()
    if name == "smollm2":
        from shared.engine.model_smollm2 import cache_key, convert_smollm2, find_gguf

        gguf = find_gguf()
        folder = make_once(cache, cache_key(), lambda into: convert_smollm2(gguf, into, report), report)
    elif name == "tiny-random":
        from shared.engine.model_tiny import CACHE_KEY, write_tiny_random

        folder = make_once(cache, CACHE_KEY, write_tiny_random, report)
    else:
        folder = Path(name).expanduser()
    check_model_folder(folder)
    return folder.resolve()


def _say_nothing(line: str) -> None:
    pass


def check_model_folder(folder: Path) -> None:
    """Raise AmpdError INVALID_REQUEST unless `folder` holds a causal language model in safetensors, complete."""
    if not folder.is_dir():
        raise _invalid(
            f"model {str(folder)!r} is neither one of {', '.join(BUILT_IN_MODELS)} nor a folder: give the path of a "
            "folder with config.json and *.safetensors (a hub's names are not fetched)"
        )
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise _invalid(f"{config_path} is missing: {folder} is not a Hugging Face model folder")
    config = read_json_object(config_path)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not any(str(a).endswith("ForCausalLM") for a in architectures):
        raise _invalid(
            f"{config_path}: architectures is {architectures!r}, but a causal language model (...ForCausalLM) is needed"
        )
    _check_weights(folder)


def _check_weights(folder: Path) -> None:
    """Every safetensors file that the model needs is there and as long as its header says."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise _invalid(f"{index} has no weight_map: fetch the model again")
        names = sorted({str(name) for name in weight_map.values()})
    else:
        names = ["model.safetensors"]
    for name in names:
        path = folder / name
        if Path(name).name != name:
            raise _invalid(f"{index} names {name!r}, which is not a file of its own folder")
        if not path.is_file():
            raise _invalid(f"{path} is missing: weights must be safetensors files (.bin and .gguf are not read)")
        _check_safetensors(path)


def _check_safetensors(path: Path) -> None:
    """The header can be read and the file is as long as it says (not a pointer file, not cut off)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise _invalid(f"{path} is not a complete safetensors file ({error}): fetch it again") from error


def _invalid(message: str) -> AmpdError:
    return AmpdError(ErrorCode.INVALID_REQUEST, message)


def main(arguments: list[str]) -> int:
    """Print the folder of the model named; progress and errors go to stderr. Exit status 2 on an error."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(f"usage: python -m shared.engine.model_files {{{'|'.join(BUILT_IN_MODELS)}|FOLDER}}", file=sys.stderr)
        return 2
    try:
        folder = resolve_model(arguments[0], progress=lambda line: print(line, file=sys.stderr, flush=True))
    except AmpdError as error:
        print(error.message, file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
