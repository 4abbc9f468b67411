"""How far sums are from exact ones: long sequences in fp32, and whole losses beside fp64."""

from __future__ import annotations

import pytest
import torch
from example_losses.loss_inputs import VARIANTS, ids, make
from torch import Tensor

from pullback.losses import Loss, TokenBatch

BOUND = 2e-8  # of the sum of magnitudes
LONGEST = pytest.param(131_072, marks=pytest.mark.slow)


def numbers(rows: int, tokens: int) -> Tensor:
    return -torch.rand(rows, tokens, generator=torch.Generator().manual_seed(tokens)) * 3.0 - 0.01


def error(found: Tensor, values: Tensor) -> float:
    """Largest error of a row's sum, of the sum of its magnitudes."""
    return float(((found - values.double().sum(-1)).abs() / values.double().abs().sum(-1)).max())


@pytest.mark.parametrize("tokens", [1000, 8192, 32768, LONGEST])
@pytest.mark.parametrize("weighted", [True, False])
def test_row_sums(tokens: int, weighted: bool) -> None:
    """Sums within sequences, padded and packed, are exact to 2e-8 of their magnitudes."""
    x = numbers(8, tokens)
    w = torch.ones(8, tokens) if weighted else torch.ones(8, tokens, dtype=torch.bool)
    for grad in (True, False):
        leaf = x.clone().requires_grad_(grad)
        padded = TokenBatch.from_padded(leaf, w)
        packed = TokenBatch.from_packed(leaf.view(-1), [tokens] * 8, weights=w.view(-1))
        for batch in (padded, packed):
            assert error(batch.weighted_row_sum().detach(), x) <= BOUND


def test_naive_sum_is_noticed() -> None:
    """Negative control: adding up one by one in fp32 is far outside of the bound."""
    x = numbers(1, 32768)
    assert error(x.cumsum(-1)[:, -1].double(), x) > BOUND


@pytest.mark.parametrize("loss", VARIANTS, ids=ids(VARIANTS))
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
def test_fp32_beside_fp64(loss: Loss, padded: bool) -> None:
    """Value and gradient in fp32 are those in fp64 of the same numbers, to 1e-5 and 3e-5 of the largest."""
    narrow = make(loss, padded=padded, old=True)
    exact = narrow.mapped(lambda _, t: t.double() if t.is_floating_point() else t)

    def result(inputs: object) -> tuple[Tensor, Tensor]:
        leaf = inputs.tensors["logprobs"].clone().requires_grad_()  # type: ignore[attr-defined]
        value = loss.evaluate(inputs.batch(leaf)).loss  # type: ignore[attr-defined]
        return value.detach().double(), torch.autograd.grad(value, leaf)[0].double()

    (value, gradient), (want, slope) = result(narrow), result(exact)
    assert float((value - want).abs()) <= 1e-5 * max(1.0, float(want.abs()))
    assert float((gradient - slope).abs().max()) <= 3e-5 * float(slope.abs().max())


@pytest.mark.parametrize("loss", VARIANTS, ids=ids(VARIANTS))
def test_bf16_inputs_are_computed_in_fp32(loss: Loss) -> None:
    """The loss of numbers that bf16 holds is that of the same numbers in fp32, to the last bit."""
    narrow = make(loss, old=True).mapped(lambda name, t: t.bfloat16() if t.is_floating_point() else t)
    wide = narrow.mapped(lambda _, t: t.float() if t.is_floating_point() else t)
    found = loss.evaluate(narrow.batch()).loss
    assert found.dtype == torch.float32
    assert torch.equal(found, loss.evaluate(wide.batch()).loss)


def test_ratios_of_rounded_log_probs() -> None:
    """What the page says: rounded to bf16, between -4 and -16 nats, a ratio of two is off by up to 3 to 6 per cent."""
    for low, high, percent in ((-8.0, -4.0, 3.2), (-16.0, -8.0, 6.5)):
        x = torch.linspace(low, high, 10_001, dtype=torch.float64)
        off = (x.bfloat16().double() - x).abs().amax()
        assert percent - 0.3 < 100 * (torch.exp(2 * off) - 1) < percent
