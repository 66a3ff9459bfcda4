"""Streaming decoding: the text of the tokens, whole characters only, cut at the first stop string."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from shared.engine.model_files import resolve_model
from shared.errors import AmpdError, ErrorCode
from shared.text import TextCodec


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny-random", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def codec(tiny: Path) -> TextCodec:
    return TextCodec.load(tiny)


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny / "tokenizer.json"))


def cut_at_first_stop(text: str, stop: list[str]) -> str:
    """What must be returned, by brute force: up to the stop string that is complete first, the longest of those."""
    for end in range(1, len(text) + 1):
        completed = [word for word in stop if text[:end].endswith(word)]
        if completed:
            return text[: end - max(map(len, completed))]
    return text


def test_text_comes_back(codec: TextCodec) -> None:
    @given(st.text())
    def check(text: str) -> None:
        decoder = codec.stream_decoder()
        pieces = [decoder.push(token) for token in codec.encode_text(text)]
        assert "".join(pieces) == text, "the last token ends a character, so nothing is held back"
        assert decoder.finish() == ""

    check()


def test_any_tokens_give_the_text_of_batch_decoding(codec: TextCodec, reference: Tokenizer) -> None:
    """Specials, broken UTF-8 and ids no tokenizer knows included; U+FFFD only where batch decoding has it."""

    @given(st.lists(st.integers(0, 600)))
    def check(tokens: list[int]) -> None:
        decoder = codec.stream_decoder()
        pieces = [*map(decoder.push, tokens), decoder.finish()]
        expected = reference.decode([token for token in tokens if token < 512], skip_special_tokens=True)
        assert "".join(pieces) == expected == codec.decode(tokens)

    check()


def test_what_was_streamed_is_never_taken_back(codec: TextCodec) -> None:
    @given(st.lists(st.integers(0, 511)), st.integers(0, 20))
    def check(tokens: list[int], count: int) -> None:
        def streamed(tokens: list[int]) -> str:
            decoder = codec.stream_decoder()
            return "".join(map(decoder.push, tokens))

        assert streamed(tokens).startswith(streamed(tokens[:count]))

    check()


def test_half_a_character_is_held_back_until_it_is_whole(codec: TextCodec) -> None:
    tokens = codec.encode_text("🙂")
    assert len(tokens) == 4, "one token a byte"
    decoder = codec.stream_decoder()
    assert [decoder.push(token) for token in tokens] == ["", "", "", "🙂"]


def test_an_unfinished_character_ends_as_the_replacement_character(codec: TextCodec) -> None:
    decoder = codec.stream_decoder()
    assert [decoder.push(token) for token in codec.encode_text("é")[:1]] == [""]
    assert decoder.finish() == "\ufffd"


def test_stop_strings_anywhere(codec: TextCodec) -> None:
    """Across token borders, overlapping each other and themselves: a small alphabet makes all of that common."""
    words = st.text("aé", min_size=1, max_size=5)

    @example("aaaé", ["aaé"])
    @example("éaé", ["aé", "éaé"])
    @given(st.text("aéb", max_size=30), st.lists(words, max_size=4))
    def check(text: str, stop: list[str]) -> None:
        decoder = codec.stream_decoder(stop)
        tokens = codec.encode_text(text)
        returned = ""
        for index, token in enumerate(tokens):
            returned += decoder.push(token)
            seen = codec.stream_decoder()
            so_far = "".join(map(seen.push, tokens[: index + 1]))
            assert cut_at_first_stop(text, stop).startswith(returned)
            assert decoder.stopped == any(word in so_far for word in stop)
        returned += decoder.finish()
        assert returned == cut_at_first_stop(text, stop)
        assert decoder.stopped == any(word in text for word in stop)

    check()


def test_only_what_may_become_a_stop_string_is_held_back(codec: TextCodec) -> None:
    decoder = codec.stream_decoder(["\nObservation:"])
    returned = "".join(map(decoder.push, codec.encode_text("Act: x\nObs")))
    assert returned == "Act: x"
    assert "".join(map(decoder.push, codec.encode_text("t\nObservation"))) == "\nObst"
    assert decoder.finish() == "\nObservation"
    assert not decoder.stopped


def test_nothing_comes_after_a_stop_string(codec: TextCodec) -> None:
    decoder = codec.stream_decoder(["END"])
    assert "".join(map(decoder.push, codec.encode_text("one END two"))) == "one "
    assert decoder.stopped
    assert decoder.push(codec.encode_text("x")[0]) == ""
    assert decoder.finish() == ""


def test_a_stop_string_may_be_completed_by_the_end(codec: TextCodec) -> None:
    decoder = codec.stream_decoder(["a\ufffd"])
    assert "".join(map(decoder.push, codec.encode_text("aé")[:2])) == ""
    assert decoder.finish() == ""
    assert decoder.stopped


def test_an_empty_stop_string_is_refused(codec: TextCodec) -> None:
    with pytest.raises(AmpdError) as caught:
        codec.stream_decoder(["a", ""])
    assert caught.value.code is ErrorCode.INVALID_REQUEST
