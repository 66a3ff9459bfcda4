"""A fingerprint of a model folder: equal for copies of it, different for other weights, and cheap at any size."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

SAMPLES_PER_FILE = 64
SAMPLE_BYTES = 1024
# What tools write into config.json about themselves rather than about the model.
VOLATILE_CONFIG_KEYS = {"transformers_version", "_name_or_path", "torch_dtype", "dtype"}


def fingerprint_model(model_dir: Path) -> str:
    """16 hex digits from config.json and, of each *.safetensors: its size, its header and evenly spaced samples.

    Headers alone do not tell two sets of weights of one shape apart; the samples do, without reading gigabytes.
    """
    config = json.loads((model_dir / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in VOLATILE_CONFIG_KEYS}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for path in sorted(model_dir.glob("*.safetensors")):
        _add_file(digest, path)
    return digest.hexdigest()[:16]


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name}|{size}|".encode())
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > size - 8:
            return  # not a safetensors file: loading it says so better than we can
        digest.update(file.read(header_bytes))
        for index in range(SAMPLES_PER_FILE):
            file.seek(8 + header_bytes + (size - 8 - header_bytes) * index // SAMPLES_PER_FILE)
            digest.update(file.read(SAMPLE_BYTES))
