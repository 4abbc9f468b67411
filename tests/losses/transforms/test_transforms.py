"""Losses under torch.func, twice differentiated, under autocast and in half precision."""

from __future__ import annotations

import pytest
import torch
from example_losses.loss_inputs import DEFAULTS, EXTRA, Inputs, ids, make
from torch import Tensor

from pullback.losses import Loss

LOSSES = [*DEFAULTS, *EXTRA]
EACH = pytest.mark.parametrize("loss", LOSSES, ids=ids(LOSSES))
PADDED = pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])


def value(loss: Loss, inputs: Inputs, x: Tensor) -> Tensor:
    return loss.evaluate(inputs.batch(x)).loss


def gradient(loss: Loss, inputs: Inputs, *, keep: bool = False) -> Tensor:
    leaf = inputs.tensors["logprobs"].clone().requires_grad_()
    return torch.autograd.grad(value(loss, inputs, leaf), leaf, create_graph=keep)[0]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own forward mode
@EACH
@PADDED
def test_functional_derivatives(loss: Loss, padded: bool) -> None:
    """vmap of grad, and jvp along a direction, are the eager gradient."""
    inputs = make(loss, padded=padded, dtype=torch.float64, pair_ids=padded, old=True)
    x = inputs.tensors["logprobs"]
    stack = torch.stack([x, x - 0.01, x - 0.3])
    found = torch.func.vmap(torch.func.grad(lambda at: value(loss, inputs, at)))(stack)
    for k in range(3):
        expected = gradient(loss, inputs.replaced(logprobs=stack[k]))
        torch.testing.assert_close(found[k], expected, rtol=1e-12, atol=1e-14)
    direction = torch.randn_like(x)
    slope = torch.func.jvp(lambda at: value(loss, inputs, at), (x,), (direction,))[1]
    expected = (gradient(loss, inputs) * direction).sum()
    torch.testing.assert_close(slope, expected, rtol=1e-10, atol=1e-12)


@EACH
@PADDED
def test_second_derivative(loss: Loss, padded: bool) -> None:
    """A gradient can be differentiated again: it is torch.func's Hessian times a vector."""
    inputs = make(loss, padded=padded, dtype=torch.float64, old=True)
    leaf = inputs.tensors["logprobs"].clone().requires_grad_()
    (first,) = torch.autograd.grad(value(loss, inputs, leaf), leaf, create_graph=True)
    direction = torch.randn_like(first)

    def slope(at: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(lambda x: value(loss, inputs, x))(at)
        return found

    expected = torch.func.jacrev(slope)(leaf.detach())
    expected = torch.einsum("ij,j->i", expected.reshape(leaf.numel(), -1), direction.reshape(-1)).view_as(leaf)
    if not first.requires_grad:
        assert not bool(expected.any())
        return
    (second,) = torch.autograd.grad((first * direction).sum(), leaf)
    torch.testing.assert_close(second, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["importance_sampling", "dpo", "orpo"])
@PADDED
def test_gradgradcheck(name: str, padded: bool) -> None:
    """Where the loss is smooth, first and second derivatives are those of finite differences."""
    loss = next(each for each in DEFAULTS if each.name == name)
    inputs = make(loss, padded=padded, dtype=torch.float64, lengths=(3, 2))
    leaf = inputs.tensors["logprobs"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda at: value(loss, inputs, at), leaf)
    assert torch.autograd.gradgradcheck(lambda at: value(loss, inputs, at), leaf)


@EACH
@PADDED
def test_second_backward(loss: Loss, padded: bool) -> None:
    """A retained graph gives the same gradient again, and scales with what comes from above."""
    inputs = make(loss, padded=padded)
    leaf = inputs.tensors["logprobs"].clone().requires_grad_()
    total = value(loss, inputs, leaf)
    (first,) = torch.autograd.grad(total, leaf, retain_graph=True)
    kept = first.clone()
    (double,) = torch.autograd.grad(total, leaf, torch.tensor(2.0), retain_graph=True)
    (again,) = torch.autograd.grad(total, leaf)
    assert torch.equal(again, kept)
    assert torch.equal(double, 2 * kept)


@EACH
@PADDED
def test_autocast_changes_nothing(loss: Loss, padded: bool) -> None:
    """Under autocast value and gradient are the same to the bit."""
    inputs = make(loss, padded=padded)
    plain, expected = value(loss, inputs, inputs.tensors["logprobs"]), gradient(loss, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        total, found = value(loss, inputs, inputs.tensors["logprobs"]), gradient(loss, inputs)
    assert total.dtype == torch.float32
    assert torch.equal(total, plain)
    assert torch.equal(found, expected)


@EACH
@PADDED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(loss: Loss, padded: bool, dtype: torch.dtype) -> None:
    """The loss of half-precision log-probs is that of the same numbers in fp32; the gradient comes back in their dtype."""
    inputs = make(loss, padded=padded, dtype=dtype)
    wide = inputs.replaced(logprobs=inputs.tensors["logprobs"].float())
    total = value(loss, inputs, inputs.tensors["logprobs"])
    assert total.dtype == torch.float32
    assert torch.equal(total, value(loss, wide, wide.tensors["logprobs"]))
    found = gradient(loss, inputs)
    assert found.dtype == dtype
    assert torch.equal(found, gradient(loss, wide).to(dtype))
