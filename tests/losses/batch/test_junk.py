"""What is not trained has no effect, whatever it holds."""

from __future__ import annotations

import math

import pytest
import torch
from example_losses.loss_inputs import DEFAULTS, VARIANTS, Inputs, ids, make
from hypothesis import given
from hypothesis import strategies as st
from reads import pretend_device
from torch import Tensor

from pullback.errors import InvalidDatumsError
from pullback.losses import GRPO, KL, Loss, functional
from pullback.losses.evaluation import token_sum

EACH = pytest.mark.parametrize("loss", VARIANTS, ids=ids(VARIANTS))
JUNK = (math.nan, math.inf, -math.inf, 1e30)
SPOILED = ("logprobs", "advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs")


def spoiled(inputs: Inputs, junk: float) -> Inputs:
    """Put junk wherever nothing is trained."""
    changes = {n: t.masked_fill(~inputs.trained, junk) for n, t in inputs.tensors.items() if n in SPOILED}
    return inputs.replaced(**changes)


def result(loss: Loss, inputs: Inputs) -> tuple[Tensor, Tensor]:
    leaf = inputs.tensors["logprobs"].clone().requires_grad_()
    value = loss.evaluate(inputs.batch(leaf)).loss
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def check(loss: Loss, inputs: Inputs, junk: float) -> None:
    """Assert that junk changes neither value nor gradient by a bit, and that its gradient is exactly 0."""
    value, gradient = result(loss, inputs)
    other, with_junk = result(loss, spoiled(inputs, junk))
    assert torch.equal(other, value)
    assert torch.equal(with_junk, gradient)
    assert bool((with_junk[~inputs.trained] == 0).all())


@EACH
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
@pytest.mark.parametrize("junk", JUNK)
def test_junk_has_no_effect(loss: Loss, padded: bool, junk: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layout, with every kind of mask, on the CPU's own ways and on those of a device."""
    made = [make(loss, padded=padded, mask=mask, pair_ids=padded, old=True) for mask in ("float", "ones", "bool")]
    for inputs in made:
        check(loss, inputs, junk)
    with monkeypatch.context() as patch:
        pretend_device(patch)
        for inputs in made:
            check(loss, inputs, junk)


@pytest.mark.parametrize("loss", [v for v in VARIANTS if v.name == "cross_entropy"], ids=lambda x: x.aggregation.name)
@given(junk=st.sampled_from(JUNK), padded=st.booleans(), mask=st.sampled_from(["float", "bool"]))
def test_candidates(loss: Loss, junk: float, padded: bool, mask: str) -> None:
    """A candidate of weight 0 may hold anything, beside one that is trained."""
    check(loss, make(loss, padded=padded, mask=mask, candidates=3), junk)


@pytest.mark.parametrize("junk", JUNK)
def test_junk_under_transforms(junk: float) -> None:
    """Under torch.func the same selection is written another way, and holds too."""
    loss = GRPO(kl=KL())
    inputs = make(loss, padded=True)
    for each in (inputs, spoiled(inputs, junk)):

        def value(x: Tensor, each: Inputs = each) -> Tensor:
            return loss.evaluate(each.batch(x)).loss

        gradient = torch.func.grad(value)(each.tensors["logprobs"])
        torch.testing.assert_close(gradient, result(loss, inputs)[1], rtol=1e-6, atol=1e-8)
        assert bool((gradient[~inputs.trained] == 0).all())


def test_multiplying_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: where the mask multiplies, NaN gets through."""
    monkeypatch.setattr(token_sum, "select_", lambda values, weights: values if weights is None else values * weights)
    with pytest.raises(AssertionError):
        check(GRPO(), make(GRPO(), mask="ones"), math.nan)


REFUSED = (math.nan, math.inf, -math.inf, 0.02)


@pytest.mark.parametrize("loss", DEFAULTS, ids=ids(DEFAULTS))
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
@pytest.mark.parametrize("wrong", REFUSED)
def test_the_same_is_refused_where_trained(loss: Loss, padded: bool, wrong: float) -> None:
    """One trained log-prob that is not finite, or positive, is named, whatever the loss would make of it."""
    inputs = make(loss, padded=padded, mask="ones")
    inputs.tensors["logprobs"][(1, 1) if padded else 6] = wrong  # the second token of the second sequence
    with pytest.raises(InvalidDatumsError, match="sequence 1, token 1: logprobs is"):
        loss.evaluate(inputs.batch())


def test_finite_losses_of_infinite_logprobs() -> None:
    """Why it takes a look: PPO's ratio of -inf is 0, and a margin that is infinite has a DPO loss of 0."""
    lost = torch.tensor([-math.inf], dtype=torch.float64)
    assert functional.ppo_clip(lost, -1.0, torch.ones(1)).isfinite().all()
    assert functional.dpo(-lost, lost.new_zeros(1)).isfinite().all()
