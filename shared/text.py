"""Text and chat messages to token ids and back. No torch, and no transformers where the folder has tokenizer.json."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from shared.chat_template import ChatTemplate
from shared.control_tokens import ControlTokens
from shared.errors import AmpdError, ErrorCode
from shared.json_files import read_json_object
from shared.text_stream import StreamDecoder, TokenBytes

__all__ = ["StreamDecoder", "TextCodec"]

# A role reaches the text as it is, so it must not be able to look like anything else.
ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TextCodec:
    """A model folder's tokenizer and chat template. Immutable after loading, so any thread may use it."""

    def __init__(
        self,
        controls: ControlTokens,
        token_bytes: TokenBytes,
        template: ChatTemplate | None,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.vocab_size = vocab_size  # the model's, which may be larger than the tokenizer's
        self.eos_token_ids = eos_token_ids
        self._controls = controls
        self._token_bytes = token_bytes
        self._template = template

    @classmethod
    def load(cls, model_dir: Path) -> TextCodec:
        """Raises AmpdError INVALID_REQUEST, naming what is missing or broken in the folder."""
        config = read_json_object(model_dir / "config.json")
        generation_config = _read_if_there(model_dir / "generation_config.json")
        tokenizer_config = _read_if_there(model_dir / "tokenizer_config.json")
        document = _read_tokenizer_document(model_dir)
        special_tokens = _named_tokens(tokenizer_config)
        ids = {token["content"]: token["id"] for token in document["added_tokens"]}
        eos = _token_ids(config.get("eos_token_id")) | _token_ids(generation_config.get("eos_token_id"))
        named = [*special_tokens.values(), *_additional_tokens(tokenizer_config)]
        named += [text for text, token_id in ids.items() if token_id in eos]
        try:
            controls = ControlTokens(document, named)
        except AmpdError:
            raise
        except Exception as error:  # what a malformed file raises inside `tokenizers` has no type of its own
            raise AmpdError(
                ErrorCode.INVALID_REQUEST, f"the tokenizer of {model_dir} cannot be loaded: {error}"
            ) from error
        if "eos_token" in special_tokens:
            eos |= controls.ids_of(special_tokens["eos_token"])
        text_config = config.get("text_config", config)  # multimodal models nest it
        return cls(
            controls,
            TokenBytes(controls.tokenizer, document.get("decoder")),
            ChatTemplate.load(model_dir, tokenizer_config, special_tokens),
            vocab_size=text_config.get("vocab_size") or controls.num_tokens,
            eos_token_ids=eos,
        )

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode_text(self, text: str) -> list[int]:
        """Ids of the text and nothing more; what looks like a special token is text like any other."""
        return self._controls.encode_plain(text)

    def encode_chat(
        self, messages: Sequence[tuple[str, str]], *, first_round: bool, previous_ended_with_eos: bool
    ) -> list[int]:
        """The ids a round adds to the session for its new (role, content) messages.

        In the first round: the whole template, up to the opening of the model's answer. In a later one: what closes
        the model's last answer (less the EOS if the model itself produced one), the messages, the next opening. So
        history + increment is the template applied to the whole conversation, for templates that write each turn
        independently of later ones. Special tokens come from the template only, never out of a message.

        Raises AmpdError: EMPTY_INPUT without messages, INVALID_REQUEST for roles the template refuses,
        TEXT_UNAVAILABLE if the model has no template, or one that cannot be continued.
        """
        template = self._checked_template(messages)
        roles = [role for role, _ in messages]
        contents = [content for _, content in messages]
        if first_round:
            return self._controls.encode_template(
                contents, lambda shown: template.render(list(zip(roles, shown, strict=True)))
            )
        # Words that no template and no client can know stand for the conversation so far.
        question, answer = f"q{secrets.token_hex(8)}", f"a{secrets.token_hex(8)}"
        before = [("user", question), ("assistant", answer)]
        increment = self._controls.encode_template(
            contents, lambda shown: template.render([*before, *zip(roles, shown, strict=True)]), after=answer
        )
        return self._without_closing_eos(increment) if previous_ended_with_eos else increment

    def _checked_template(self, messages: Sequence[tuple[str, str]]) -> ChatTemplate:
        if self._template is None:
            raise AmpdError(
                ErrorCode.TEXT_UNAVAILABLE, "the model has no chat template: send the round as text or token ids"
            )
        if not messages:
            raise AmpdError(ErrorCode.EMPTY_INPUT, "a chat round needs at least one message")
        for role, _ in messages:
            if not ROLE.fullmatch(role):
                raise AmpdError(
                    ErrorCode.INVALID_REQUEST,
                    f"the role {role[:80]!r} is not a name: use system, user, assistant or tool",
                )
        return self._template

    def _without_closing_eos(self, increment: list[int]) -> list[int]:
        """Drop the EOS that closes the answer, and the white space some templates write before it."""
        for index, token_id in enumerate(increment):
            if token_id in self.eos_token_ids:
                return increment[index + 1 :]
            if self.decode([token_id]).strip():
                break
        return increment

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, without special tokens; invalid UTF-8 becomes U+FFFD."""
        decoder = self.stream_decoder()
        return "".join([*map(decoder.push, token_ids), decoder.finish()])

    def stream_decoder(self, stop: Sequence[str] = ()) -> StreamDecoder:
        """A decoder for one round's output. Raises AmpdError INVALID_REQUEST if a stop string is empty."""
        return StreamDecoder(self._token_bytes, stop)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _read_tokenizer_document(model_dir: Path) -> dict[str, Any]:
    """tokenizer.json; for a folder with an older format only, what transformers converts it to."""
    path = model_dir / "tokenizer.json"
    if path.is_file():
        document = read_json_object(path)
        if not isinstance(document.get("added_tokens"), list) or "vocab" not in (document.get("model") or {}):
            raise AmpdError(ErrorCode.INVALID_REQUEST, f"{path} has no vocabulary: fetch it again")
        return document
    if not any((model_dir / name).is_file() for name in ("tokenizer.model", "vocab.json")):
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"{path} is missing (nor is there a tokenizer.model or vocab.json)")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer  # seconds to import, hence only here

    try:
        backend: Tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True).backend_tokenizer
    except (AttributeError, ValueError, OSError, ImportError) as error:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"{path} is missing and transformers cannot make it from the other files ({error}): convert the tokenizer",
        ) from error
    converted: dict[str, Any] = json.loads(backend.to_str())
    return converted


def _named_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as text; a configuration may write a token as text or as an object."""
    tokens = {name: _token_text(tokenizer_config.get(name)) for name in NAMED_TOKENS}
    return {name: text for name, text in tokens.items() if text}


def _additional_tokens(tokenizer_config: dict[str, Any]) -> list[str]:
    values: list[Any] = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        entry = tokenizer_config.get(name) or ()
        values += entry.values() if isinstance(entry, dict) else entry
    return [text for text in map(_token_text, values) if text]


def _token_text(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _token_ids(value: Any) -> frozenset[int]:
    ids = value if isinstance(value, list) else [value] if value is not None else []
    if not all(isinstance(token_id, int) for token_id in ids):
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"eos_token_id must be an id or a list of ids, not {value!r}")
    return frozenset(ids)
