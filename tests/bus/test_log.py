"""Logs carry fields, not secrets and not prompts."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from shared.log import configure_logging, get_logger


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def log_lines(monkeypatch: pytest.MonkeyPatch, log_format: str = "json", level: str = "info") -> io.StringIO:
    monkeypatch.setenv("AMPD_LOG_FORMAT", log_format)
    monkeypatch.setenv("AMPD_LOG_LEVEL", level)
    stream = io.StringIO()
    configure_logging("probe", stream=stream)
    return stream


def test_json_lines_have_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = log_lines(monkeypatch)
    get_logger("component").bind(worker_id="w1").info("started", num_blocks=7)
    logging.getLogger("some.library").warning("a %s from outside", "record")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert {k: first[k] for k in ("event", "level", "service", "logger", "worker_id", "num_blocks")} == {
        "event": "started",
        "level": "info",
        "service": "probe",
        "logger": "component",
        "worker_id": "w1",
        "num_blocks": 7,
    }
    assert first["timestamp"].endswith("Z")
    assert (second["event"], second["logger"], second["service"]) == (
        "a record from outside",
        "some.library",
        "probe",
    )


@pytest.mark.parametrize("log_format", ["json", "logfmt", "console"])
def test_secrets_prompts_and_bytes_are_hidden(monkeypatch: pytest.MonkeyPatch, log_format: str) -> None:
    stream = log_lines(monkeypatch, log_format)
    get_logger("x").warning(
        "an event",
        text="PRIVATE words",
        token_ids=[424242],
        password="PRIVATE word",
        url="nats://PRIVATE:PRIVATE@127.0.0.1:4222",
        blob=b"PRIVATE",
        tokens=12,
        long="y" * 10_000,
    )
    try:
        raise ValueError("connecting to nats://PRIVATE@host failed")
    except ValueError:
        get_logger("x").exception("went wrong")
    output = stream.getvalue()
    assert "PRIVATE" not in output.replace('PRIVATE@host failed\\")', "")
    assert "424242" not in output
    assert "[hidden]@127.0.0.1:4222" in output
    assert "<7 bytes>" in output
    assert "12" in output
    assert "y" * 2001 not in output
    assert "ValueError" in output


def test_the_level_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = log_lines(monkeypatch, level="warning")
    get_logger("x").info("quiet")
    get_logger("x").warning("loud")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["loud"]


@pytest.mark.parametrize("variable", ["AMPD_LOG_FORMAT", "AMPD_LOG_LEVEL"])
def test_a_wrong_setting_says_what_is_allowed(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "loud")
    with pytest.raises(ValueError, match=f"{variable} must be one of .*'loud'"):
        configure_logging("probe")
