"""What is not trained: how much of it there is has no effect, and how a NaN of it gets through is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pullback.testing.losscheck import check_property, loss_under_test, search


@pytest.fixture(autouse=True)
def _little_shrinking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest example is another test's."""
    monkeypatch.setattr(search, "_SHRINKING", 0)


def clean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), x, 0.0)


def verdict(loss: Any, name: str, **options: Any) -> tuple[str, str]:
    result = check_property(loss_under_test(loss, **options), name, 4)
    return result.verdict, result.sentence


def test_the_length_of_the_prompt() -> None:
    """A mean over the whole text, prompt included, is found without any padding; one over trained tokens passes."""

    def of_all(data: Any, logprobs: Any) -> Any:
        masks = [datum.loss_fn_inputs["weights"].to_torch() != 0 for datum in data]
        return sum(-torch.where(m, x, 0.0).sum() / len(x) for m, x in zip(masks, logprobs, strict=True)), {}

    def of_trained(data: Any, logprobs: Any) -> Any:
        masks = [datum.loss_fn_inputs["weights"].to_torch() != 0 for datum in data]
        rows = zip(masks, logprobs, strict=True)
        return sum(-torch.where(m, x, 0.0).sum() / m.sum().clamp(min=1) for m, x in rows), {}

    failed, sentence = verdict(of_all, "untrained")
    assert failed == "failed"
    assert "the length of the whole text counts" in sentence
    assert verdict(of_trained, "untrained")[0] == "passed"


def test_how_a_nan_gets_through() -> None:
    """A mask that multiplies, one that selects too late, and one that is shifted are told apart."""

    def multiplied(logprobs: Tensor, mask: Tensor) -> Tensor:
        return -(logprobs * mask).sum()

    def late(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -clean(logprobs * advantages, mask).sum()

    def shifted(logprobs: Tensor, mask: Tensor) -> Tensor:
        return -clean(logprobs[:, :-1], mask[:, 1:]).sum()

    for loss, cause in (
        (multiplied, "a mask that multiplies"),
        (late, "selected after"),
        (shifted, "shifted by one token"),
    ):
        failed, sentence = verdict(loss, "poison", form="padded")
        assert failed == "failed"
        assert cause in sentence
