"""What messages may hold, what is said of them, and what a template is given."""

from __future__ import annotations

from typing import Any

import pytest
from pretrained.chat_templates import CHATML, CHATML_MARKED, LLAMA3, THINKING
from pretrained.chat_tokenizer import chat_tokenizer

from pullback.datums import datum_from_messages
from pullback.datums.chat import Span, encode
from pullback.errors import DatumError

USER = {"role": "user", "content": "hi"}
YES, NO = {"role": "assistant", "content": "Yes"}, {"role": "assistant", "content": "No"}
# text or parts of it, tools before all else, and calls written out as Qwen's models write them
CALLING = (
    "{% if tools %}{{ 'TOOLS ' + (tools | tojson) + '\n' }}{% endif %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content or [] %}{{ part.text }}{% endfor %}{% endif %}"
    "{% for call in message.tool_calls or [] %}{{ '<tool_call>' + (call.function.arguments | tojson) + call.function.name }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def trained(template: str, messages: list[Any], **options: Any) -> list[tuple[str, float]]:
    """The runs of trained tokens, decoded, each with its weight."""
    tokenizer = chat_tokenizer(template)
    inputs = datum_from_messages(tokenizer, messages, **options).loss_fn_inputs
    runs: list[tuple[list[int], float]] = []
    previous = 0.0
    for token, weight in zip(inputs["target_tokens"].tolist(), inputs["weights"].tolist(), strict=True):
        if weight and weight == previous:
            runs[-1][0].append(token)
        elif weight:
            runs.append(([token], weight))
        previous = weight
    return [(tokenizer.decode(ids), weight) for ids, weight in runs]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_weights_of_messages(template: str) -> None:
    """A message's weight is that of its tokens; 0 and train=False leave it out; None says nothing."""
    messages = [USER, {**YES, "weight": 0.5}, USER, {**NO, "train": False}, USER, {**NO, "weight": None, "train": True}]
    assert trained(template, messages) == [("Yes<|im_end|>", 0.5), ("No<|im_end|>", 1.0)]
    assert trained(template, [USER, YES, USER, {**NO, "weight": 0}], turns="last") == [("Yes<|im_end|>", 1.0)]


def test_other_roles() -> None:
    """The turns of other roles are trained when they are named, from their content on; the prompt is the assistant's."""
    messages = [{"role": "system", "content": "a"}, USER, YES]
    assert trained(CHATML, messages, train_on="user") == [("hi<|im_end|>", 1.0)]
    assert trained(CHATML, messages, train_on=("user", "assistant")) == [("hi<|im_end|>", 1.0), ("Yes<|im_end|>", 1.0)]
    assert trained(CHATML, [YES, USER, NO]) == [("Yes<|im_end|>", 1.0), ("No<|im_end|>", 1.0)]


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("arguments", [{"in": "Paris"}, {"n": 3}, {}, {"deep": [{"x": ["y"]}, 1]}, "in Paris"])
def test_tool_calls(content: str | None, arguments: Any) -> None:
    """A call is trained whole, to its stop token; the tool's answer is not."""
    call = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}],
    }
    found = trained(CALLING, [USER, call, {"role": "tool", "content": "sunny"}, YES, USER, call], tools=TOOLS)
    written = (
        '"' + arguments.replace('"', '\\"') + '"' if isinstance(arguments, str) else str(arguments).replace("'", '"')
    )
    expected = f"<tool_call>{written}weather<|im_end|>"
    assert found == [(expected, 1.0), ("Yes<|im_end|>", 1.0), (expected, 1.0)]


@pytest.mark.parametrize("given", ['{"in": "Paris"}', '{"in": "Zürich"}', "{}"])
def test_arguments_in_json(given: str) -> None:
    """Arguments in JSON are trained as they are where the template takes text, and refused where it would quote them."""
    calls = [{"function": {"name": "weather", "arguments": given}}]
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": calls}]
    with pytest.raises(DatumError, match=r"message 1: the arguments of its tool call are text in JSON.*json.loads"):
        trained(CALLING, messages, tools=TOOLS)
    plain = CALLING.replace("(call.function.arguments | tojson)", "call.function.arguments")
    assert trained(plain, messages, tools=TOOLS) == [(f"<tool_call>{given}weather<|im_end|>", 1.0)]


def test_parts() -> None:
    """Parts of text read as the template writes them, and are joined where it takes only text."""
    parts = [{"type": "text", "text": "Yes"}, {"type": "text", "text": " the"}]
    messages = [USER, {"role": "assistant", "content": parts}, USER, NO]
    for template in (CALLING, CHATML):
        assert trained(template, messages) == [("Yes the<|im_end|>", 1.0), ("No<|im_end|>", 1.0)]


PARTS_ONLY = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{{ part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_templates_of_parts_alone() -> None:
    """A template that leaves text out is given parts as they are; text is refused, and not trained as nothing."""
    parts = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "hi"), ("assistant", "Yes"))
    ]
    assert trained(PARTS_ONLY, parts) == [("Yes<|im_end|>", 1.0)]
    with pytest.raises(DatumError, match=r"message 1: the chat template leaves its content out; .* as parts of text"):
        trained(PARTS_ONLY, [USER, YES])


def test_template_arguments() -> None:
    """Arguments reach the template: with reasoning off, the empty reasoning is the prompt's, not an answer's."""
    found = {think: trained(THINKING, [USER, YES], chat_template_kwargs={"think": think}) for think in (True, False)}
    assert found == {True: [("<think>\n\n</think>\n\nYes<|im_end|>", 1.0)], False: [("Yes<|im_end|>", 1.0)]}
    chosen = trained(CALLING, [USER, YES], chat_template_kwargs={"chat_template": LLAMA3})
    assert chosen == [("Yes<|eot_id|>", 1.0)]


def test_rewritten_turns() -> None:
    """A template that takes the reasoning out of earlier turns trains what is left there, and all of the last one."""
    reasoned = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}
    found = trained(THINKING, [USER, reasoned, USER, reasoned])
    assert found == [("Yes<|im_end|>", 1.0), ("<think>\nhm\n</think>\n\nYes<|im_end|>", 1.0)]


REFUSED: list[tuple[str, Any, dict[str, Any]]] = [
    ("must be a list", "hi", {}),
    ("is empty", [], {}),
    ("no message is trained .roles: user", [USER], {}),
    ("no message is trained", [USER, {**YES, "weight": 0}], {}),
    ("message 1 must be a dict", [USER, "Yes"], {}),
    ("message 0 has no role .*from_rows", [{"from": "human", "value": "hi"}], {}),
    ("message 1 .assistant. has no content.*'contents'", [USER, {"role": "assistant", "contents": "Yes"}], {}),
    ("content must be text", [USER, {"role": "assistant", "content": 3}], {}),
    ("part of type 'image'", [{"role": "user", "content": [{"type": "image"}]}, YES], {}),
    ("both 'weight'", [USER, {**YES, "weight": 1, "train": True}], {}),
    ("'train' must be True or False, got 1", [USER, {**YES, "train": 1}], {}),
    ("'weight' must be a finite number", [USER, {**YES, "weight": -1.0}], {}),
    ("message 0 .user. asks to be trained", [{**USER, "weight": 1}, YES], {}),
    ("message 1 has 'mask', which would be ignored", [USER, {**YES, "mask": 1}], {}),
    ("leaves its tool calls out", [USER, {**YES, "tool_calls": [{"function": {"name": "f"}}]}], {}),
    ("ignores tools", [USER, YES], {"tools": TOOLS}),
    ("has no argument 'add_generation_promp'", [USER, YES], {"chat_template_kwargs": {"add_generation_promp": True}}),
    ("sets itself", [USER, YES], {"chat_template_kwargs": {"tokenize": True}}),
    ("turns must be", [USER, YES], {"turns": "first"}),
    ("every trained token", [USER, YES], {"max_length": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "messages", "options"), REFUSED, ids=[reason for reason, _, _ in REFUSED])
def test_refusals_name_their_reason(reason: str, messages: Any, options: dict[str, Any]) -> None:
    """What cannot be trained on is refused with its message and its reason."""
    with pytest.raises(DatumError, match=reason):
        datum_from_messages(chat_tokenizer(CHATML), messages, **options)


def test_templates_that_fail() -> None:
    """The template's own error is told; a tokenizer without one is refused."""
    with pytest.raises(DatumError, match=r"the chat template failed: TemplateError: roles must alternate"):
        datum_from_messages(chat_tokenizer("{{ raise_exception('roles must alternate') }}"), [USER, YES])
    with pytest.raises(DatumError, match="has no apply_chat_template"):
        datum_from_messages(object(), [USER, YES])


def test_marked_blocks_that_are_not_turns() -> None:
    """Blocks that a template marks in another number than there are turns are trained all, or refused where weights differ."""
    twice = CHATML_MARKED.replace("{% endgeneration %}", "{% endgeneration %}x{% generation %}y{% endgeneration %}")
    assert trained(twice, [USER, YES]) == [("Yes<|im_end|>", 1.0), ("y", 1.0)]
    with pytest.raises(DatumError, match="marks 4 blocks as generated, but there are 2 turns"):
        trained(twice, [USER, YES, USER, {**NO, "weight": 2}])
    with pytest.raises(DatumError, match="marks only the assistant's turns"):
        trained(CHATML_MARKED, [USER, YES], train_on="user")


def test_marked_blocks_within_others_and_changed_afterwards() -> None:
    """A block within another is part of it; marked text that a template works on afterwards is refused."""
    within = CHATML_MARKED.replace(
        "{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}",
        "{%- generation -%}{{ message['content'] }}{%- endgeneration -%}{{ '<|im_end|>\n' }}{% endgeneration %}",
    )
    assert trained(within, [USER, YES, USER, {**NO, "weight": 2}]) == [("Yes<|im_end|>", 1.0), ("No<|im_end|>", 2.0)]
    counted = CHATML_MARKED.replace(
        "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}",
        "{% set answer %}{% generation %}{{ message['content'] }}{% endgeneration %}{% endset %}{{ answer | length }}",
    )
    with pytest.raises(DatumError, match=r"works on the text of its .% generation %. blocks"):
        trained(counted, [USER, YES])


class Trimming:
    """A tokenizer whose offsets leave the white space of its tokens out: of "a b" they are those of "a" and "b"."""

    is_fast = True

    def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
        return {"input_ids": [[1, 2]] * len(texts), "offset_mapping": [[(0, 1), (2, 3)]] * len(texts)}


def test_white_space_belongs_to_the_token_after_it() -> None:
    """A token holds the space before its offsets, where the token before it does not reach so far."""
    assert encode(Trimming(), "a b", [Span(0, 2, 1.0)]).weights == [1.0, 1.0]
    assert encode(Trimming(), "a b", [Span(0, 1, 1.0)]).weights == [1.0, 0.0]
    assert encode(Trimming(), "a b", [Span(2, 3, 1.0)]).merged == 1
