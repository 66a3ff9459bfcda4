"""A tokenizer in which no text can become a control token.

Control tokens (the marks of turns, BOS, EOS, ...) are renamed to private strings drawn at random when the tokenizer
is loaded; their ids stay. Whatever a client writes is therefore plain text, "<|im_end|>" included, and only text that
we marked, because the chat template wrote it, becomes control tokens. Everything else (normaliser, pre-tokenizer,
merges) is the tokenizer's own, so text without such strings has exactly the ids that transformers gives it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer

from shared.errors import AmpdError, ErrorCode


class ControlTokens:
    """The tokenizer with its control tokens hidden, and the marking that brings them back for the template."""

    def __init__(self, document: dict[str, Any], named: Iterable[str]) -> None:
        """`document` is tokenizer.json, changed in place. `named`: further control tokens, if it knows them."""
        _declare_special(document, named)
        controls = {token["content"]: token["id"] for token in document["added_tokens"] if token["special"]}
        self._ids: dict[str, int] = controls
        nonce = secrets.token_hex(8)
        # private-use characters: no normaliser touches them, no pre-tokenizer joins them with a word
        self._hidden = {text: f"\ue000{nonce}:{index}\ue001" for index, text in enumerate(controls)}
        self._shield_form = f"\ue002{nonce}:%d\ue003"
        self._shield = re.compile(f"\ue002{nonce}:(\\d+)\ue003")
        # alternatives longest first: of two that start at the same place the longer is meant
        self._any_control = _alternatives(controls)
        self._beginnings = {text[:length] for text in controls for length in range(1, len(text))}
        self._longest = max(map(len, controls), default=0)
        self._anchor = f"\ue000{nonce}:anchor\ue001"
        _rename(document, self._hidden)
        # the files of some models carry settings of their training
        document["truncation"] = document["padding"] = document["post_processor"] = None
        self.tokenizer = Tokenizer.from_str(json.dumps(document))
        self.num_tokens: int = self.tokenizer.get_vocab_size()
        self.tokenizer.add_special_tokens([AddedToken(self._anchor, normalized=False)])
        for text, token_id in controls.items():
            if self.tokenizer.token_to_id(self._hidden[text]) != token_id:
                raise AmpdError(
                    ErrorCode.INVALID_REQUEST, f"tokenizer.json: the special token {text!r} has not the id {token_id}"
                )

    def ids_of(self, text: str) -> frozenset[int]:
        """The id of the control token of that name, if there is one."""
        return frozenset({self._ids[text]} if text in self._ids else ())

    def encode_plain(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token."""
        return self._encode(text)

    def encode_template(self, contents: list[str], render: Callable[[list[str]], str], *, after: str = "") -> list[int]:
        """Ids of `render(contents)` in which what the template wrote is parsed for control tokens, contents are not.

        With `after` given, only the ids of what follows it in the rendered text; it must occur once.
        """
        shielded: list[str] = []
        rendered = render([self._shield_content(content, shielded) for content in contents])
        if after:
            if rendered.count(after) != 1:
                raise AmpdError(
                    ErrorCode.TEXT_UNAVAILABLE,
                    "the model's chat template cannot continue a conversation: send the round as text or token ids",
                )
            rendered = rendered.partition(after)[2]
        marked = self._any_control.sub(lambda match: self._hidden[match[0]], rendered)
        text = self._shield.sub(lambda match: shielded[int(match[1])], marked)
        if not after:
            return self._encode(text)
        # Something must stand before it: some tokenizers put a space before a text's first word, but not here.
        return self._encode(self._anchor + text)[1:]

    def _shield_content(self, content: str, shielded: list[str]) -> str:
        """Put aside what the parsing of the rendered text would take for a control token, or for a part of one.

        A part: content that ends with "<|im_" could become a token with what the template writes after it.
        """

        def put_aside(text: str) -> str:
            shielded.append(text)
            return self._shield_form % (len(shielded) - 1)

        content = self._any_control.sub(lambda match: put_aside(match[0]), content)
        for length in range(min(self._longest - 1, len(content)), 0, -1):
            if content[-length:] in self._beginnings:
                return content[:-length] + put_aside(content[-length:])
        return content

    def _encode(self, text: str) -> list[int]:
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise AmpdError(
                ErrorCode.INVALID_REQUEST, "the text holds half a surrogate pair: send valid Unicode"
            ) from error
        return ids


def _alternatives(texts: Iterable[str]) -> re.Pattern[str]:
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


def _vocabulary(document: dict[str, Any]) -> dict[str, int]:
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [piece, score] in the order of ids
        return {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def _declare_special(document: dict[str, Any], named: Iterable[str]) -> None:
    """Make every named token that exists an added, special one, as transformers does on loading."""
    added = {token["content"]: token for token in document["added_tokens"]}
    vocabulary: dict[str, int] | None = None
    for text in named:
        if text in added:
            added[text]["special"] = True
            continue
        vocabulary = _vocabulary(document) if vocabulary is None else vocabulary
        if text in vocabulary:
            token = {"id": vocabulary[text], "content": text, "single_word": False, "lstrip": False, "rstrip": False}
            added[text] = token | {"normalized": False, "special": True}
    document["added_tokens"] = sorted(added.values(), key=lambda token: int(token["id"]))


def _rename(document: dict[str, Any], names: dict[str, str]) -> None:
    """Rename tokens everywhere in tokenizer.json, and take out merges that would make one from text."""
    for token in document["added_tokens"]:
        if token["special"]:
            token["content"] = names[token["content"]]
            token["normalized"] = False
    model = document["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(text, text): index for text, index in model["vocab"].items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, names)]


def _touches(merge: str | list[str], names: dict[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names
