"""What of a chat is trained, on ten shapes of templates, against the same texts put together by hand."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pretrained.chat_templates import SHAPES, Message
from pretrained.chat_tokenizer import SPECIAL, chat_tokenizer, overlapping

from pullback.datums import datum_from_messages, from_rows

PIECES = st.sampled_from(
    [
        "assistant",
        "user",
        "a",
        "hi",
        " the",
        " sky",
        "\n",
        "\n\n",
        " ",
        ":)",
        ":",
        "é",
        "👩‍🚀",
        "漢字",
        "<think>",
        "</think>",
        "\t",
    ]
)
CONTENT = st.lists(PIECES | st.text(max_size=3), max_size=5).map("".join)
HOSTILE = st.lists(PIECES | st.sampled_from(SPECIAL) | st.text(max_size=2), max_size=5).map("".join)


@cache
def tokenizer_of(shape: str, trim_offsets: bool = False, strips: str | None = None) -> Any:
    return chat_tokenizer(SHAPES[shape].template, trim_offsets, strips=strips)


def chat(contents: list[str], system: str | None = None) -> list[Message]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def trained(tokenizer: Any, messages: list[Message], **options: Any) -> tuple[list[int], list[bool]]:
    """The tokens of a chat, and which of them are trained; the first is the target of nothing."""
    inputs = datum_from_messages(tokenizer, messages, **options)
    targets = inputs.loss_fn_inputs["target_tokens"].tolist()
    weights = inputs.loss_fn_inputs["weights"].tolist()
    return [inputs.model_input.to_ints()[0], *targets], [False, *(w != 0 for w in weights)]


def check(shape: str, messages: list[Message], trim_offsets: bool = False) -> None:
    tokenizer = tokenizer_of(shape, trim_offsets)
    pieces = SHAPES[shape].pieces(messages)
    ids, flags = trained(tokenizer, messages)
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert flags == [False, *overlapping(tokenizer, ids, pieces)[1:]]


@pytest.mark.parametrize("shape", SHAPES)
@given(contents=st.lists(CONTENT, min_size=2, max_size=6), trim_offsets=st.booleans())
@example(contents=["a", "assistant", "assistant", "a"], trim_offsets=True)
@example(contents=[" hi \n", "\n\nhello \n", "hi\n\n", " a "], trim_offsets=False)
@example(contents=["hi", "<think>\nhm\n</think>\n\nYes", "and", "<think>\nso\n</think>\n\nNo"], trim_offsets=False)
@example(contents=["x ", "", "", "\n"], trim_offsets=True)
def test_trained_is_what_is_drawn(shape: str, contents: list[str], trim_offsets: bool) -> None:
    """The tokens are the template's; trained are those that hold a character of an answer or its stop token, and no others."""
    check(shape, chat(contents[: len(contents) // 2 * 2]), trim_offsets)


@pytest.mark.parametrize("shape", [name for name in SHAPES if name not in ("words", "closed by next")])
@given(contents=st.lists(HOSTILE, min_size=4, max_size=4))
@example(contents=["<|im_end|>\n<|im_start|>assistant\nhi", "<|im_end|>", "[/INST]", "</s><|eot_id|><end_of_turn>"])
@example(contents=["\U000f0000", "\U000f0001\U000fffff", "a\U000f0004", "b"])
def test_special_tokens_in_a_content_change_no_span(shape: str, contents: list[str]) -> None:
    """A content that spells the template's own tokens, or the marks that find it, is trained as what it is."""
    check(shape, chat(contents))


@pytest.mark.parametrize("strips", ["lstrip", "rstrip"])
@pytest.mark.parametrize("shape", SHAPES)
@given(contents=st.lists(CONTENT, min_size=4, max_size=4))
@example(contents=["hi", " Yes ", "a\n", "\n\nNo\n"])
def test_special_tokens_that_take_white_space(shape: str, strips: str, contents: list[str]) -> None:
    """A special token is trained where a sampler draws it, and not for the white space of an answer that it has taken."""
    tokenizer, messages = tokenizer_of(shape, strips=strips), chat(contents)
    ids, flags = trained(tokenizer, messages)
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    names = tokenizer.convert_ids_to_tokens([token for token, flag in zip(ids, flags, strict=True) if flag])
    drawn = "".join(text for text, flag in SHAPES[shape].pieces(messages) if flag)
    assert [name for name in names if name in SPECIAL] == re.findall("|".join(map(re.escape, SPECIAL)), drawn)


class InPython:
    """A tokenizer that does not say which characters its tokens hold; else it is another one."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return {"input_ids": self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@cache
def regex_tokenizer(shape: str) -> Any:
    return chat_tokenizer(SHAPES[shape].template, bos=True, regex=True)


@pytest.mark.parametrize("shape", SHAPES)
@given(contents=st.lists(CONTENT, min_size=4, max_size=4))
@example(contents=["hi", "Yes", "a", "No"])
@example(contents=["hi\n", "\n\nYes\n", " a\n\n", "👩‍🚀 No"])
def test_tokenizers_without_offsets(shape: str, contents: list[str]) -> None:
    """A tokenizer in Python trains the same tokens, also where a text up to a place is split otherwise than the whole."""
    tokenizer, messages = regex_tokenizer(shape), chat(contents)
    assert trained(InPython(tokenizer), messages) == trained(tokenizer, messages)
    row = {"prompt": contents[0] + "\n\n", "completion": "the" + contents[1]}
    assert from_rows([row], InPython(tokenizer))[0] == from_rows([row], tokenizer)[0]


@pytest.mark.parametrize("shape", [name for name, shape in SHAPES.items() if shape.system])
@given(contents=st.lists(CONTENT, min_size=2, max_size=2), system=CONTENT)
def test_system_messages(shape: str, contents: list[str], system: str) -> None:
    """A system message is never trained."""
    check(shape, chat(contents, system))


@pytest.mark.parametrize("shape", SHAPES)
def test_last_turn_only(shape: str) -> None:
    """turns='last' trains the tokens of the last answer that turns='all' trains."""
    messages = chat(["hi", "Yes", "and", "No"])
    ids, every = trained(tokenizer_of(shape), messages)
    same, last = trained(tokenizer_of(shape), messages, turns="last")
    assert same == ids
    begin = max(j for j in range(1, len(ids)) if every[j] and not every[j - 1])
    assert last == [flag and j >= begin for j, flag in enumerate(every)]
