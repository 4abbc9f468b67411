"""A plain PyTorch loop: the gradient of a step is the same for any number of micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from toy_rows import micro_batches, rows, toy_model

from pullback.losses import CrossEntropy, TokenBatch
from pullback.ops import logprobs_of

LOSS = CrossEntropy("token_mean")


def train_step(model: Any, optimizer: torch.optim.Optimizer, batches: Sequence[Mapping[str, Any]]) -> float:
    """Make one step on several micro-batches, each divided by the tokens of all."""
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    share = LOSS.with_counts(tokens=tokens)
    total = 0.0
    optimizer.zero_grad()
    for batch in batches:
        logprobs = logprobs_of(model, **batch)
        loss = share.evaluate(TokenBatch.from_labels(logprobs, batch["labels"]))
        torch.autograd.backward(loss)
        total += loss.item()
    optimizer.step()
    return total


def main() -> None:
    """Train a random model on rows that it soon knows by heart."""
    model = toy_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(10):
        loss = train_step(model, optimizer, micro_batches(rows()))
        if step % 3 == 0:
            print(step, round(loss, 3))


if __name__ == "__main__":
    main()
