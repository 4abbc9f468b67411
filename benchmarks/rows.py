"""What it costs to turn rows of chat messages into datums: against rendering and tokenizing each row once."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from typing import Any

from pullback.datums import from_rows
from pullback.testing import smollm2_folder

from .timing import Report, interleave

__all__ = ["chats", "run"]

BASELINE = "rendering and tokenization"


def chats(rows: int, messages: int, words: int) -> list[dict[str, Any]]:
    """Return rows of chats between a user and an assistant, in the words of Python's own documentation; no two are the same."""
    text = " ".join(pydoc_data.topics.topics.values()).split()

    def content(row: int, turn: int) -> str:
        start = (row * 31 + turn * words) % (len(text) - words)
        return f"{row}: {' '.join(text[start : start + words])}"

    return [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": content(k, i)} for i in range(messages)]}
        for k in range(rows)
    ]


def run(arguments: Any) -> None:
    """Time both on the same rows; each round takes all of them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    rows = chats(arguments.rows, arguments.messages, arguments.words)

    def rendered() -> int:
        return sum(len(tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"]) for row in rows)

    def datums() -> int:
        return len(from_rows(rows, tokenizer)[0])

    works: dict[str, Callable[[], object]] = {BASELINE: rendered, "from_rows": datums}
    facts = {"tokens": rendered(), "datums": datums()}
    times = interleave(works, arguments.rounds, arguments.clock)
    report = Report("rows")
    report.add(f"{arguments.rows} rows of {arguments.messages} messages", times, BASELINE, facts)
    report.close()
