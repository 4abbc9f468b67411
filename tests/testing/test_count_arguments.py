"""A loss that is told how many tokens the whole step trains, and does not divide by it, is told so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pullback.testing import loss_report


def of_logits(reduction: str, use: bool) -> Callable[..., Tensor]:
    """Return a loss in the manner of transformers, whose trainer gives the tokens of the step."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1).double()
        value = cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction=reduction)
        return value / num_items_in_batch if use and num_items_in_batch is not None else value

    return loss


def padded(logprobs: Tensor, mask: Tensor, num_tokens: int) -> Tensor:
    return -torch.where(mask, logprobs, 0.0).sum() / max(1, num_tokens)


def padded_mean(logprobs: Tensor, mask: Tensor, num_tokens: int) -> Tensor:
    return -torch.where(mask, logprobs, 0.0).sum() / mask.sum().clamp(min=1)


def without(outputs: Any, labels: Tensor) -> Tensor:
    return of_logits("mean", use=False)(outputs, labels)


@pytest.mark.parametrize("loss", [of_logits("sum", use=True), padded, without], ids=["logits", "padded", "not told"])
def test_divided_by_the_count(loss: Any) -> None:
    assert loss_report(loss, only="inputs")["inputs"].verdict == "passed"


@pytest.mark.parametrize(
    ("loss", "name"),
    [(of_logits("mean", use=False), "num_items_in_batch"), (padded_mean, "num_tokens")],
    ids=["logits", "padded"],
)
def test_a_count_that_is_ignored(loss: Any, name: str) -> None:
    """The mean of each micro-batch in a trainer that adds them up."""
    result = loss_report(loss, only="inputs")["inputs"]
    assert result.verdict == "failed"
    assert result.sentence.startswith(f"{name} change neither the value nor the gradient")
    assert "divides by a count of its own" in result.sentence


def test_a_count_that_the_caller_gives() -> None:
    """It is no count of the batches that are tried."""
    report = loss_report(padded_mean, only="inputs", arguments={"num_tokens": 7})
    assert report["inputs"].verdict == "passed"
