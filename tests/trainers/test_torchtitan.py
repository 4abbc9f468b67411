"""torchtitan's loss interface with our loss: the gradient of its own cross-entropy, at 1 and 4 micro-batches; and the trap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from other_trainers.trainer_checks import TOLERANCE, equal_rows, error, gradient, token_mean
from torch import Tensor
from toy_rows import Row, micro_batches, rows, toy_model

from pullback.errors import ConfigError
from pullback.losses import CrossEntropy, TokenBatch
from pullback.ops import logprobs_from_logits

pytest.importorskip("torchtitan", reason="needs torchtitan: make trainers TRAINERS=torchtitan")
import torchtitan_loss
from torchtitan.components import loss as theirs

LIMIT = TOLERANCE[torch.float32]


def step(loss: Any, data: Sequence[Row], micro: int, layout: str) -> Tensor:
    """What torchtitan's Trainer does: count the valid tokens of the step, then run each micro-batch forward and backward."""
    model = toy_model()
    batches = micro_batches(data, 8 // micro)
    shifted = [(b["input_ids"][:, :-1], b["labels"][:, 1:], b["attention_mask"][:, :-1]) for b in batches]
    valid = torch.stack([(labels != -100).sum() for _, labels, _ in shifted]).sum()
    for ids, labels, mask in shifted:
        pred = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if layout == "packed":
            pred, labels = pred.flatten(0, 1), labels.flatten()
        found = loss(pred, labels, valid)
        torch.autograd.backward(found[0] if isinstance(found, tuple) else found)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("micro", [1, 4])
def test_cross_entropy(micro: int, layout: str) -> None:
    """Ours and theirs have the gradient of the plain formula."""
    model = toy_model()
    exact = gradient(model, token_mean(model, rows()))
    assert error(step(torchtitan_loss.PullbackLoss.Config().build(), rows(), micro, layout), exact) < LIMIT
    if layout == "padded":  # as in 0.3; later versions pack
        assert error(step(theirs.CrossEntropyLoss.Config().build(), rows(), micro, layout), exact) < LIMIT


def own_count(pred: Tensor, labels: Tensor, _: Any) -> Tensor:
    logprobs = logprobs_from_logits(pred, labels, shifted=True)
    return CrossEntropy("token_mean").evaluate(TokenBatch.from_labels(logprobs[None], labels[None])).loss


def test_own_counts_are_another_gradient() -> None:
    """The control: four times as large where the counts are equal."""
    model, data = toy_model(), equal_rows(rows((9,) * 8), 6)
    assert error(step(own_count, data, 4, "packed"), 4 * gradient(model, token_mean(model, data))) < LIMIT


def test_a_count_is_required() -> None:
    with pytest.raises(ConfigError, match="global_valid_tokens of torchtitan"):
        torchtitan_loss.PullbackLoss.Config().build()(torch.zeros(3, 5), torch.tensor([1, -100, 2]))
