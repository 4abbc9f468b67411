"""What the examples train on: rows of very different lengths, their collator, and a model that needs no download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pullback.testing import random_llama

VOCABULARY = 64
COMPLETIONS = (2, 3, 4, 6, 12, 20, 30, 40)  # trained tokens of each row: unequal, so that a mean of means shows
Row = dict[str, list[int]]


def rows(lengths: Sequence[int] = COMPLETIONS) -> list[Row]:
    """Return a row for each length: a prompt of three tokens, and a completion that is trained."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(VOCABULARY, (3 + n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in tokens]


def preferences(pairs: int = 8) -> list[dict[str, Row]]:
    """Return a chosen and a rejected row with one prompt, for each pair."""
    made = rows([3 + 7 * i % 11 for i in range(2 * pairs)])
    for chosen, rejected in zip(made[::2], made[1::2], strict=True):
        rejected["input_ids"][:3] = chosen["input_ids"][:3]
    return [{"chosen": c, "rejected": r} for c, r in zip(made[::2], made[1::2], strict=True)]


def collate(batch: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
    """Pad on the right: labels with -100, and an attention mask."""
    longest = max(len(row["input_ids"]) for row in batch)
    spare = [longest - len(row["input_ids"]) for row in batch]
    columns = {
        "input_ids": [row["input_ids"] + [0] * n for row, n in zip(batch, spare, strict=True)],
        "labels": [row["labels"] + [-100] * n for row, n in zip(batch, spare, strict=True)],
        "attention_mask": [[1] * (longest - n) + [0] * n for n in spare],
    }
    return {name: torch.tensor(column) for name, column in columns.items()}


def micro_batches(made: Sequence[Row], size: int = 2) -> list[dict[str, Any]]:
    """Return the rows in batches of ``size``."""
    return [collate(made[i : i + size]) for i in range(0, len(made), size)]


def toy_model(seed: int = 0) -> Any:
    """Return a random Llama of transformers; another seed is another model."""
    return random_llama(seed=seed, vocab_size=VOCABULARY, hidden_size=32)
