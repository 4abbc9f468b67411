"""check_builder: right builders pass, and every single token that is trained or left out wrongly is noticed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.datums import Datum, ModelInput, datum_from_messages, datum_from_prompt_completion
from pullback.errors import ConfigError
from pullback.testing.datacheck import BUILDER_ROWS, TinyTokenizer, built_example, check_builder

TOKENIZER = TinyTokenizer()
words = st.text("ABCDEFGHIJ KLM.?", min_size=1, max_size=8).map(lambda text: f"Q{text}Q")


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, str]]:
    """One to three turns, with a system message or none."""
    turns = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [{"role": "user", "content": draw(words)}, {"role": "assistant", "content": draw(words)}]
    return turns


def masked(messages: Any, tokenizer: Any) -> dict[str, Any]:
    """All answers and their ends, by a mask."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True)
    mask = [0] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(tokenizer.apply_chat_template(messages[:i], tokenize=True, add_generation_prompt=True))
            stop = start + len(message["content"]) + 1
            mask[start:stop] = [1] * (stop - start)
    return {"input_ids": ids, "loss_mask": mask}


@given(chats())
def test_right_builders(messages: list[dict[str, str]]) -> None:
    """The library's own builder and one by hand pass every row, whatever is said."""
    for build, cuts in ((datum_from_messages, True), (masked, False)):
        rows = check_builder(build, TOKENIZER, [messages])
        others = {row.name: row.verdict for row in rows if row.verdict != "right"}
        assert others == ({} if cuts else {"truncation": "not applicable"})


def regions(messages: list[dict[str, str]]) -> list[str | None]:
    """The row that each token belongs to, by the way the template is put together; None: either is right."""
    found: list[str | None] = [None]  # <s>
    for i, message in enumerate(messages):
        answer, said = message["role"] == "assistant", len(message["content"])
        header = 1 + len(f"{message['role']}\n")
        found += ["header" if answer else None] * header
        found += ["answer" if answer else "prompt"] * said
        before_answer = not answer and messages[i + 1]["role"] == "assistant"
        found += ["end", None] if answer else ["header" if before_answer else None] * 2  # <|im_end|> and a newline
    return found


@given(chats(), st.data())
def test_every_token_counts(messages: list[dict[str, str]], data: st.DataObject) -> None:
    """One token more or less that is trained is found by the row of its region, and by no other."""
    right, expected = masked(messages, TOKENIZER), regions(messages)
    place = data.draw(st.integers(0, len(expected) - 1))

    def flipped(messages: Any, tokenizer: Any) -> dict[str, Any]:
        return {**right, "loss_mask": [x ^ (j == place) for j, x in enumerate(right["loss_mask"])]}

    wrong = [row.name for row in check_builder(flipped, TOKENIZER, [messages]) if row.verdict == "wrong"]
    assert len(expected) == len(right["input_ids"])
    assert wrong == ([] if expected[place] is None else [expected[place]])


def test_examples_in_all_shapes() -> None:
    """A datum, labels that the model shifts, and a mask say the same of a text."""
    ids, prompt = [5, 6, 7, 8, 9], 2
    datum = datum_from_prompt_completion(ids[:prompt], ids[prompt:])
    labels = {"input_ids": ids, "labels": [-100, -100, 7, 8, 9]}
    mask = {"input_ids": [ids], "completion_mask": [[0, 0, 1, 1, 1]]}
    examples = [built_example(x) for x in (datum, [datum], labels, mask)]
    assert {(e.tokens, e.trained) for e in examples} == {((5, 6, 7, 8, 9), (False, False, True, True, True))}
    with pytest.raises(ConfigError, match="labels or a mask"):
        built_example({"input_ids": ids})
    with pytest.raises(ConfigError, match="returns a Datum"):
        built_example("text")


def test_a_chat_whose_answer_is_lost() -> None:
    """A builder that cuts the answer off, raises, or trains on another rendering is told so."""

    def cut(messages: Any, tokenizer: Any) -> dict[str, Any]:
        ids = tokenizer.apply_chat_template(messages[:-1], tokenize=True)
        return {"input_ids": ids, "labels": ids}

    def by_hand(messages: Any, tokenizer: Any) -> Datum:
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:]})

    def fails(messages: Any, tokenizer: Any) -> Datum:
        raise KeyError("prompt")

    rows = {row.name: row for row in check_builder(cut, TOKENIZER)}
    assert "is not among the tokens" in rows["answer"].reason
    rows = {row.name: row for row in check_builder(by_hand, TOKENIZER)}
    assert "not by the template" in rows["tokens"].reason
    (row,) = check_builder(fails, TOKENIZER)
    assert (row.name, row.verdict) == ("builds", "wrong")
    assert "KeyError" in row.reason


def test_arguments() -> None:
    """A row of a data set is given where it is asked for; what cannot be called, or named, is refused with what to do."""

    def of_row(example: Any, processing_class: Any) -> Any:
        return masked(example["messages"], processing_class)

    assert all(row.verdict != "wrong" for row in check_builder(of_row, TOKENIZER))
    with pytest.raises(ConfigError, match="one argument beside"):
        check_builder(lambda prompt, answer: None, TOKENIZER)
    with pytest.raises(ConfigError, match="did you mean 'header'"):
        check_builder(of_row, TOKENIZER, only="headers")
    assert list(BUILDER_ROWS) == [row.name for row in check_builder(of_row, TOKENIZER)]


def test_what_is_shown() -> None:
    """A wrong row shows the text, with a mark before what is trained."""

    def all_of_it(messages: Any, tokenizer: Any) -> dict[str, Any]:
        ids = tokenizer.apply_chat_template(messages, tokenize=True)
        return {"input_ids": ids, "labels": ids}

    (row,) = check_builder(all_of_it, TOKENIZER, only="prompt")
    assert row.example.startswith("* '<s><|im_start|>")


def test_one_cause_is_told_once() -> None:
    """Where what was said is trained too, the row of the header leads to that of the prompt; alone it has its own cause."""

    def all_of_it(messages: Any, tokenizer: Any) -> dict[str, Any]:
        ids = tokenizer.apply_chat_template(messages, tokenize=True)
        return {"input_ids": ids, "labels": ids}

    def with_header(messages: Any, tokenizer: Any) -> dict[str, Any]:
        right = masked(messages, tokenizer)
        mask = right["loss_mask"]
        first = mask.index(1)
        return {**right, "loss_mask": [0] * (first - 1) + [1] + mask[first:]}

    rows = {row.name: row.reason for row in check_builder(all_of_it, TOKENIZER)}
    assert "the mask is all ones" in rows["prompt"]
    assert rows["header"].endswith("which the template writes before an answer, is trained: see prompt")
    rows = {row.name: row.reason for row in check_builder(with_header, TOKENIZER)}
    assert rows["prompt"] == ""
    assert "Likely cause: the prompt is rendered without add_generation_prompt=True" in rows["header"]


@given(chats())
def test_the_tokenizer_tells_its_stop_tokens(messages: list[dict[str, str]]) -> None:
    """What the template writes after a stop token is not trained, with this tokenizer as with any other."""
    inputs = datum_from_messages(TOKENIZER, messages).loss_fn_inputs
    pairs = zip(inputs["target_tokens"].tolist(), inputs["weights"].tolist(), strict=True)
    answers = "".join(f"{m['content']}<|im_end|>" for m in messages if m["role"] == "assistant")
    assert TOKENIZER.decode([token for token, weight in pairs if weight]) == answers
