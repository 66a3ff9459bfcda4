"""The `ampd` command line: what it takes, what it refuses and with which words, and that it starts fast."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services import cli
from services.cli import build_parser, main, split_at_double_dash

COMMANDS = ("up", "run", "status", "explain", "role", "chat", "simulate", "profile")


@pytest.fixture
def unused_url() -> Iterator[str]:
    """A port that nothing listens on, and that nothing else can take meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"nats://127.0.0.1:{bound.getsockname()[1]}"


def test_what_follows_the_first_double_dash_is_the_commands() -> None:
    assert split_at_double_dash(["run", "--port", "0", "--", "a", "--", "-b"]) == (
        ["run", "--port", "0"],
        ["a", "--", "-b"],
    )
    assert split_at_double_dash(["status"]) == (["status"], None)
    assert split_at_double_dash(["run", "--"]) == (["run"], [])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"example:\n  ampd {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["up", "--prefill", "-1"], "at least 0"),
        (["up", "--both", "-1"], "at least 0"),
        (["up", "--decode", "two"], "'two' is not a whole number"),
        (["up", "--policy", "best"], "'remote', 'local', 'threshold', 'ampd'"),
        (["up", "--disable", "routing"], "'moore_hodgson'"),
        (["up", "--engine", "gpu"], "'torch', 'emulated'"),
        (["up", "--dtype", "int4"], "bfloat16"),
        (["up", "--port", "70000"], "from 0 to 65535"),
        (["up", "--", "ls"], "only `ampd run` takes a command"),
        (["run", "--prefill", "1"], "after --"),
        (["run", "--"], "after --"),
        (["role", "decode-0", "idle"], "'prefill', 'decode', 'both'"),
        (["chat", "--temperature", "-1"], "at least 0"),
        (["chat", "--temperature", "nan"], "at least 0"),
        (["chat", "--max-output-tokens", "0"], "at least 1"),
    ],
)
def test_a_wrong_argument_exits_2_and_says_what_to_change(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--decode", "0"], "--decode or --both must be at least 1"),
        (["--engine", "emulated"], "--engine emulated needs --profile"),
        (["--profile", "no-such-profile"], "no profile 'no-such-profile'"),
        (["--policy-option", "routing.gamma=1"], "unknown policy option 'routing.gamma'"),
        (["--policy-option", "routing.alpha"], "must be PATH=VALUE"),
        (["--time-scale", "10"], "--engine emulated"),
        (["--parallel-degree", "2", "--profile", "cpu-smollm2"], "no parallel degree 2"),
        (["--engine", "emulated", "--profile", "no-such-profile"], "no profile 'no-such-profile'"),
    ],
)
def test_options_that_do_not_go_together_exit_2_before_anything_is_started(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *argv, "--", "true"]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_that_is_no_model_exits_2_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["run", "--model", str(tmp_path), "--", "true"])
    assert status == 2
    assert "config.json" in capsys.readouterr().err


def test_a_command_that_does_not_exist_exits_127(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--", "no-such-command-anywhere"]) == 127
    assert "no-such-command-anywhere: no such command" in capsys.readouterr().err


def test_status_and_chat_without_a_cluster_exit_1_and_say_where_they_looked(
    capsys: pytest.CaptureFixture[str], unused_url: str
) -> None:
    assert main(["status", "--nats-url", unused_url]) == 1
    assert main(["chat", "--nats-url", unused_url]) == 1
    errors = capsys.readouterr().err
    assert errors.count("start a cluster with `ampd up`") == 2
    assert unused_url.rpartition(":")[2] in errors


def test_the_url_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMPD_NATS_URL", "nats://127.0.0.1:1")
    assert build_parser().parse_args(["status"]).nats_url == "nats://127.0.0.1:1"
    monkeypatch.delenv("AMPD_NATS_URL")
    assert build_parser().parse_args(["status"]).nats_url == cli.DEFAULT_URL


def test_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys, services.cli; services.cli.build_parser();"
        "heavy = {'torch', 'transformers', 'nats', 'rich', 'msgspec', 'numpy'} & set(sys.modules);"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
