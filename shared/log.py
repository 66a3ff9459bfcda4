"""Structured logs: `key=value` lines for people, JSON for machines; no secrets and no prompts in either.

AMPD_LOG_FORMAT: console | logfmt | json (default: console on a terminal, json otherwise).
AMPD_LOG_LEVEL: debug | info | warning | error (default info).
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO, cast

import structlog

_MAX_VALUE_CHARS = 2000
_FORMATS = ("console", "logfmt", "json")
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
# Fields that may carry what a user wrote or a credential, whatever the caller meant by them.
_PRIVATE_FIELDS = frozenset(
    (
        "authorization",
        "content",
        "credentials",
        "data",
        "input",
        "messages",
        "nkey",
        "output_token_ids",
        "password",
        "payload",
        "prompt",
        "secret",
        "seed_key",
        "text",
        "ticket",
        "token",
        "token_ids",
        "tokens",
    )
)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


def hide_private_values(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """structlog processor: blank private fields, mask credentials in URLs, shorten what is long."""
    for key, value in event.items():
        if key in _PRIVATE_FIELDS and not isinstance(value, int | float | bool | None):
            event[key] = "[hidden]"
        elif isinstance(value, bytes | bytearray | memoryview):
            event[key] = f"<{len(value)} bytes>"
        elif isinstance(value, str):
            shortened = value if len(value) <= _MAX_VALUE_CHARS else value[:_MAX_VALUE_CHARS] + "…"
            event[key] = _URL_CREDENTIALS.sub("[hidden]@", shortened) if "://" in shortened else shortened
    return event


def configure_logging(service: str, *, stream: TextIO | None = None) -> None:
    """Send structlog's and the standard library's records to `stream` (default stderr), each with `service`.

    Raises ValueError when AMPD_LOG_FORMAT or AMPD_LOG_LEVEL has a value that is not listed above.
    """
    stream = stream or sys.stderr
    default_format = "console" if stream.isatty() else "json"
    log_format = _choose("AMPD_LOG_FORMAT", default_format, _FORMATS)
    level = _LEVELS[_choose("AMPD_LOG_LEVEL", "info", tuple(_LEVELS))]

    def add_service(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.setdefault("service", service)
        return event

    shared_processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_service,
        structlog.processors.format_exc_info,
        hide_private_values,
    ]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared_processors,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer(log_format)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared_processors,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,  # tests configure more than once
    )


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger named `name`; bind or pass fields as keywords, never inside the event text."""
    return cast(structlog.stdlib.BoundLogger, structlog.get_logger(name))


def _renderer(log_format: str) -> structlog.typing.Processor:
    match log_format:
        case "json":
            return structlog.processors.JSONRenderer()
        case "logfmt":
            return structlog.processors.LogfmtRenderer(
                key_order=["timestamp", "level", "service", "logger", "event"], bool_as_flag=False
            )
        case _:
            # plain tracebacks: the exception is already text, so that hide_private_values has seen it
            return structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)


def _choose(variable: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(variable, "") or default
    if value not in allowed:
        raise ValueError(f"{variable} must be one of {', '.join(allowed)}; it is {value!r}")
    return value
