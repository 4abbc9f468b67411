"""Precision of selected_logprobs: where models are confident, and in half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pullback.ops import Head, selected_logprobs, softmax


def confident_case(rest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that leave the probability ``rest`` to all tokens but the target, found by bisection; in ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(64, 128, generator=generator, dtype=torch.float64))
    noise = torch.randn(16, 128, generator=generator, dtype=torch.float64) / 4
    targets = torch.randint(64, (16,), generator=generator)
    low, high = torch.zeros(16, 1, dtype=torch.float64), torch.full((16, 1), 50.0, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        logits = (noise + middle * weight[targets]) @ weight.T
        left = 1 - torch.softmax(logits, -1).gather(-1, targets[:, None])
        low, high = torch.where(left > rest, middle, low), torch.where(left > rest, high, middle)
    return (noise + high * weight[targets]).to(dtype), weight.to(dtype), targets


def relative_errors(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """Return 1 - p of the least confident row, and the errors of our and the plain d logprob / d hidden against fp64."""
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    exact = hidden.double().requires_grad_()
    torch.autograd.backward(selected_logprobs(inputs[0], Head(weight), targets).sum())
    plain = torch.log_softmax((inputs[1] @ weight.T).float(), -1).gather(-1, targets[:, None])
    torch.autograd.backward(plain.sum())
    truth = torch.log_softmax(exact @ weight.double().T, -1).gather(-1, targets[:, None])
    torch.autograd.backward(truth.sum())
    assert exact.grad is not None
    size = exact.grad.norm(dim=-1)
    ours, theirs = (((x.grad - exact.grad).norm(dim=-1) / size).max().item() for x in inputs)  # type: ignore[operator]
    return (1 - truth.exp()).max().item(), ours, theirs


@pytest.mark.parametrize("rest", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_gradient_of_confident_tokens(rest: float) -> None:
    """1 - p from 1e-1 to 1e-6: relative error of every row under 1e-5 in fp32; in bf16 no worse than the plain path."""
    left, ours, theirs = relative_errors(*confident_case(rest, torch.float32))
    assert left == pytest.approx(rest, rel=1e-2)
    assert ours < 1e-5
    assert ours < theirs + 1e-6
    _, ours_half, theirs_half = relative_errors(*confident_case(rest, torch.bfloat16))
    assert ours_half <= theirs_half + 2**-7


def test_one_minus_p_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: 1 - p_t taken by subtraction loses the gradient of a confident token."""
    join = softmax.TileSoftmax.join

    def careless(self: softmax.TileSoftmax, other: softmax.TileSoftmax) -> Any:
        found, *shares = join(self, other)
        target = (found.target_logits[:, 0] - found.lse).float().exp()
        return found._replace(one_minus_target=(1 - target).double()), *shares

    monkeypatch.setattr(softmax.TileSoftmax, "join", careless)
    _, ours, _ = relative_errors(*confident_case(1e-6, torch.float32))
    assert ours > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [False, True])
def test_half_precision_is_no_worse_than_plain(dtype: torch.dtype, trained: bool) -> None:
    """Three ways: fp64 truth, plain half precision, ours; many chunks, so that sums over them matter."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 64, generator=generator).to(dtype)
    weight = (torch.randn(300, 64, generator=generator) / 4).to(dtype)
    targets = torch.randint(300, (512,), generator=generator)
    cotangent = torch.randn(512, generator=generator) * 1e-3

    def run(score: Any, of: torch.dtype) -> list[Tensor]:
        h, w = hidden.to(of).requires_grad_(), weight.to(of).requires_grad_(trained)
        logprobs = score(h, w)
        found = torch.autograd.grad((logprobs * cotangent).sum(), [h, w] if trained else [h])
        return [logprobs.detach().double(), *(g.double() for g in found)]

    def plain(h: Tensor, w: Tensor) -> Tensor:
        product = h @ w.T
        logits = product if product.dtype == torch.float64 else product.float()
        return torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]

    truth = run(plain, torch.float64)
    theirs = run(plain, dtype)
    ours = run(lambda h, w: selected_logprobs(h, Head(w), targets, memory_budget=300 * 4 * 128), dtype)
    for a, b, c in zip(ours, theirs, truth, strict=True):
        # A CPU rounds each chunk's share of the weight's gradient; there are four chunks here.
        assert (a - c).norm() <= 1.25 * (b - c).norm()
