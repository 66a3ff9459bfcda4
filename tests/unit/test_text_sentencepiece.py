"""Tokenizers of the SentencePiece kind: spaces are part of words, unknown characters are bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from shared.errors import AmpdError, ErrorCode
from shared.text import TextCodec

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
CONFIG = {"vocab_size": 400, "eos_token_id": 2}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "special": True},
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "chat_template": TEMPLATE,
}


def make_tokenizer(style: str) -> Tokenizer:
    """As converted Llama 1/2 tokenizers (`prepend`) and newer ones (`metaspace`) are built."""
    words = ["▁the", "▁cat", "IN", "ST", "in", "er", "</s", "s>"]
    characters = [*"▁abcdefghijklmnopqrstuvwxyzINST[]/.<>", "é"]
    merged = [word[: end + 1] for word in words for end in range(1, len(word))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    tokens += [token for token in dict.fromkeys(merged) if token not in tokens]
    merges = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    merges += [("<", "s>"), ("</s", ">")]  # converted tokenizers do have merges that make control tokens
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=list(dict.fromkeys(merges)),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if style == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


@pytest.fixture(scope="module", params=["prepend", "metaspace"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_tokenizer(request.param).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    return folder


@pytest.fixture(scope="module")
def codec(folder: Path) -> TextCodec:
    return TextCodec.load(folder)


def test_text_comes_back(codec: TextCodec) -> None:
    """All but a leading space, which `metaspace` does not tell from its own."""

    @given(st.text(st.sampled_from("the cat in.é日🙂 ")).filter(lambda text: not text.startswith(" ")))
    def check(text: str) -> None:
        decoder = codec.stream_decoder()
        tokens = codec.encode_text(text)
        assert "".join([*map(decoder.push, tokens), decoder.finish()]) == text

    check()


def test_text_is_that_of_batch_decoding(codec: TextCodec, folder: Path) -> None:
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ordinary = [i for i in range(reference.get_vocab_size()) if not (reference.id_to_token(i) or "").startswith("<0x")]

    @given(st.lists(st.sampled_from(ordinary)))
    def check(tokens: list[int]) -> None:
        assert codec.decode(tokens) == reference.decode(tokens, skip_special_tokens=True)

    check()


def test_spaces_between_words_are_kept_and_characters_are_whole(codec: TextCodec) -> None:
    tokens = codec.encode_text("the cat 日.")
    decoder = codec.stream_decoder()
    pieces = [decoder.push(token) for token in tokens]
    assert pieces == ["the", " cat", " ", "", "", "日", "."]


def test_a_broken_character_becomes_the_replacement_character(codec: TextCodec) -> None:
    tokens = codec.encode_text("the 日 cat")
    first_byte = tokens.index(codec.encode_text("日")[-3])
    assert codec.decode(tokens[: first_byte + 1]) == "the \ufffd"
    assert codec.decode(tokens[: first_byte + 2] + codec.encode_text("cat")) == "the \ufffd cat"


def test_plain_text_never_becomes_a_control_token(codec: TextCodec) -> None:
    tokens = codec.encode_text("the </s> cat <s>")
    assert not {1, 2} & set(tokens)
    assert codec.decode(tokens) == "the </s> cat <s>"


def test_chat_is_what_transformers_makes_of_it(codec: TextCodec, folder: Path) -> None:
    """History and increments are the ids of the whole conversation; this template closes an answer with " </s>"."""
    reference = AutoTokenizer.from_pretrained(folder)
    ids = codec.encode_chat([("user", "the cat")], first_round=True, previous_ended_with_eos=False)
    messages = [{"role": "user", "content": "the cat"}]
    for answer, question in [("in the", " cat é "), ("er", "日")]:
        # what the model writes, spaces included; it continues the prompt, so it must not begin like a text
        prompt_end = reference.encode("]", add_special_tokens=False)
        ids += reference.encode(f"] {answer} </s>", add_special_tokens=False)[len(prompt_end) :]
        ids += codec.encode_chat([("user", question)], first_round=False, previous_ended_with_eos=True)
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    assert ids == reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_an_answer_that_was_cut_short_is_closed(codec: TextCodec) -> None:
    closed = codec.encode_chat([("user", "cat")], first_round=False, previous_ended_with_eos=False)
    left_open = codec.encode_chat([("user", "cat")], first_round=False, previous_ended_with_eos=True)
    closing = closed[: -len(left_open)]
    assert codec.decode(closing).strip() == ""
    assert closing[-1] == 2
    assert closed == closing + left_open
    assert 2 not in left_open


def test_an_increment_does_not_begin_like_a_text(folder: Path, tmp_path: Path) -> None:
    """It continues the answer: no word-starting space before its first word (`prepend` has one after every token)."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content + 'cat' }}{% endfor %}")
    codec = TextCodec.load(copy)
    ids = codec.encode_chat([("user", "the")], first_round=False, previous_ended_with_eos=False)
    first = Tokenizer.from_file(str(copy / "tokenizer.json")).id_to_token(ids[0]) or ""
    assert first.startswith("▁") == folder.name.startswith("prepend")


def test_roles_the_template_refuses(codec: TextCodec) -> None:
    with pytest.raises(AmpdError, match="Only user and assistant roles are supported") as caught:
        codec.encode_chat([("tool", "4")], first_round=True, previous_ended_with_eos=False)
    assert caught.value.code is ErrorCode.INVALID_REQUEST
