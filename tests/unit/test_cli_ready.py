"""What `ampd up` says when its cluster is ready, and the words for a data directory of another engine."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from services.cluster_options import ClusterOptions
from services.data_dir import check_same_model
from services.up import print_ready
from shared.errors import AmpdError

EMULATED = ClusterOptions(
    num_prefill=0,
    num_decode=3,
    num_both=5,
    engine="emulated",
    profile="h100-qwen3-32b",
    time_scale=10.0,
    parallel_degree=2,
    policy="adaptive",
    disabled_parts=("moves",),
    policy_options=("order.ageing=3",),
)


def shown(options: ClusterOptions) -> str:
    console = Console(file=io.StringIO(), width=120)
    cluster: Any = SimpleNamespace(url="nats://127.0.0.1:1", log_dir=Path("logs"))
    print_ready(cluster, options, console)
    return console.file.getvalue()


def test_an_emulated_cluster_says_its_profile_time_scale_and_all_its_workers() -> None:
    text = shown(EMULATED)
    assert "3 decode + 5 prefill-and-decode worker(s), 2 devices each" in text
    assert "h100-qwen3-32b (emulated), time scale 10" in text
    assert "policy adaptive without moves, order.ageing=3" in text
    assert "ampd chat" not in text, "it has no text"
    assert "loadgen replay" in text


def test_a_computing_cluster_says_its_model_and_the_profile_it_predicts_with() -> None:
    text = shown(ClusterOptions(profile="cpu-smollm2"))
    assert "1 prefill + 1 decode worker(s)" in text
    assert "model smollm2, auto, cpu; profile cpu-smollm2" in text
    assert "ampd chat" in text


def test_a_data_directory_of_an_emulated_cluster_says_how_to_serve_it_again(tmp_path: Path) -> None:
    check_same_model(tmp_path, EMULATED.served)
    check_same_model(tmp_path, EMULATED.served)
    with pytest.raises(AmpdError, match="give --engine emulated --profile h100-qwen3-32b, or another --data-dir"):
        check_same_model(tmp_path, ClusterOptions().served)


def test_a_data_directory_of_a_model_says_its_model(tmp_path: Path) -> None:
    check_same_model(tmp_path, ClusterOptions().served)
    with pytest.raises(AmpdError, match="give --model smollm2, or another --data-dir"):
        check_same_model(tmp_path, EMULATED.served)
