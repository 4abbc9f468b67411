"""Chat templates of the shapes that published ones have, and what each writes, put together by hand.

A template is written in Jinja; beside it stands a function that says of one chat, without Jinja, which pieces of text it has
and which of them a sampler draws. The two have nothing in common: the second is an oracle for what is found of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["SHAPES", "Message", "Piece", "Shape"]

Message = dict[str, str]
Piece = tuple[str, bool]  # a text, and whether a sampler draws it


@dataclass(frozen=True)
class Shape:
    """A template and its oracle."""

    template: str
    pieces: Callable[[Sequence[Message]], list[Piece]]
    system: bool = True  # takes a system message


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _lined(messages: Sequence[Message], header: str, stop: str) -> list[Piece]:
    """Each turn is a header, a line break, its content, a stop token, and a line break that nobody draws."""
    pieces: list[Piece] = []
    for m in messages:
        drawn = m["role"] == "assistant"
        pieces += [(f"{header.format(m['role'])}\n", False), (m["content"], drawn), (stop, drawn), ("\n", False)]
    return pieces


def chatml(messages: Sequence[Message]) -> list[Piece]:
    return _lined(messages, "<|im_start|>{}", "<|im_end|>")


# marks what is generated, as TRL's templates for training do: the line break after the stop token too
CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# the same in a macro, whose text is written when it is whole
CHATML_MACRO = (
    "{% macro turn(message) %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endmacro %}{% for message in messages %}{{ turn(message) }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA3 = (
    "{{- bos_token }}{% for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def llama3(messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = [("<s>", False)]
    for m in messages:
        drawn = m["role"] == "assistant"
        pieces.append((f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False))
        pieces += [(m["content"].strip(), drawn), ("<|eot_id|>", drawn)]
    return pieces


# no generation prompt: the end of the user's turn is one
MISTRAL = (
    "{{- bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{- '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{- ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def mistral(messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = [("<s>", False)]
    for m in messages:
        if m["role"] == "user":
            pieces.append((f"[INST] {m['content']} [/INST]", False))
        else:
            pieces.append((f" {m['content']}</s>", True))
    return pieces


GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma(messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = [("<s>", False)]
    for m in messages:
        drawn = m["role"] == "assistant"
        pieces.append((f"<start_of_turn>{'model' if drawn else m['role']}\n", False))
        pieces += [(m["content"].strip(), drawn), ("<end_of_turn>", drawn), ("\n", False)]
    return pieces


# earlier turns lose their reasoning, the last one is given an empty one, as in Qwen 3
THINKING = (
    "{% for message in messages %}{% set ns = namespace(content=message['content'], reasoning='') %}"
    "{% if message['role'] == 'assistant' and '</think>' in ns.content %}"
    "{% set ns.reasoning = ns.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set ns.content = ns.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n' + ns.reasoning + '\n</think>\n\n' + ns.content.lstrip('\n') }}{% else %}{{ ns.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if think is defined and not think %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def thinking(messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = []
    for i, m in enumerate(messages):
        drawn, content, reasoning = m["role"] == "assistant", m["content"], ""
        if drawn and "</think>" in content:
            reasoning = content.split("</think>")[0].split("<think>")[-1].strip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
        if drawn and i == len(messages) - 1:
            content = f"<think>\n{reasoning}\n</think>\n\n" + content.lstrip("\n")
        pieces += [(f"<|im_start|>{m['role']}\n", False), (content, drawn), ("<|im_end|>", drawn), ("\n", False)]
    return pieces


# the prompt begins the reasoning; earlier turns have none, as in the distilled models of DeepSeek R1
PREFILLED = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}{% else %}"
    "{{ '<|assistant|>' + message['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)


def prefilled(messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = [("<s>", False)]
    for m in messages:
        if m["role"] == "user":
            pieces.append((f"<|user|>{m['content']}", False))
        else:
            rest = m["content"].split("</think>")[-1] + "</s>"
            given = "<think>\n" if rest.startswith("<think>\n") else ""
            pieces += [("<|assistant|>" + given, False), (rest.removeprefix(given), True)]
    return pieces


# words alone: no special token, and a space at the end of the prompt
WORDS = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


def words(messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = []
    for m in messages:
        pieces += [(f"{m['role'].upper()}: ", False), (f"{m['content']}\n\n", m["role"] == "assistant")]
    return pieces


# a header, but nothing that heeds add_generation_prompt
UNPROMPTED = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '</s>\n' }}{% endfor %}"
)


def unprompted(messages: Sequence[Message]) -> list[Piece]:
    return _lined(messages, "<|{}|>", "</s>")


# a turn is closed by the token that opens the next one, as in GLM 4
CLOSED_BY_NEXT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def closed_by_next(messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = []
    for i, m in enumerate(messages):
        stops = i > 0 and messages[i - 1]["role"] == "assistant"
        pieces += [(f"<|{m['role']}|>", stops), ("\n", False), (m["content"], m["role"] == "assistant")]
    return pieces


SHAPES = {
    "chatml": Shape(CHATML, chatml),
    "chatml marked": Shape(CHATML_MARKED, chatml),
    "chatml macro": Shape(CHATML_MACRO, chatml),
    "llama3": Shape(LLAMA3, llama3),
    "mistral": Shape(MISTRAL, mistral, system=False),
    "gemma": Shape(GEMMA, gemma, system=False),
    "thinking": Shape(THINKING, thinking),
    "prefilled": Shape(PREFILLED, prefilled, system=False),
    "words": Shape(WORDS, words),
    "unprompted": Shape(UNPROMPTED, unprompted),
    "closed by next": Shape(CLOSED_BY_NEXT, closed_by_next),
}
