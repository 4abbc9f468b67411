"""A step is counted by its masks alone, before there are log-probs, advantages or references."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from example_losses.loss_inputs import VARIANTS, ids, make

from pullback.errors import MissingFieldError
from pullback.losses import GRPO, Correction, Loss, TokenBatch, TokenTerm
from pullback.losses.base import GradientKind
from pullback.losses.evaluation.terms import Summand
from pullback.losses.functional import nll

NUMBERS = ("advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs", "reference_point")
CORRECTED: list[Loss] = [GRPO(correction=Correction.tis(2.0)), GRPO(correction=Correction.geometric(0.99, 1.01))]


def without_numbers(loss: Loss, padded: bool) -> tuple[TokenBatch, list[TokenBatch]]:
    """Return a batch, and two that have its masks, ids and labels only, each with groups of its own."""
    inputs = make(loss, padded=padded, old=True)
    bare: Any = {name: tensor for name, tensor in inputs.tensors.items() if name not in NUMBERS}
    bare["logprobs"] = torch.zeros_like(bare["logprobs"])
    others = [bare, bare if "group_id" not in bare else {**bare, "group_id": bare["group_id"] + 1000}]
    return inputs.batch(), [type(inputs)(padded, inputs.lengths, tensors).batch() for tensors in others]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("loss", [*VARIANTS, *CORRECTED], ids=ids([*VARIANTS, *CORRECTED]))
def test_masks_are_enough(loss: Loss, padded: bool) -> None:
    """The counts of a batch without numbers are those of the whole batch."""
    whole, bare = without_numbers(loss, padded)
    counts = loss.counts(bare)
    assert counts == {name: 2 * count for name, count in loss.counts([whole]).items()}
    assert counts.keys() == loss.denominators


class Choosing(Loss):
    """A loss that trains tokens of positive advantage only: what counts depends on a number."""

    name: ClassVar[str] = "choosing"
    aggregation = "token_mean"
    gradient_kind: ClassVar[GradientKind] = "token"
    required_inputs: ClassVar[tuple[str, ...]] = ("weights", "advantages")

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        chosen = batch.given("advantages") > 0
        return (TokenTerm("nll", nll, (), self.main_aggregation, where=chosen),)


def test_a_number_that_decides_what_counts_is_asked_for() -> None:
    """A stand-in would give another count, so the batch must have the number itself."""
    zeros, mask = torch.zeros(2, 2), torch.ones(2, 2)
    with pytest.raises(MissingFieldError, match="missing input 'advantages': choosing may choose by it what counts"):
        Choosing().counts([TokenBatch.from_padded(zeros, mask)])
    known = TokenBatch.from_padded(zeros, mask, advantages=torch.tensor([1.0, -1.0]))
    assert Choosing().counts([known]) == {"tokens": 2.0}
