"""Rows are read as TRL's own trainers read them: `tests/golden/trl_rows.json` has the tokens and masks that they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pretrained.chat_templates import SHAPES
from pretrained.chat_tokenizer import SPECIAL, chat_tokenizer

from pullback.datums import Datum, from_rows

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trl_rows.json").read_text())
ENTRIES = {entry["name"]: entry for entry in GOLDEN["entries"]}


def tokens(datum: Datum) -> tuple[list[int], list[bool]]:
    inputs = datum.loss_fn_inputs
    ids = [datum.model_input.to_ints()[0], *inputs["target_tokens"].tolist()]
    return ids, [False, *(weight != 0 for weight in inputs["weights"].tolist())]


def drawn(tokenizer: Any, ids: list[int], trained: list[bool]) -> list[bool]:
    """TRL's mask without what it trains after a stop token, the line break that ChatML and Gemma end a turn with."""
    special = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    kept = list(trained)
    for j in range(1, len(ids)):
        after_stop = trained[j - 1] and ids[j - 1] in special
        kept[j] = trained[j] and not (after_stop and tokenizer.decode([ids[j]]) == "\n")
    return kept


def same(tokenizer: Any, datum: Datum, side: dict[str, Any]) -> bool:
    ids, trained = tokens(datum)
    expected = [False, *drawn(tokenizer, side["ids"], side["trained"])[1:]]  # the first token is no target
    return ids == side["ids"] and trained == expected


@pytest.mark.parametrize("name", [name for name in ENTRIES if name != "pairs, text, implicit prompt"])
def test_tokens_and_masks_are_trls(name: str) -> None:
    """The tokens are TRL's, and so is what is trained, but for the line break after a stop token, which TRL trains."""
    entry = ENTRIES[name]
    tokenizer = chat_tokenizer(SHAPES[entry["shape"]].template)
    data, report = from_rows(entry["rows"], tokenizer)
    sides = [side for row in entry["sides"] for side in row]
    assert len(data) == len(sides)
    assert all(same(tokenizer, datum, side) for datum, side in zip(data, sides, strict=True))
    assert [bool(datum.loss_fn_inputs["label"].data[0]) for datum in data if report.kind == "unpaired_preference"] == (
        entry.get("labels", [])
    )


def test_implicit_prompts_of_texts() -> None:
    """TRL cuts an implicit prompt at a character, we at a token; what TRL adds is the same on both sides, and cancels."""
    entry = ENTRIES["pairs, text, implicit prompt"]
    data, _ = from_rows(entry["rows"], chat_tokenizer(SHAPES[entry["shape"]].template))
    pairs = zip(data[::2], data[1::2], strict=True)
    for sides, pair in zip(entry["sides"], pairs, strict=True):
        beside = []
        for datum, side in zip(pair, sides, strict=True):
            ids, trained = tokens(datum)
            assert ids == side["ids"]
            extra = [j for j, (ours, theirs) in enumerate(zip(trained, side["trained"], strict=True)) if ours != theirs]
            assert not any(trained[j] for j in extra)
            beside.append([(j, ids[j]) for j in extra])
        assert beside[0] == beside[1]


def test_the_golden_masks_are_told_apart() -> None:
    """The comparison is no empty one: a mask that is moved by one token, and other tokens, are noticed."""
    entry = ENTRIES["messages"]
    tokenizer = chat_tokenizer(SHAPES[entry["shape"]].template)
    data, _ = from_rows(entry["rows"], tokenizer)
    side = entry["sides"][0][0]
    assert same(tokenizer, data[0], side)
    assert not same(tokenizer, data[0], {**side, "trained": [*side["trained"][1:], False]})
    assert not same(tokenizer, data[0], {**side, "ids": [*side["ids"][:-1], 0]})
    assert GOLDEN["version"] == "1.16.0"
