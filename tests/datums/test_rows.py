"""Rows of every format become the datums that builders make of their parts; what is ambiguous is refused, all at once."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pretrained.chat_templates import CHATML, CHATML_MARKED
from pretrained.chat_tokenizer import chat_tokenizer
from tokenizers import processors

from pullback.datums import (
    Datum,
    datum_from_messages,
    datum_from_spans,
    datum_from_tokens_weights,
    from_rows,
    preference_pair,
    validate,
)
from pullback.errors import DatumError, InvalidDatumsError

TEXT = st.text(st.sampled_from("ab é\n🙂"), min_size=1, max_size=6)


@cache
def tokenizer(template: str = CHATML, bos: bool = False) -> Any:
    return chat_tokenizer(template, bos=bos)


def ids(text: str) -> list[int]:
    return [int(token) for token in tokenizer()(text, add_special_tokens=False)["input_ids"]]


def user(content: str = "hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str = "Yes") -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def only(rows: list[Any], **options: Any) -> Datum:
    (datum,), _ = from_rows(rows, tokenizer(), **options)
    return datum


@given(prompt=TEXT, completion=TEXT)
def test_texts(prompt: str, completion: str) -> None:
    """A completion is trained from its first character to the end-of-text token that ends it, once."""
    whole = prompt + completion + "</s>"
    offsets = tokenizer()(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    expected = datum_from_tokens_weights(ids(whole), [float(end > len(prompt)) for _, end in offsets])
    for answer in (completion, completion + "</s>"):
        assert only([{"prompt": prompt, "completion": answer}]) == expected
    without = only([{"prompt": prompt + "\n", "completion": "b" + completion}], append_eos=False)
    assert [without.model_input.to_ints()[0], *without.loss_fn_inputs["target_tokens"].data] == ids(
        prompt + "\nb" + completion
    )


@given(text=TEXT)
def test_plain_text(text: str) -> None:
    """All of a text is trained; a tokenizer's own first token is kept."""
    tokens = ids(text + "</s>")
    assert only([{"text": text}]) == datum_from_tokens_weights(tokens, [1.0] * len(tokens))
    ((datum,), _) = from_rows([{"text": text}], tokenizer(bos=True))
    assert datum == datum_from_tokens_weights([tokenizer().bos_token_id, *tokens], [1.0] * (len(tokens) + 1))


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("ends", [True, False])
@given(text=TEXT)
def test_texts_that_have_their_special_tokens(begins: bool, ends: bool, text: str) -> None:
    """What a tokenizer puts around a text stands there once, also where the text has it already, as a rendered chat has."""
    around = chat_tokenizer(CHATML)
    around.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", around.bos_token_id), ("</s>", around.eos_token_id)],
    )
    row = {"text": f"{'<s>' * begins}{text}{'</s>' * ends}"}
    ((datum,), _) = from_rows([row], around)
    tokens = [around.bos_token_id, *ids(text), around.eos_token_id]
    assert datum == datum_from_tokens_weights(tokens, [1.0] * len(tokens))
    (sides, _) = from_rows([{"prompt": row["text"][: 3 * begins + 1], "chosen": "b</s>", "rejected": "é"}], around)
    assert [around.decode(side.model_input.to_ints()) for side in sides] == [f"<s>{text[:1]}{x}" for x in "bé"]


def test_chats() -> None:
    """Messages, from/value and prompt with completion are read alike; a message's own weight counts; Arrow's Nones do not."""
    messages = [user(), says(), user(), {**says("No"), "weight": 0.5, "tool_calls": None}]
    expected = datum_from_messages(tokenizer(), messages)
    sender = {"user": "human", "assistant": "gpt"}
    shared = [
        {"from": sender[m["role"]], "value": m["content"], **{k: m[k] for k in ("weight",) if k in m}} for m in messages
    ]
    for row in ({"messages": messages}, {"conversations": shared}, {"conversations": messages, "id": None}):
        assert only([row]) == expected
    assert only([{"messages": messages}], turns="last") == datum_from_messages(tokenizer(), messages, turns="last")
    split = only([{"prompt": messages[:3], "completion": messages[3:]}])
    assert split == datum_from_messages(tokenizer(), [user(), {**says(), "train": False}, *messages[2:]])
    ((marked,), _) = from_rows([{"messages": messages}], tokenizer(CHATML_MARKED))
    assert marked == expected


def test_tools_and_arguments_of_rows() -> None:
    """A row's tools, as a list or in JSON, and its template arguments reach its template; given ones are for the others."""
    template = "{{ tools | tojson if tools else '' }}{{ mood or '' }}" + CHATML
    tools = [{"type": "function", "function": {"name": "weather"}}]
    base: dict[str, Any] = {"messages": [user(), says()]}
    rows = [
        {**base, "tools": tools},
        {**base, "tools": json.dumps(tools), "chat_template_kwargs": {"mood": "good"}},
        base,
    ]
    data, _ = from_rows(rows, tokenizer(template), chat_template_kwargs={"mood": "fair"})
    for datum, used, mood in zip(data, (tools, tools, None), ("fair", "good", "fair"), strict=True):
        expected = datum_from_messages(
            tokenizer(template), base["messages"], tools=used, chat_template_kwargs={"mood": mood}
        )
        assert datum == expected


@pytest.mark.parametrize("implicit", [False, True])
def test_pairs_of_chats(implicit: bool) -> None:
    """Both sides are trained from the end of the prompt on, whether it is a column, or what they begin with."""
    prompt = [user(), says("No"), user("b")]
    sides = {"chosen": [says("Yes")], "rejected": [says("hi"), user(), says()]}
    row: dict[str, Any] = {"prompt": prompt, **sides}
    if implicit:
        row = {"prompt": "hi", **{name: prompt + side for name, side in sides.items()}}
    data, report = from_rows([row, {**row, "prompt": None} if implicit else row], tokenizer())
    untrained = [user(), {**says("No"), "train": False}, user("b")]
    for datum, side in zip(data, sides.values(), strict=False):
        expected = datum_from_messages(tokenizer(), untrained + side)
        assert datum.model_input == expected.model_input
        assert datum.loss_fn_inputs["weights"] == expected.loss_fn_inputs["weights"]
    assert [(d.loss_fn_inputs["pair_id"].data, d.loss_fn_inputs["role"].data) for d in data] == [
        ([0], [1]), ([0], [0]), ([1], [1]), ([1], [0])
    ]  # fmt: skip
    validate(data, pairs=True, known_keys=True)
    assert (report.kind, report.rows, report.datums) == ("preference", 2, 4)


def test_pairs_of_texts() -> None:
    """A pair of texts has the same prompt tokens on both sides, also where only one answer merges with its end."""
    rows = [{"prompt": "b ", "chosen": "the", "rejected": "\n"}, {"chosen": "a b Yes", "rejected": "a b No"}]
    (merged, apart, implicit, other), _ = from_rows(rows, tokenizer())
    expected = preference_pair(ids("b"), ids(" the</s>"), ids(" \n</s>"), pair_id=0)
    assert (merged, apart) == expected
    assert (implicit, other) == preference_pair(ids("a b "), ids("Yes</s>"), ids("No</s>"), pair_id=1)


def test_labels() -> None:
    """A label of a completion is the datum's; true is desirable."""
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False, 1)]
    data, report = from_rows(rows, tokenizer())
    assert [datum.loss_fn_inputs["label"].data for datum in data] == [[1], [0], [1]]
    assert report.kind == "unpaired_preference"
    dropped, report = from_rows(rows, tokenizer(), ignore=("label",))
    assert "label" not in dropped[0].loss_fn_inputs
    assert (report.kind, report.unused_columns) == ("prompt_completion", ("label",))


def test_tokens() -> None:
    """Labels and masks say of each token whether it is trained, all of them together; padding at the ends is cut off."""
    row = {"input_ids": [7, 8, 9, 3], "labels": [-100, -100, 9, 3]}
    assert from_rows([row], None)[0] == [datum_from_spans([7, 8, 9, 3], [(2, 4)])]
    masks = {"completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}
    assert from_rows([{"input_ids": [7, 8, 9, 3], **masks}], None)[0] == [
        datum_from_tokens_weights([7, 8, 9, 3], [0, 1, 0, 1])
    ]
    padded = {
        "input_ids": [0, 7, 8, 9, 3, 0],
        "labels": [-100, -100, -100, 9, 3, -100],
        "attention_mask": [0, 1, 1, 1, 1, 0],
    }
    assert from_rows([padded], None)[0] == [datum_from_spans([7, 8, 9, 3], [(2, 4)])]
    positions = {**padded, "position_ids": [1, 0, 1, 2, 3, 1], "seq_lengths": [4]}
    assert from_rows([positions], None)[0] == [datum_from_spans([7, 8, 9, 3], [(2, 4)])]


def test_nulls_in_tool_calls_are_told() -> None:
    """A table that fills in None for an argument that another row has is told; an empty key of a message is not."""
    calling = CHATML.replace("+ message['content']", "+ message['content'] + (message.tool_calls | string)")
    rows = [
        {"messages": [user(), {**says(), "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]}
        for arguments in ({"a": 1, "b": None}, {"a": 1}, {"a": [{"b": None}]})
    ]
    _, report = from_rows([*rows, {"messages": [user(), {**says(), "tool_calls": None}]}], tokenizer(calling))
    assert report.with_nulls == 2
    assert str(report).endswith("chats with null in tool calls or tools (tables fill it in for missing keys): 2")


BAD: list[tuple[Any, str]] = [
    ({"instruction": "a", "output": "b"}, "no known format.*instruction, output.*rename instruction"),
    ({"prompt": "a", "complettion": "b"}, "did you mean 'completion'"),
    ({"prompt": "a"}, "prompts alone are for sampling"),
    ({"prompt": "a", "chosen": "b"}, "its columns are prompt, chosen; it has 'chosen' but no 'rejected': give both"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "it has 'chosen' but no 'rejected'"),
    ({"prompt": "a", "rejected": "b"}, "it has 'rejected' but no 'chosen'"),
    ({"messages": [user(), says()], "text": "x"}, "may be read as messages or as text"),
    ({"messages": [user(), says()], "conversations": []}, "both messages and conversations"),
    ({"messages": [user(), says()], "weight": 0.5}, "column 'weight' would change what is trained"),
    ({"messages": [user(), says()], "images": [1]}, "column 'images'"),
    ({"prompt": "a", "completion": "b", "response_mask": [1]}, "column 'response_mask' would change what is trained"),
    ({"input_ids": [1, 2], "labels": [1, 2], "token_weights": [0.5, 1]}, "column 'token_weights' would change"),
    ({"messages": [user(), {**says(), "train_detail": [{"begin": 0, "end": 1}]}]}, "message 1 has 'train_detail', which would"),
    ({"prompt": "a", "completion": "b", "tools": "[]"}, "column 'tools' is for chats"),
    ({"prompt": "a", "completion": [says()]}, "prompt is text, but completion is a list of messages"),
    ({"prompt": [user()], "completion": "b"}, "prompt is a list of messages, but completion is text"),
    ({"prompt": [user()], "completion": []}, "no message after the prompt"),
    ({"prompt": [{**user(), "train": True}], "completion": [says()]}, "prompt.0. asks to be trained"),
    ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    ({"prompt": "a", "completion": 3}, "'completion' must hold text or a list"),
    ({"prompt": "a", "completion": "b", "label": "yes"}, "label must be true"),
    ({"messages": "hi"}, "must hold a list of messages, got text"),
    ({"messages": [user(), 3]}, r"messages\[1\] must be a dict"),
    ({"messages": [user(), user()]}, "no message is trained"),
    ({"messages": [user(), says()], "tools": "{"}, "no JSON"),
    ({"messages": [user(), says()], "chat_template_kwargs": [1]}, "must hold a dict"),
    ({"conversations": [{"from": "humn", "value": "a"}]}, r"from 'humn'.*did you mean 'human'"),
    ({"conversations": [{"from": "human", "value": "a", "role": "user"}]}, "both from/value and role/content"),
    ({"conversations": [{"from": "human", "text": "a"}]}, "needs both from and value"),
    ({"chosen": "a", "rejected": [says()]}, "one of chosen and rejected is text"),
    ({"chosen": [says()], "rejected": [says("No")]}, "no common message"),
    ({"chosen": [user(), says()], "rejected": [user(), says()]}, "are the same"),
    ({"prompt": "a", "chosen": "a b", "rejected": "a c"}, "begin with the prompt, which would stand there twice"),
    ({"prompt": [user()], "chosen": [user(), says()], "rejected": [user(), says("No")]}, "would stand there twice"),
    ({"prompt": [user()], "completion": [user(), says()]}, "completion begins with the messages of prompt"),
    ({"prompt": [user()], "chosen": [says()], "rejected": [user(), says("No")]}, "rejected begins with the messages of pr"),
    ({"prompt": "other", "chosen": [user(), says()], "rejected": [user(), says("No")]}, "whose first question is another"),
    ({"chosen": "a b", "rejected": "b a"}, "no common token"),
    ({"input_ids": [1, 2]}, "add labels"),
    ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "shifted by one already"),
    ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries, but input_ids has 2"),
    ({"input_ids": [1, 2], "completion_mask": [0, 2]}, "a mask is 0 or 1"),
    ({"input_ids": [1.5], "labels": [1]}, "'input_ids' must hold a list of integers"),
    ({"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 0, 1]}, "zeros between ones"),
    ({"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "seq_lengths": [3, 1]}, "are packed into it: one begins at token 3"),
    ({"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "position_ids": [0, 1, 0, 1]}, "one begins at token 2"),
    ({"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "position_ids": [0, 1]}, "position_ids has 2 entries"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_what_is_ambiguous_is_refused(row: Any, reason: str) -> None:
    """A row that can be read in two ways, or in none, is refused with its number, columns and reason."""
    with pytest.raises(InvalidDatumsError, match=f"(?s)row 0: .*{reason}"):
        from_rows([row], tokenizer())


def test_all_bad_rows_at_once() -> None:
    """Every bad row is listed, those that are too long and those of another kind too; good ones are not."""
    good = {"prompt": "a", "completion": "b"}
    rows: list[dict[str, Any]] = [
        good,
        {"prompt": 1, "completion": "b"},
        good,
        {"prompt": "a" * 30, "completion": "b"},
        {"text": "a"},
    ]
    with pytest.raises(InvalidDatumsError) as caught:
        from_rows(rows, tokenizer(), max_length=20)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["row 1", "row 3", "row 4"]
    assert "rows before it are of kind 'prompt_completion'" in caught.value.problems[2]


@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        ([], {}, "there are no rows"),
        ({"train": []}, {}, "one split"),
        ("chats.jsonl", {}, r"got str; .*rows = \[json.loads\(line\) for line in open\('chats.jsonl'\)\]"),
        (Path("chats.jsonl"), {}, r"for line in open\('chats.jsonl'\)"),
        ("{" + 100 * " ", {}, r"got str; .*for line in open\(path\)"),
        (3, {}, "must be a list of dicts or a data set, got int"),
        ([["a"]], {}, "row 0 must be a dict"),
        ([{"text": "a"}], {"kind": "txt"}, "did you mean 'text'"),
        ([{"text": "a"}], {"kind": "messages"}, "row 0: is not of kind 'messages'"),
        ([{"text": "a"}], {"overlong": "cut"}, "overlong must be"),
        ([{"text": "a"}], {"truncation_side": "middle"}, "truncation_side must be"),
        ([{"text": "a"}], {"max_length": 0}, "max_length must be"),
        ([{"text": "a"}], {"ignore": ("weigth",)}, "ignore names 'weigth', which no row has"),
    ],
)
def test_wrong_arguments(rows: Any, options: dict[str, Any], reason: str) -> None:
    """An argument that means nothing is refused."""
    with pytest.raises(DatumError, match=reason):
        from_rows(rows, tokenizer(), **options)
