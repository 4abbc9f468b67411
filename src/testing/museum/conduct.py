"""Defects of conduct: what is declared, kept, overwritten, logged, rounded, or left to chance."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .exhibit import Exhibit, clean, masked_mean

__all__ = ["CONDUCT"]


def _policy_gradient(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return -(clean(advantages, mask) * clean(logprobs, mask)).sum()


def _of_probabilities(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return -(clean(advantages, mask) * clean(logprobs, mask).exp()).sum()


def _centred(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    x = clean(logprobs, mask)
    return -(clean(advantages, mask) * (x - x.mean().detach()) * x).sum()


class _RunningBaseline:
    """Subtracts a running mean of the advantages, which it keeps from call to call."""

    def __init__(self) -> None:
        self.mean = 0.0

    def __call__(self, logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        a = clean(advantages, mask)
        self.mean = 0.9 * self.mean + 0.1 * float(a.mean())
        return -(clean(a - self.mean, mask) * clean(logprobs, mask)).sum()


class _FixedBaseline:
    """Subtracts a number that the caller has chosen for the step."""

    def __init__(self) -> None:
        self.mean = 0.0

    def __call__(self, logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        a = clean(advantages, mask)
        return -(clean(a - self.mean, mask) * clean(logprobs, mask)).sum()


def _noisy(logprobs: Tensor, mask: Tensor) -> Tensor:
    noise = 1.0 + 0.1 * torch.rand_like(logprobs)
    return masked_mean(-logprobs * noise, mask)


def _quiet(logprobs: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(-logprobs, mask)


def _graph_in_metrics(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = masked_mean(-logprobs, mask)
    return loss, {"nll": loss}


def _plain_metrics(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, float]]:
    loss = masked_mean(-logprobs, mask)
    return loss, {"nll": loss.item()}


def _overwritten(logprobs: Tensor, weights: Tensor) -> Tensor:
    weights /= weights.sum().clamp(min=1e-9)
    return -(clean(logprobs, weights != 0) * weights).sum()


def _copied(logprobs: Tensor, weights: Tensor) -> Tensor:
    weights = weights / weights.sum().clamp(min=1e-9)
    return -(clean(logprobs, weights != 0) * weights).sum()


def _half(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    d = clean(logprobs.bfloat16() - ref_logprobs.bfloat16(), mask)
    return (d.square()).sum()


def _single(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    d = clean(logprobs.float() - ref_logprobs.float(), mask)
    return (d.square()).sum()


_AS: Final = {"form": "padded"}

CONDUCT = (
    Exhibit(
        "wrong kind",
        "a loss that calls itself constant",
        "A backend that streams by the declared kind takes the gradient of the first pass for that of every pass.",
        _of_probabilities,
        _policy_gradient,
        "kind",
        "declare 'token'",
        options={**_AS, "kind": "constant"},
    ),
    Exhibit(
        "wrong kind, of a batch",
        "statistics of the batch",
        "Cut into micro-batches, the loss has other statistics in each: it trains another objective, and says nothing.",
        _centred,
        _policy_gradient,
        "kind",
        "declare 'batch'",
        options={**_AS, "kind": "token"},
    ),
    Exhibit(
        "state between calls",
        "a running baseline",
        "The gradient of a batch depends on those before it and on how often evaluation ran; a resumed run begins anew.",
        _RunningBaseline(),
        _FixedBaseline(),
        "stateless",
        "running mean",
        options=_AS,
        shown=(_RunningBaseline, _FixedBaseline),
    ),
    Exhibit(
        "random",
        "dropout in the policy only, unslothai/unsloth-zoo#832 (2026)",
        "Policy and reference differed before the first step, by noise: a margin and a KL out of nothing.",
        _noisy,
        _quiet,
        "deterministic",
        "random",
        options=_AS,
    ),
    Exhibit(
        "graph in metrics",
        "any logger that keeps tensors",
        "Every logged loss keeps the graph of its step alive, until memory runs out.",
        _graph_in_metrics,
        _plain_metrics,
        "metrics",
        "detach",
        options=_AS,
    ),
    Exhibit(
        "input overwritten",
        "TRL's WPO weights",
        "Weights are divided in place, so that the second use of the same batch finds other ones.",
        _overwritten,
        _copied,
        "pure",
        "in place",
        options=_AS,
    ),
    Exhibit(
        "half precision",
        "log-probs in bf16, AI-Hypercomputer/maxtext#5231, OpenRLHF/OpenRLHF#634",
        "A grid of 0.03 nats is coarser than most log-ratios: the KL of the first steps was noise.",
        _half,
        _single,
        "resolution",
        "half precision",
        options=_AS,
    ),
)
