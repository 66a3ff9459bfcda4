"""Text and chat messages to token ids for a round's input, and token ids back to text for a snapshot."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from shared.core.commands import EncodeInput, SnapshotText
from shared.errors import AmpdError, ErrorCode
from shared.messages import ChatInput, TextInput, pack_token_ids, unpack_token_ids
from shared.text import TextCodec

LONG_TEXT_CHARS = 4_000  # about 1 ms of tokenising: longer texts go to a thread


class InputText:
    """Without a codec (no --model-dir) rounds can be sent as token ids only."""

    def __init__(self, codec: TextCodec | None) -> None:
        self._codec = codec
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise")

    async def encode(self, command: EncodeInput) -> bytes:
        """Packed token ids. Raises AmpdError TEXT_UNAVAILABLE, or what the codec refuses."""
        if self._codec is None:
            raise AmpdError(
                ErrorCode.TEXT_UNAVAILABLE,
                "this coordinator was started without --model-dir: send the round as token ids",
            )
        num_chars = _count_chars(command.input)
        if num_chars < LONG_TEXT_CHARS:
            return self._encode(command)
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._encode, command)

    def read_snapshot(self, snapshot: SnapshotText, start_index: int, *, ended: bool) -> str:
        """The text of a round's output from token start_index on, as its stream would have shown it."""
        if self._codec is None:
            return ""
        decoder = self._codec.stream_decoder(snapshot.stop)
        texts = [decoder.push(token_id) for token_id in unpack_token_ids(snapshot.output_token_ids)]
        if ended and not decoder.stopped:
            texts.append(decoder.finish())
        return "".join(texts[start_index:])

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _encode(self, command: EncodeInput) -> bytes:
        assert self._codec is not None
        if isinstance(command.input, TextInput):
            return pack_token_ids(self._codec.encode_text(command.input.text))
        last = command.last_token_id
        return pack_token_ids(
            self._codec.encode_chat(
                [(message.role, message.content) for message in command.input.messages],
                first_round=last is None,
                previous_ended_with_eos=last is not None and last in self._codec.eos_token_ids,
            )
        )


def _count_chars(source: TextInput | ChatInput) -> int:
    if isinstance(source, TextInput):
        return len(source.text)
    return sum(len(message.content) for message in source.messages)
