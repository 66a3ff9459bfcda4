"""The codec of a worker that has no tokenizer: rounds are token ids, and their text is empty."""

from __future__ import annotations

from collections.abc import Sequence

from shared.errors import AmpdError, ErrorCode
from shared.text import TextCodec
from shared.text_stream import StreamDecoder


class IdOnlyCodec(TextCodec):
    """Whatever needs text is refused with TEXT_UNAVAILABLE: text and chat input, and stop strings."""

    def __init__(self, *, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids

    @property
    def has_chat_template(self) -> bool:
        return False

    def encode_text(self, text: str) -> list[int]:
        raise _unavailable("send the round as token ids")

    def encode_chat(
        self, messages: Sequence[tuple[str, str]], *, first_round: bool, previous_ended_with_eos: bool
    ) -> list[int]:
        raise _unavailable("send the round as token ids")

    def decode(self, token_ids: Sequence[int]) -> str:
        return ""

    def stream_decoder(self, stop: Sequence[str] = ()) -> StreamDecoder:
        if stop:
            raise _unavailable("use stop_token_ids instead of stop strings")
        return SilentDecoder()


class SilentDecoder(StreamDecoder):
    """Takes tokens and gives no text."""

    def __init__(self) -> None:
        self.stopped = False

    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def _unavailable(advice: str) -> AmpdError:
    return AmpdError(ErrorCode.TEXT_UNAVAILABLE, f"the emulated engine has no tokenizer: {advice}")
