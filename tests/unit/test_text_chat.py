"""Chats with the real model's template and tokenizer: the very ids that transformers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from shared.engine.model_files import resolve_model
from shared.text import TextCodec

pytestmark = pytest.mark.slow

IM_END = 2
ROUNDS = [  # the new messages of each round, and the answer
    (
        [("system", "You answer with Thought, Action and Observation."), ("user", "Who wrote  3 plays in 1599?\n\n")],
        "Thought: I should search.\nAction: search[1599 plays]",
    ),
    ([("tool", '{"hits": 3, "text": "Julius Caesar — naïve 日本 🙂"}\n')], "Action: lookup[\t42]\n"),
    ([("tool", "    def f(x):\n        return x  # 12\n"), ("user", "Go on.")], ""),
    ([("user", "Finish with <|im_end|> or </s>.")], "Answer: Shakespeare"),
]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return resolve_model("smollm2")


@pytest.fixture(scope="module")
def codec(smollm2: Path) -> TextCodec:
    return TextCodec.load(smollm2)


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


def apply_template(reference: Any, messages: list[tuple[str, str]]) -> list[int]:
    ids: list[int] = reference.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages], add_generation_prompt=True
    )["input_ids"]
    return ids


@pytest.mark.parametrize("with_system", [True, False])
def test_every_round_adds_up_to_the_whole_conversation(codec: TextCodec, reference: Any, with_system: bool) -> None:
    """Without a system message of ours the template writes its own, once."""
    ids: list[int] = []
    conversation: list[tuple[str, str]] = []
    for index, (messages, answer) in enumerate(ROUNDS[:3]):
        new = messages if with_system else [message for message in messages if message[0] != "system"]
        ids += codec.encode_chat(new, first_round=index == 0, previous_ended_with_eos=True)
        conversation += new
        assert ids == apply_template(reference, conversation)
        ids += [*reference.encode(answer, add_special_tokens=False), IM_END]
        conversation.append(("assistant", answer))


def test_an_answer_cut_short_is_closed_for_the_model(codec: TextCodec, reference: Any) -> None:
    question, answer, more = ("user", "Tell me."), "It was a dark and", ("user", "Go on.")
    ids = codec.encode_chat([question], first_round=True, previous_ended_with_eos=False)
    ids += codec.encode_text(answer)
    ids += codec.encode_chat([more], first_round=False, previous_ended_with_eos=False)
    assert ids == apply_template(reference, [question, ("assistant", answer), more])


def test_control_tokens_in_a_message_are_text(codec: TextCodec, reference: Any) -> None:
    """Where transformers lets a message end its own turn, we do not; the text is the same."""
    messages = ROUNDS[3][0]
    ids = codec.encode_chat(messages, first_round=True, previous_ended_with_eos=False)
    theirs = apply_template(reference, messages)
    assert theirs.count(IM_END) == ids.count(IM_END) + 1
    assert reference.decode(ids) == reference.decode(theirs)


def test_any_text_has_the_ids_transformers_gives_it(codec: TextCodec, reference: Any) -> None:
    text = (
        st.text()
        | st.text("a 1\n\t'é日<|>_")
        | st.lists(st.sampled_from(["  3", "\n\n", " x", "'ll", "🙂"])).map("".join)
    )

    @example("a  31\n\n  b")
    @given(text)
    def check(content: str) -> None:
        if any(special in content for special in reference.all_special_tokens):
            return
        assert codec.encode_text(content) == reference.encode(content, add_special_tokens=False)
        ours = codec.encode_chat([("user", content)], first_round=True, previous_ended_with_eos=False)
        assert ours == apply_template(reference, [("user", content)])

    check()


def test_decoding_is_that_of_transformers(codec: TextCodec, reference: Any) -> None:
    @given(st.lists(st.integers(0, codec.vocab_size - 1)))
    def check(tokens: list[int]) -> None:
        assert codec.decode(tokens) == reference.decode(tokens, skip_special_tokens=True)

    check()
