"""Tokens to text, one token at a time: whole characters only, and nothing that may become a stop string.

Every token stands for bytes, whatever came before it (but for the first one's leading space in some tokenizers), so
a UTF-8 decoder that remembers an unfinished character does the rest: O(1) per token, and the same text however the
tokens arrive. For byte-level tokenizers this is exactly the batch decoding of `tokenizers`; for tokenizers with byte
fallback it differs only in how many U+FFFD an invalid sequence becomes (theirs replaces a whole run of byte tokens,
which would forbid streaming any of it).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from shared.errors import AmpdError, ErrorCode

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes each token stands for; special tokens and ids beyond the tokenizer's stand for none."""

    def __init__(self, tokenizer: Tokenizer, decoder: Mapping[str, Any] | None) -> None:
        """`decoder` is the entry of that name in tokenizer.json."""
        self._tokenizer = tokenizer
        kinds = set(_decoder_kinds(decoder))
        self._char_bytes = _byte_level_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._known: dict[int, bytes] = {}  # bounded by the vocabulary
        self._context = next(
            (i for i in range(tokenizer.get_vocab_size()) if (tokenizer.id_to_token(i) or "").isalpha()), None
        )

    def of(self, token_id: int, *, first: bool) -> bytes:
        """`first`: no token before it stood for any text."""
        if first and self._char_bytes is None and self._is_text(token_id):
            return self._decode([token_id]).encode()  # a leading space that only marks a word's start is dropped
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._look_up(token_id)
        return known

    def is_silent(self, token_id: int) -> bool:
        return token_id in self._special or self._tokenizer.id_to_token(token_id) is None

    def _is_text(self, token_id: int) -> bool:
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        return token is not None and not (self._byte_fallback and BYTE_TOKEN.fullmatch(token))

    def _look_up(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._char_bytes is not None:
            if all(char in self._char_bytes for char in token):
                return bytes(self._char_bytes[char] for char in token)
            return token.encode()  # an added token, which is not written in the byte alphabet
        if self._byte_fallback and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._context is None:
            return self._decode([token_id]).encode()
        before = self._decode([self._context])
        return self._decode([self._context, token_id]).removeprefix(before).encode()

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> Iterable[str]:
    if decoder is None:
        return
    yield decoder["type"]
    for part in decoder.get("decoders", ()):
        yield from _decoder_kinds(part)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's mapping of bytes to printable characters, backwards.

    Printable Latin-1 stands for itself; the other bytes, in order, are the characters from U+0100 on.
    """
    alphabet = set(ByteLevel.alphabet())
    own = {chr(byte): byte for byte in range(256) if chr(byte) in alphabet}
    rest = [byte for byte in range(256) if byte not in own.values()]
    return own | {chr(0x100 + index): byte for index, byte in enumerate(rest)}


class StreamDecoder:
    """Push tokens, get text that is certain. A stop string, once complete, ends the text: it is never returned.

    If several stop strings are complete at the same character the longest counts; otherwise the one complete first.
    """

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise AmpdError(ErrorCode.INVALID_REQUEST, "a stop string is empty: leave it out")
        self.stopped = False
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._matchers = [_StopMatcher(text) for text in stop]
        self._held = ""  # invariant: the end of the text so far that is a beginning of some stop string

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; empty once stopped."""
        if self.stopped:
            return ""
        data = self._token_bytes.of(token_id, first=self._first)
        if self._first and not self._token_bytes.is_silent(token_id):
            self._first = False
        return self._release(self._utf8.decode(data))

    def finish(self) -> str:
        """What was held back, an unfinished character as U+FFFD. The decoder is at its end."""
        if self.stopped:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if not self._matchers:
            return text
        held = len(self._held)
        pending = self._held + text
        for index in range(held, len(pending)):
            completed = [len(m.pattern) for m in self._matchers if m.advance(pending[index])]
            if completed:
                self.stopped, self._held = True, ""
                return pending[: index + 1 - max(completed)]
        keep = max(matcher.matched for matcher in self._matchers)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]


class _StopMatcher:
    """How much of one stop string the text so far ends with, by Knuth, Morris and Pratt (SIAM J. Comput. 6, 1977)."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0
        self._fallback = [0] * len(pattern)  # [i]: longest proper border of pattern[:i + 1]
        border = 0
        for index in range(1, len(pattern)):
            while border and pattern[index] != pattern[border]:
                border = self._fallback[border - 1]
            border += pattern[index] == pattern[border]
            self._fallback[index] = border

    def advance(self, char: str) -> bool:
        """Take the next character; True if the stop string is now complete (and the matcher at its end)."""
        while self.matched and char != self.pattern[self.matched]:
            self.matched = self._fallback[self.matched - 1]
        self.matched += char == self.pattern[self.matched]
        return self.matched == len(self.pattern)
