"""A model folder's chat template (Jinja), run in a sandbox with what transformers' templates may use.

The template is the model folder's own; nothing a client sends is ever compiled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import AmpdError, ErrorCode


class ChatTemplate:
    """`render` turns (role, content) messages into the text the model was trained on."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: Path) -> None:
        """`special_tokens` maps the names a template may use (bos_token, eos_token, ...) to their text."""
        try:
            self._template = _compile(source)
        except TemplateError as error:
            raise AmpdError(ErrorCode.INVALID_REQUEST, f"the chat template of {origin} is broken: {error}") from error
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(
        cls, model_dir: Path, tokenizer_config: Mapping[str, Any], special_tokens: Mapping[str, str]
    ) -> ChatTemplate | None:
        """From chat_template.jinja or tokenizer_config.json; None if the folder has none."""
        path = model_dir / "chat_template.jinja"
        source = path.read_text(encoding="utf-8") if path.is_file() else tokenizer_config.get("chat_template")
        if isinstance(source, list):  # several named templates: [{"name": ..., "template": ...}]
            source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
        return None if source is None else cls(source, special_tokens, model_dir)

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The conversation and the opening of the model's answer.

        Raises AmpdError INVALID_REQUEST with the template's own words when it refuses the messages.
        """
        try:
            return self._template.render(
                messages=[{"role": role, "content": content} for role, content in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
        ) as error:  # the latter two: an expression met None or a wrong type
            roles = ", ".join(role for role, _ in messages)
            raise AmpdError(
                ErrorCode.INVALID_REQUEST,
                f"the model's chat template refuses these messages (roles {roles}): {error}; "
                "change the roles or their order, or send the round as text or token ids",
            ) from error


def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the model's words for training; here it is its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; templates want plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
