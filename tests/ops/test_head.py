"""selected_logprobs: right in value and gradient on every path, small, and cheap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import AllocationTracker
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pullback.errors import ConfigError, ShapeError
from pullback.ops import Head, logprob_surrogate, selected_logprobs


def materialised(hidden: Tensor, head: Head, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The textbook: all logits, log_softmax, gather; and the entropy."""
    logits: Tensor = head.scale * (hidden @ head.weight.T)
    if head.bias is not None:
        logits = logits + head.bias
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logprobs: Tensor = torch.log_softmax(logits / temperature, -1)
    entropy: Tensor = (logprobs.exp() * -logprobs).sum(-1)
    return logprobs.gather(-1, targets), entropy


@st.composite
def heads(draw: st.DrawFn) -> dict[str, Any]:
    """A head of every kind, hidden states, targets and cotangents, fp64."""
    n, k, width, vocab = (draw(st.integers(1, high)) for high in (9, 4, 6, 13))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    trained = draw(st.booleans())

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = normal(vocab, width).requires_grad_(trained)
    bias = normal(vocab).requires_grad_(trained) if draw(st.booleans()) else None
    head = Head(weight, bias, draw(st.sampled_from([None, 3.0])), draw(st.sampled_from([1.0, 0.5])))
    return {
        "hidden": normal(n, width).requires_grad_(),
        "head": head,
        "targets": torch.randint(vocab, (n, k), generator=generator),
        "temperature": draw(st.sampled_from([1.0, 0.7])),
        "cotangent": normal(n, k),
        "of_entropy": normal(n),
        "memory_budget": draw(st.integers(1, 2000)),
    }


def pull(value: Tensor) -> None:
    torch.autograd.backward(value)


def gradients(value: Tensor, hidden: Tensor, head: Head) -> list[Tensor]:
    trained = [x for x in (hidden, head.weight, head.bias) if x is not None and x.requires_grad]
    return list(torch.autograd.grad(value, trained, retain_graph=True))


@given(case=heads(), through_entropy=st.booleans())
def test_equals_the_textbook(case: dict[str, Any], through_entropy: bool) -> None:
    """Value, entropy and every gradient, for frozen and trainable heads, K targets, bias, cap, scale, temperature."""
    hidden, head, targets, temperature = (case[k] for k in ("hidden", "head", "targets", "temperature"))
    options = {"temperature": temperature, "memory_budget": case["memory_budget"]}
    logprobs, entropy = selected_logprobs(hidden, head, targets, entropy=True, **options)
    expected, expected_entropy = materialised(hidden, head, targets, temperature)
    assert torch.allclose(logprobs, expected, rtol=1e-11, atol=1e-12)
    assert torch.allclose(entropy, expected_entropy, rtol=1e-11, atol=1e-12)

    def weighted(values: Tensor, entropies: Tensor) -> Tensor:
        total: Tensor = (case["cotangent"] * values).sum()
        return total + (case["of_entropy"] * entropies).sum() if through_entropy else total

    found = gradients(weighted(logprobs, entropy), hidden, head)
    for a, b in zip(found, gradients(weighted(expected, expected_entropy), hidden, head), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-11)


@given(case=heads())
def test_surrogate_is_the_one_pass_gradient(case: dict[str, Any]) -> None:
    """Given at once or asked for by chunk, the cotangent's gradient is that of the textbook, times any factor."""
    hidden, head, targets, temperature = (case[k] for k in ("hidden", "head", "targets", "temperature"))
    targets, cotangent = targets[:, 0], case["cotangent"][:, 0]
    expected, _ = materialised(hidden, head, targets[:, None], temperature)
    tripled = gradients(3.0 * (cotangent * expected[:, 0]).sum(), hidden, head)
    squared = gradients((expected[:, 0] ** 2).sum(), hidden, head)
    options = {"temperature": temperature, "memory_budget": case["memory_budget"]}
    value, logprobs = logprob_surrogate(hidden, head, targets, cotangent, **options)
    assert not logprobs.requires_grad
    assert torch.allclose(logprobs, expected[:, 0], rtol=1e-11, atol=1e-12)
    assert torch.allclose(value, (cotangent * expected[:, 0]).sum())
    for a, b in zip(gradients(3.0 * value, hidden, head), tripled, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-11)
    asked, _ = logprob_surrogate(hidden, head, targets, lambda logprob, at: 2 * logprob, **options)
    for a, b in zip(gradients(asked, hidden, head), squared, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("trained", [False, True])
def test_needed_positions_only(trained: bool) -> None:
    """Positions that are not needed read 0, have no gradient, cost nothing; half of them costs half."""
    weight = torch.randn(50, 8, requires_grad=trained)
    hidden = torch.randn(2, 6, 8, requires_grad=True)
    targets = torch.randint(50, (2, 6))
    needed = torch.tensor([[True, False] * 3] * 2)
    poisoned = torch.where(needed[..., None], hidden, torch.full((), torch.nan))
    flops = []
    for mask in (torch.ones_like(needed), needed):
        with FlopCounterMode(display=False) as counter:
            found = selected_logprobs(hidden, Head(weight), targets, needed=mask)
            pull(found.sum())
        flops.append(counter.get_total_flops())
    assert flops[1] * 2 == flops[0]
    logprobs, entropy = selected_logprobs(poisoned, Head(weight), targets, needed=needed, entropy=True)
    (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), hidden)
    assert torch.all(logprobs[~needed] == 0)
    assert torch.all(entropy[~needed] == 0)
    assert torch.all(gradient[~needed] == 0)
    assert bool(torch.isfinite(gradient).all())


def test_flops_of_every_path() -> None:
    """The docstring's table, counted: 2, 4, 6 and 8 N H V."""
    n, width, vocab = 12, 8, 50
    product = n * width * vocab
    targets = torch.randint(vocab, (n,))
    for trained, one_pass, expected in ((False, False, 4), (True, True, 6), (True, False, 8)):
        hidden = torch.randn(n, width, requires_grad=True)
        head = Head(torch.randn(vocab, width, requires_grad=trained))
        with FlopCounterMode(display=False) as counter:
            if one_pass:
                value, _ = logprob_surrogate(hidden, head, targets, torch.ones(n))
            else:
                value = selected_logprobs(hidden, head, targets).sum()
            pull(value)
        assert counter.get_total_flops() == expected * product
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        selected_logprobs(hidden, head, targets)
    assert counter.get_total_flops() == 2 * product


def test_memory_of_the_frozen_path() -> None:
    """Extra peak memory stays under 5 % of the fp32 logits, and grows with N only by d logprob / d hidden."""
    width, vocab = 64, 20_000
    weight, peaks = torch.randn(vocab, width), []
    for n in (1024, 2048):
        hidden, targets = torch.randn(n, width, requires_grad=True), torch.randint(vocab, (n,))
        with AllocationTracker() as tracker:
            pull(selected_logprobs(hidden, Head(weight), targets, memory_budget=2**20).sum())
        peaks.append(tracker.peak)
        assert tracker.peak < 0.05 * n * vocab * 4
    assert peaks[1] - peaks[0] < 8 * 1024 * width * 4
    with AllocationTracker() as tracker:  # the tracker sees what the plain way holds
        pull(torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets[:, None]).sum())
    assert tracker.peak >= 2 * 2048 * vocab * 4


@pytest.mark.parametrize("trained", [False, True])
def test_under_autocast_and_checkpointing(trained: bool) -> None:
    """Autocast's dtype is used for the products; a checkpointed region gives the same gradient."""
    hidden = torch.randn(6, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=trained)
    targets = torch.randint(20, (6,))

    def work(h: Tensor) -> Tensor:
        return selected_logprobs(h, Head(weight), targets)

    with torch.autocast("cpu", torch.bfloat16):
        logprobs = work(hidden)
    in_half = selected_logprobs(hidden.bfloat16(), Head(weight.detach().bfloat16()), targets)
    assert logprobs.dtype == torch.float32
    assert torch.equal(logprobs, in_half)
    direct = torch.autograd.grad(work(hidden).sum(), hidden)[0]
    again = torch.autograd.grad(checkpoint(work, hidden, use_reentrant=False).sum(), hidden)[0]
    assert torch.equal(direct, again)
    assert torch.autograd.grad(logprobs.sum(), hidden)[0].dtype == torch.float32


def test_refusals() -> None:
    """Shapes, target ids, temperature and budget are checked before any work."""
    hidden, head, targets = torch.randn(3, 4), Head(torch.randn(5, 4)), torch.tensor([0, 1, 2])
    with pytest.raises(ShapeError, match=r"\[\.\.\., 4\].*\[3, 2\]"):
        selected_logprobs(hidden[:, :2], head, targets)
    with pytest.raises(ShapeError, match=r"int64 \[3\].*int32"):
        selected_logprobs(hidden, head, targets.int())
    with pytest.raises(ShapeError, match=r"\[0, 5\), got 0 to 5"):
        selected_logprobs(hidden, head, torch.tensor([0, 5, 2]))
    with pytest.raises(ShapeError, match="needed must be bool"):
        selected_logprobs(hidden, head, targets, needed=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ShapeError, match="one per position"):
        logprob_surrogate(hidden, head, targets[:, None], torch.ones(3))
    with pytest.raises(ConfigError, match="temperature"):
        selected_logprobs(hidden, head, targets, temperature=0.0)
    with pytest.raises(ConfigError, match="memory_budget"):
        selected_logprobs(hidden, head, targets, memory_budget=0)


@pytest.mark.parametrize("trained", [False, True])
def test_no_position_at_all(trained: bool) -> None:
    """Nothing needed: zeros, zero gradients, no error."""
    hidden = torch.randn(3, 4, requires_grad=True)
    head = Head(torch.randn(7, 4, requires_grad=trained), torch.randn(7))
    targets, needed = torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.bool)
    logprobs, entropy = selected_logprobs(hidden, head, targets, needed=needed, entropy=True)
    assert logprobs.tolist() == entropy.tolist() == [0.0] * 3
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert not bool(hidden.grad.any())
    total, found = logprob_surrogate(hidden[:0], head, targets[:0], torch.zeros(0))
    assert (float(total.detach()), found.numel()) == (0.0, 0)
    total.backward()
