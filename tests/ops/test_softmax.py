"""There is one softmax: every path goes through it, and a defect planted in it, or in the kernel, shows in all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pullback import backends, ops
from pullback.ops import Head, logprob_surrogate, selected_logprobs, softmax

Path = Callable[[], list[Tensor]]
Softmax = Callable[[Tensor, softmax.Tile], softmax.TileSoftmax]


def paths() -> dict[str, Path]:
    """Return every path of the head by name; each gives log-probs and its gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=generator, dtype=torch.float32).requires_grad_()
    weight = torch.randn(40, 8, generator=generator).requires_grad_()
    targets = torch.randint(40, (6, 3), generator=generator)
    frozen, first = Head(weight.detach()), targets[:, 0]

    def pulled(logprobs: Tensor, value: Tensor, *leaves: Tensor) -> list[Tensor]:
        return [logprobs.detach(), *torch.autograd.grad(value, leaves)]

    def scored() -> list[Tensor]:
        with torch.no_grad():
            return [selected_logprobs(hidden, Head(weight), first, memory_budget=4 * 6 * 16)]

    def frozen_head() -> list[Tensor]:
        logprobs = selected_logprobs(hidden, frozen, first, memory_budget=4 * 6 * 16)
        return pulled(logprobs, logprobs.sum(), hidden)

    def one_pass() -> list[Tensor]:
        value, logprobs = logprob_surrogate(hidden, Head(weight), first, torch.ones(6))
        return pulled(logprobs, value, hidden, weight)

    def recomputed() -> list[Tensor]:
        logprobs = selected_logprobs(hidden, Head(weight), first)
        return pulled(logprobs, logprobs.sum(), hidden, weight)

    def candidates() -> list[Tensor]:
        logprobs = selected_logprobs(hidden, frozen, targets)
        return pulled(logprobs, logprobs.sum(), hidden)

    def through_entropy() -> list[Tensor]:
        logprobs, entropy = selected_logprobs(hidden, frozen, first, entropy=True)
        return pulled(logprobs, (logprobs + entropy).sum(), hidden)

    return {f.__name__: f for f in (scored, frozen_head, one_pass, recomputed, candidates, through_entropy)}


def planted(definition: Softmax, calls: list[int]) -> Softmax:
    """Return the softmax with a defect in all that it gives."""

    def defect(z: Tensor, tile: softmax.Tile) -> softmax.TileSoftmax:
        calls.append(len(z))
        found = definition(z, tile)
        z.mul_(1.01)
        return found._replace(lse=found.lse + 0.01)

    return defect


@pytest.mark.parametrize("path", paths())
def test_one_softmax_serves_every_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect in the one definition makes log-probs and every gradient of every path wrong."""
    right, calls = paths()[path](), []  # type: ignore[var-annotated]
    monkeypatch.setattr(softmax, "plain_softmax_", planted(softmax.plain_softmax_, calls))
    wrong = paths()[path]()
    assert calls
    for a, b in zip(right, wrong, strict=True):
        assert not torch.allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("path", ["scored", "frozen_head", "one_pass", "recomputed"])
def test_the_kernel_serves_every_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel is available, each path with one plain log-prob per position takes it, and nothing else."""
    right, calls = paths()[path](), []  # type: ignore[var-annotated]
    definition = softmax.plain_softmax_
    monkeypatch.setattr(softmax, "is_available", lambda device: True)
    monkeypatch.setattr(softmax, "fused_softmax_", definition)
    monkeypatch.setattr(softmax, "plain_softmax_", planted(definition, calls))
    for a, b in zip(right, paths()[path](), strict=True):
        assert torch.equal(a, b)
    assert not calls


def test_tiles_join_to_the_whole() -> None:
    """Log-sum-exp, mass without the target and entropy of two tiles are those of the whole vocabulary."""
    z, targets = torch.randn(5, 30, dtype=torch.float64), torch.tensor([[0], [9], [10], [29], [15]])
    head, joined = Head(torch.zeros(30, 1)), softmax.TileSoftmax.empty(targets, z.dtype, entropy=True)
    whole = softmax.softmax_(z.clone(), softmax.Tile(z[:, :1], head, targets, slice(0, 30), entropy=True))
    for columns in (slice(0, 10), slice(10, 30)):
        tile = softmax.Tile(z[:, :1], head, targets, columns, entropy=True)
        joined, before, now = joined.join(softmax.softmax_(z[:, columns].clone(), tile))
        assert torch.allclose(before + now, torch.ones(5, dtype=torch.float64))
    for a, b in zip(joined[:4], whole[:4], strict=True):
        assert a is not None
        assert b is not None
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)
    assert torch.allclose(whole.logprobs(targets), torch.log_softmax(z, -1).gather(-1, targets), rtol=1e-12)


def test_public_names_are_found_in_backends() -> None:
    """`ops` and `backends` give the same objects."""
    assert {"Head", "head_logits", "logprob_surrogate", "selected_logprobs"} <= set(ops.__all__)
    for name in ("Head", "logprob_surrogate", "selected_logprobs"):
        assert getattr(backends, name) is getattr(ops, name)
