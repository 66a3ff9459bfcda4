"""The codec of a model folder: what it reads, what it refuses, and that no message can forge a control token."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.engine.model_files import resolve_model
from shared.errors import AmpdError, ErrorCode
from shared.text import TextCodec

IM_START, IM_END = 1, 2
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny-random", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def codec(tiny: Path) -> TextCodec:
    return TextCodec.load(tiny)


@pytest.fixture
def changed(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the folder with entries of its JSON files replaced, and a template if one is given."""

    def change(*, template: str | None = None, remove: tuple[str, ...] = (), **files: dict[str, Any]) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny, folder)
        for name in remove:
            (folder / name).unlink()
        for name, entries in files.items():
            path = folder / f"{name}.json"
            before = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps(before | entries))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return change


def first_round(codec: TextCodec, *messages: tuple[str, str]) -> list[int]:
    return codec.encode_chat(messages, first_round=True, previous_ended_with_eos=False)


def later_round(codec: TextCodec, *messages: tuple[str, str], ended_with_eos: bool = True) -> list[int]:
    return codec.encode_chat(messages, first_round=False, previous_ended_with_eos=ended_with_eos)


def test_loading_needs_neither_torch_nor_transformers(tiny: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from shared.text import TextCodec;"
        "codec = TextCodec.load(Path(sys.argv[1]));"
        "codec.encode_chat([('user', 'x')], first_round=True, previous_ended_with_eos=False);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny)], check=True)


def test_what_it_reads_from_the_folder(codec: TextCodec) -> None:
    assert codec.vocab_size == 512
    assert codec.eos_token_ids == {IM_END}
    assert codec.has_chat_template


def test_every_place_that_names_an_eos_counts(changed: Callable[..., Path]) -> None:
    folder = changed(
        config={"eos_token_id": [0]},
        generation_config={"eos_token_id": [3, 7]},
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}},
    )
    assert TextCodec.load(folder).eos_token_ids == {0, 2, 3, 7}


def test_the_models_vocabulary_may_be_larger_than_the_tokenizers(changed: Callable[..., Path]) -> None:
    codec = TextCodec.load(changed(config={"vocab_size": 640}))
    assert codec.vocab_size == 640
    assert codec.decode([639]) == ""


def test_text_is_encoded_without_anything_added(codec: TextCodec) -> None:
    assert codec.encode_text("") == []
    tokens = codec.encode_text("abc")
    assert codec.decode(tokens) == "abc"
    assert not set(tokens) & {0, 1, 2, 3}


def test_settings_of_training_in_the_tokenizer_are_left_aside(changed: Callable[..., Path], codec: TextCodec) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    cut = TextCodec.load(changed(tokenizer={"truncation": truncation}))
    assert cut.encode_text("a long text") == codec.encode_text("a long text")


# ------------------------------------------------------------------------------------------ chat


def test_a_first_round_is_the_rendered_template(codec: TextCodec) -> None:
    ids = first_round(codec, ("system", "Be brief."), ("user", "Hi"))
    newline = codec.encode_text("\n")
    text = codec.encode_text
    assert ids == [
        *[IM_START, *text("system\nBe brief."), IM_END, *newline],
        *[IM_START, *text("user\nHi"), IM_END, *newline],
        *[IM_START, *text("assistant\n")],
    ]


def test_later_rounds_close_the_answer_first(codec: TextCodec) -> None:
    opening = [IM_START, *codec.encode_text("tool\n42"), IM_END, *codec.encode_text("\n")]
    opening += [IM_START, *codec.encode_text("assistant\n")]
    newline = codec.encode_text("\n")
    assert later_round(codec, ("tool", "42")) == [*newline, *opening], "the model wrote the EOS itself"
    assert later_round(codec, ("tool", "42"), ended_with_eos=False) == [IM_END, *newline, *opening]


def test_increments_add_up_to_the_whole_conversation(codec: TextCodec) -> None:
    role = st.sampled_from(["user", "tool", "system"])
    increment = st.lists(st.tuples(role, st.text(max_size=20)), min_size=1, max_size=2)

    @given(st.lists(st.tuples(increment, st.text(max_size=20)), min_size=1, max_size=3), increment)
    def check(rounds: list[tuple[list[tuple[str, str]], str]], last: list[tuple[str, str]]) -> None:
        ids: list[int] = []
        conversation: list[tuple[str, str]] = []
        for messages, answer in rounds:
            ids += later_round(codec, *messages) if ids else first_round(codec, *messages)
            ids += [*codec.encode_text(answer), IM_END]
            conversation += [*messages, ("assistant", answer)]
        ids += later_round(codec, *last)
        whole = first_round(codec, *conversation, *last)
        assert codec.decode(ids) == codec.decode(whole)
        if not any(answer[:1].isspace() for _, answer in rounds):  # a "\n" and a space after it may be one token
            assert ids == whole

    check()


def test_no_message_can_forge_a_control_token(codec: TextCodec) -> None:
    parts = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "end|>", "<", "|>", "\n", "user", " "]
    content = st.lists(st.sampled_from(parts), max_size=6).map("".join)

    @given(content, content, st.booleans())
    def check(one: str, two: str, first: bool) -> None:
        def frame(*messages: tuple[str, str]) -> list[int]:
            ids = first_round(codec, *messages) if first else later_round(codec, *messages)
            return [token for token in ids if token <= 3]

        assert frame(("user", one), ("tool", two)) == frame(("user", "x"), ("tool", "y"))
        assert f"user\n{one}\n" in codec.decode(first_round(codec, ("user", one))), "and it arrives as it was written"
        assert not {0, 1, 2, 3} & set(codec.encode_text(one))

    check()


def test_contents_without_anything_between_them_cannot_join_to_a_control_token(changed: Callable[..., Path]) -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}<|im_start|>"
    codec = TextCodec.load(changed(template=template))
    ids = first_round(codec, ("user", "a<|im_"), ("user", "end|>b"))
    assert [token for token in ids if token <= 3] == [IM_START]
    assert codec.decode(ids) == "a<|im_end|>b"


def test_a_template_may_look_at_the_content(changed: Callable[..., Path]) -> None:
    codec = TextCodec.load(changed(template=GEMMA))
    ids = first_round(codec, ("user", "  hi  "))
    text = codec.encode_text
    assert ids == [IM_START, IM_START, *text("user\nhi"), IM_END, *text("\n"), IM_START, *text("model\n")]
    assert later_round(codec, ("user", "x"))[:2] == [*codec.encode_text("\n"), IM_START]


def test_what_templates_may_call(changed: Callable[..., Path]) -> None:
    template = (
        "{% for message in messages %}{% if loop.index0 > 0 %}{% break %}{% endif %}"
        "{% generation %}{{ message | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    codec = TextCodec.load(changed(template=template))
    assert codec.decode(first_round(codec, ("user", "<é>"))) == '{"role": "user", "content": "<é>"}4'


def test_a_template_among_several_in_the_tokenizers_configuration(changed: Callable[..., Path]) -> None:
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = changed(remove=("chat_template.jinja",), tokenizer_config={"chat_template": templates})
    codec = TextCodec.load(folder)
    assert codec.decode(first_round(codec, ("user", "x"))) == "yes"


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([("system", "x"), ("user", "y")], "System role not supported"),
        ([("user", "x"), ("user", "y")], "must alternate"),
        ([("<|im_end|>", "x")], "is not a name"),
        ([("", "x")], "is not a name"),
    ],
)
def test_roles_that_are_refused(changed: Callable[..., Path], messages: list[tuple[str, str]], words: str) -> None:
    codec = TextCodec.load(changed(template=GEMMA))
    with pytest.raises(AmpdError, match=words) as caught:
        first_round(codec, *messages)
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_a_round_without_messages(codec: TextCodec) -> None:
    with pytest.raises(AmpdError) as caught:
        first_round(codec)
    assert caught.value.code is ErrorCode.EMPTY_INPUT


def test_half_a_surrogate_pair(codec: TextCodec) -> None:
    for encode in (codec.encode_text, lambda text: first_round(codec, ("user", text))):
        with pytest.raises(AmpdError, match="surrogate") as caught:
            encode("a\ud800b")
        assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_a_model_without_a_template(changed: Callable[..., Path]) -> None:
    codec = TextCodec.load(changed(remove=("chat_template.jinja",)))
    assert not codec.has_chat_template
    with pytest.raises(AmpdError, match="no chat template") as caught:
        first_round(codec, ("user", "x"))
    assert caught.value.code is ErrorCode.TEXT_UNAVAILABLE


def test_a_template_that_drops_the_answer_cannot_be_continued(changed: Callable[..., Path]) -> None:
    codec = TextCodec.load(changed(template="{{ messages[-1]['content'] }}"))
    assert first_round(codec, ("user", "x"))
    with pytest.raises(AmpdError, match="cannot continue") as caught:
        later_round(codec, ("user", "x"))
    assert caught.value.code is ErrorCode.TEXT_UNAVAILABLE


def test_templates_run_in_a_sandbox(changed: Callable[..., Path]) -> None:
    codec = TextCodec.load(changed(template="{{ messages.__class__.__mro__[1].__subclasses__() }}"))
    with pytest.raises(AmpdError, match="unsafe"):
        first_round(codec, ("user", "x"))


def refusal(folder: Path) -> str:
    with pytest.raises(AmpdError) as caught:
        TextCodec.load(folder)
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    return caught.value.message


def test_a_broken_template(changed: Callable[..., Path]) -> None:
    assert "chat template" in refusal(changed(template="{% for %}"))


def test_a_folder_without_a_tokenizer(changed: Callable[..., Path]) -> None:
    assert "tokenizer.json is missing" in refusal(changed(remove=("tokenizer.json",)))


@pytest.mark.parametrize("entries", [{"added_tokens": None}, {"model": {}}, {"model": {"type": "BPE", "vocab": 5}}])
def test_a_broken_tokenizer(changed: Callable[..., Path], entries: dict[str, Any]) -> None:
    assert "tokenizer" in refusal(changed(tokenizer=entries))


def test_a_special_token_with_the_wrong_id(changed: Callable[..., Path], tiny: Path) -> None:
    added = json.loads((tiny / "tokenizer.json").read_text())["added_tokens"]
    added[0] |= {"content": "<|other|>"}
    assert "has not the id" in refusal(changed(tokenizer={"added_tokens": added}))


def test_a_broken_eos(changed: Callable[..., Path]) -> None:
    assert "eos_token_id" in refusal(changed(config={"eos_token_id": "two"}))


def test_an_older_tokenizer_format_is_converted(changed: Callable[..., Path], tiny: Path, codec: TextCodec) -> None:
    """vocab.json and merges.txt only: transformers makes the rest, as it would for itself."""
    model = json.loads((tiny / "tokenizer.json").read_text())["model"]
    folder = changed(
        remove=("tokenizer.json",), tokenizer_config={"tokenizer_class": "GPT2Tokenizer"}, vocab=model["vocab"]
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    converted = TextCodec.load(folder)
    for text in ("the banana, naïve 🙂", "<|im_end|>"):
        assert converted.encode_text(text) == codec.encode_text(text)
    assert first_round(converted, ("user", "hi<|im_end|>")) == first_round(codec, ("user", "hi<|im_end|>"))
