"""No value is looked at and no size depends on one: every loss runs on tensors that have no values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import pytest
import torch
from example_losses.loss_inputs import VARIANTS, Inputs, ids, make
from tiers import sampled
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from pullback.losses import CrossEntropy, Loss, Term, TokenBatch

EACH = pytest.mark.parametrize("loss", VARIANTS, ids=ids(VARIANTS))


def run(loss: Loss, inputs: Inputs) -> None:
    """Evaluate, read values and parts, and differentiate, without values."""
    with FakeTensorMode():
        fake = inputs.mapped(lambda _, tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        leaf = fake.tensors["logprobs"].requires_grad_()
        output = loss.evaluate(fake.batch(leaf))
        assert output.loss.shape == ()
        assert all(values.dtype.is_floating_point for values in output.values.values())
        assert all(part.numerator.shape == () for part in output.parts)
        (gradient,) = torch.autograd.grad(output.loss, leaf)
        assert gradient.shape == leaf.shape


@EACH
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
@pytest.mark.parametrize("mask", sampled(["float", "bool"], ["float"]))
def test_runs_without_values(loss: Loss, padded: bool, mask: str) -> None:
    """Neither evaluate nor backward asks for a value: pairs by id, groups and old log-probs included."""
    run(loss, make(loss, padded=padded, mask=mask, pair_ids=True, old=True))
    run(loss, make(loss, padded=padded, mask=mask))


@pytest.mark.parametrize("loss", [v for v in VARIANTS if v.name == "cross_entropy"], ids=lambda x: x.aggregation.name)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
def test_candidates(loss: CrossEntropy, padded: bool) -> None:
    """Soft targets too."""
    for mask in ("float", "bool"):
        run(loss, make(loss, padded=padded, mask=mask, candidates=3))


def test_a_read_is_noticed() -> None:
    """Negative control: a loss that reads one number does not run."""

    @final
    @dataclass(frozen=True)
    class Reads(Loss):
        aggregation: str = "sum"
        name: ClassVar[str] = "reads"
        gradient_kind: ClassVar[str] = "batch"  # type: ignore[assignment]
        required_inputs: ClassVar[tuple[str, ...]] = ()

        def terms(self, batch: TokenBatch) -> tuple[Term, ...]:
            values: Tensor = batch.policy * batch.policy.detach().abs().max().item()
            return (Term("scaled", values, "token", self.main_aggregation),)

    with pytest.raises(DataDependentOutputException):
        run(Reads(), make(CrossEntropy()))
