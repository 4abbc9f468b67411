"""The chat templates that TRL ships, as published and with what is generated marked: the same characters are found in both."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from pretrained.chat_tokenizer import chat_tokenizer

from pullback.datums.chat import ChatReader, read_chat
from pullback.errors import DatumError

SPEC = importlib.util.find_spec("trl")
FOLDER = Path(next(iter(SPEC.submodule_search_locations or [])), "chat_templates") if SPEC else None
NAMES = sorted(path.name.removesuffix("_training.jinja") for path in FOLDER.glob("*_training.jinja")) if FOLDER else []
pytestmark = pytest.mark.skipif(
    FOLDER is None, reason="needs TRL's chat templates: pip install trl==1.16.0, in an environment with transformers 5"
)
SPECIAL = re.compile(
    r"<\|[\w▁]+\|>|<\uff5c[\w▁]+\uff5c>|<[a-z]+_of_turn>|<\|?turn\|?>|\[/?INST\]|<\|[A-Z_]+\|>|<think>|</think>"
)
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def calls(**arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return says("", tool_calls=[{"type": "function", "id": "abcdefghi", "function": function}])


CHATS: dict[str, list[dict[str, Any]]] = {
    "plain": [user("hi"), says("Yes"), user("a"), says("No")],
    "words of the template": [user("assistant"), says("a"), user("a"), says("assistant")],
    "white space": [user(" hi \n"), says("\n\nYes \n"), user("x\n"), says("  No\n")],
    "system": [{"role": "system", "content": "be kind"}, user("hi"), says("Yes"), user("a"), says("No")],
    "reasoning": [user("hi"), says("Yes", reasoning_content="hm"), user("a"), says("No", reasoning_content="so")],
    "parts": [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "hi"), ("assistant", "Yes"), ("user", "a"), ("assistant", "\nNo "))
    ],
    "calls": [
        user("hi"), calls(city="Paris"), {"role": "tool", "name": "weather", "content": "sunny"}, says("Yes"), user("a"),
        calls(city="Rome", n=3), {"role": "tool", "name": "weather", "content": "b"}, says("No"),
    ],
}  # fmt: skip


# what TRL marks, and no sampler draws: GPT-OSS ends an answer by <|return|>, which its template writes after the last one only,
# and Phi ends one by <|end|>, whatever its template writes after the last
TRAINED_BESIDE = {"gptoss": "<|end|>", "phi3": "\n</s>", "phi3_5": "\n</s>"}
# Gemma's template writes the answer of a tool into the turn that called it, and asks for it by <|tool_response>
OTHERWISE = {("diffusion_gemma", "calls")}


def joined(blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The blocks that TRL marks; those that touch are one turn."""
    turns: list[tuple[int, int]] = []
    for start, stop in blocks:
        if turns and turns[-1][1] == start:
            turns[-1] = (turns[-1][0], stop)
        elif start < stop:
            turns.append((start, stop))
    return turns


def common(a: str, b: str) -> int:
    return next((j for j, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def drawn(text: str, start: int, stop: int, asked: str) -> str:
    """A block without what of it is in a generation prompt, and without the white space after its stop token."""
    first = start
    for place in range(max(0, start - len(asked)), start + 1):
        shared = common(text[place:stop], asked)
        whole = [m.end() for m in re.finditer(rf"{SPECIAL.pattern}|\s|\Z", asked) if m.end() <= shared]
        first = max([first, *(place + end for end in whole if place + end > start)])
    last = max((found.end() for found in SPECIAL.finditer(text, first, stop)), default=stop)
    return text[first:last] if not text[last:stop].strip() else text[first:stop]


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("name", NAMES)
def test_published_templates(name: str, kind: str) -> None:
    """Where TRL's version of a template writes the same text, what it marks as generated is found without its marks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    assert FOLDER is not None
    published, marked = ((FOLDER / f"{name}{which}.jinja").read_text() for which in ("", "_training"))
    tokenizer = chat_tokenizer(published)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(published)))})
    messages, tools = CHATS[kind], [WEATHER] if kind == "calls" else None
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        takes_text = "Yes" in tokenizer.apply_chat_template(CHATS["plain"], tokenize=False)
        before, prompt = (
            tokenizer.apply_chat_template(messages[:1], tools=tools, tokenize=False, add_generation_prompt=add)
            for add in (False, True)
        )
        (theirs,), (blocks,) = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=marked,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:
        pytest.skip(f"the template refuses such a chat: {error}")
    if theirs != text or (name, kind) in OTHERWISE:
        pytest.skip("TRL's version writes another text")
    left_out = "Paris" not in text if kind == "calls" else kind != "parts" and not takes_text
    if left_out:
        with pytest.raises(DatumError, match=r"ignores tools|leaves its (tool calls|content) out"):
            ChatReader(tokenizer).read(read_chat(messages, tools=tools))
        return
    read = ChatReader(tokenizer).read(read_chat(messages, tools=tools))
    if kind == "parts" and ("Yes" not in text or re.search("[\"']type[\"']", text)):
        # the template wrote the list itself, or nothing: it was given the text
        assert [word in read[0][span.start : span.stop] for word, span in zip(("Yes", "No"), read[1], strict=True)] == [
            True
        ] * 2
        return
    assert read[0] == text
    asked = prompt[common(before, prompt) :]
    expected = [drawn(text, start, stop, asked) for start, stop in joined(blocks)]
    beside = TRAINED_BESIDE.get(name)
    assert [text[span.start : span.stop] for span in read[1]] == [
        turn.removesuffix(beside) if beside and "<|call|>" not in turn else turn for turn in expected
    ]


def test_marks_are_told_apart() -> None:
    """The comparison is no empty one: what a prompt gives is taken off, and a stop token is not."""
    text = "hi<|assistant|><think>\nYes<|im_end|>\n"
    for start in (2, 15, 23):
        assert drawn(text, start, len(text), "<|assistant|><think>\n") == "Yes<|im_end|>"
    assert drawn(text, 2, len(text), "") == "<|assistant|><think>\nYes<|im_end|>"
