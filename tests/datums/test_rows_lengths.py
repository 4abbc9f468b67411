"""Rows that are too long: refused, dropped or cut, and never without a word."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pretrained.chat_templates import CHATML
from pretrained.chat_tokenizer import chat_tokenizer

from pullback.datums import Datum, RowsReport, from_rows
from pullback.errors import InvalidDatumsError

ROWS = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=5)


@cache
def tokenizer() -> Any:
    return chat_tokenizer(CHATML)


def row(prompt: int, answer: int, labels: bool = True) -> dict[str, Any]:
    ids = [*range(prompt), *range(100, 100 + answer)]
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:] if labels else [-100] * len(ids)}


def tokens(datum: Datum) -> tuple[list[int], list[float]]:
    inputs = datum.loss_fn_inputs
    return [datum.model_input.to_ints()[0], *inputs["target_tokens"].tolist()], [0.0, *inputs["weights"].tolist()]


@given(sizes=ROWS, limit=st.integers(1, 12), side=st.sampled_from(["left", "right"]))
def test_truncation(sizes: list[tuple[int, int]], limit: int, side: Any) -> None:
    """What is kept is one end of the row, as long as allowed; the report accounts for every row."""
    rows = [row(*size) for size in sizes]
    data, report = from_rows(rows, None, max_length=limit, overlong="truncate", truncation_side=side)
    left = iter(data)
    for number, (prompt, answer) in enumerate(sizes):
        ids, kept = rows[number]["input_ids"], limit + 1
        ids = ids[:kept] if side == "right" else ids[-kept:]
        if len(ids) < 2 or not any(token >= 100 for token in ids[1:]):
            assert any(note.row == number for note in report.dropped)
            continue
        assert any(note.row == number for note in report.truncated) == (prompt + answer > kept)
        assert tokens(next(left)) == (ids, [0.0, *(float(token >= 100) for token in ids[1:])])
    assert next(left, None) is None
    assert report.datums == len(data) == report.rows - len(report.dropped)
    assert report.tokens == sum(len(datum.model_input) for datum in data)


@given(sizes=ROWS, limit=st.integers(1, 12))
def test_drop_and_error(sizes: list[tuple[int, int]], limit: int) -> None:
    """'drop' leaves the rows that are too long out and names them; 'error', the default, names the same ones."""
    rows = [row(*size) for size in sizes]
    long = [number for number, size in enumerate(sizes) if sum(size) - 1 > limit]
    data, report = from_rows(rows, None, max_length=limit, overlong="drop")
    assert [note.row for note in report.dropped if "max_length" in note.reason] == long
    fitting = [r for number, r in enumerate(rows) if number not in long]
    assert data == (from_rows(fitting, None)[0] if fitting else [])
    if long:
        with pytest.raises(InvalidDatumsError) as caught:
            from_rows(rows, None, max_length=limit)
        assert [int(problem.split(":")[0].removeprefix("row ")) for problem in caught.value.problems] == long


def test_pairs_keep_one_prompt() -> None:
    """Cut on the left, both sides lose the same tokens of their prompt; on the right each loses its own end."""
    pair = {"prompt": "abcdef", "chosen": "wxyz", "rejected": "uv"}
    left, report = from_rows([pair], tokenizer(), max_length=8, overlong="truncate", truncation_side="left")
    assert [tokenizer().decode(tokens(d)[0]) for d in left] == ["cdefwxyz</s>", "cdefuv</s>"]
    assert "cut on the left" in report.truncated[0].reason
    right, _ = from_rows([pair], tokenizer(), max_length=7, overlong="truncate")
    assert [tokenizer().decode(tokens(d)[0]) for d in right] == ["abcdefwx", "abcdefuv"]
    _, report = from_rows([pair], tokenizer(), max_length=3, overlong="truncate", truncation_side="left")
    assert "has not so many to lose" in report.dropped[0].reason
    _, report = from_rows([{**pair, "rejected": "wx"}], tokenizer(), max_length=6, overlong="truncate")
    assert "leaves chosen and rejected the same" in report.dropped[0].reason


def test_report() -> None:
    """The report reads as sentences of figures, and its figures are those of the data."""
    rows = [{**row(2, 3), "id": 7}, row(9, 1), row(2, 1, labels=False)]
    data, report = from_rows(rows, None, max_length=6, overlong="truncate")
    assert str(report) == (
        "3 rows of kind tokens: 1 datum, 4 tokens, of which 3 trained\n"
        "dropped: 2 rows\n"
        "  row 1: its model input has 9 tokens, more than max_length=6: cut on the right, which leaves nothing to train\n"
        "  row 2: nothing of it is trained\n"
        "columns not used: id"
    )
    assert len(data) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.rows = 4  # type: ignore[misc]
    many = dataclasses.replace(report, dropped=report.dropped * 20)
    assert str(many).count("\n  row") == 10
    assert "and 30 more" in str(many)


def test_merged_tokens_are_counted() -> None:
    """A token that holds the end of a header and the beginning of an answer is trained, and reported."""
    chats = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": c}]} for c in ("Yes", "\nYes")
    ]
    _, report = from_rows(chats, tokenizer())
    assert isinstance(report, RowsReport)
    assert report.merged_tokens == 1
    assert "begin or end in text that is not trained: 1" in str(report)
