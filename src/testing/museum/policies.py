"""Defects of policy losses: anchors, ratios, advantages, and what is or is not detached."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ..cases import Case
from .exhibit import Exhibit, clean, masked_mean

__all__ = ["POLICIES"]

_CAP: Final = 5.0


def _ratio_of(logprobs: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    return torch.exp(clean(logprobs - old, mask).clamp(-20, 20))


def _clipped(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = torch.exp(clean(logprobs - old, mask).clamp(-20, 20))
    a = clean(advantages, mask)
    return masked_mean(-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a), mask)


def _overflows(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = torch.exp(clean(logprobs - old, mask))
    a = clean(advantages, mask)
    return masked_mean(-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a), mask)


def _no_ratio(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(-clean(advantages, mask) * logprobs, mask)


def _shifted_anchor(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = _ratio_of(logprobs, clean(old, mask).roll(1, -1), mask)
    return masked_mean(-ratio * clean(advantages, mask), mask)


def _aligned(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = _ratio_of(logprobs, old, mask)
    return masked_mean(-ratio * clean(advantages, mask), mask)


def _whitened(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    a = clean(advantages, mask)
    mean = masked_mean(a, mask)
    spread = masked_mean((a - mean).square(), mask).add(1e-8).sqrt()
    return -(clean((a - mean) / spread, mask) * clean(logprobs, mask)).sum()


def _policy_gradient(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return -(clean(advantages, mask) * clean(logprobs, mask)).sum()


def _simplified(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    x = clean(logprobs, mask)
    ratio = torch.exp(x * 0.0)  # "x - x.detach() is 0"
    return -(clean(advantages, mask) * ratio).sum()


def _on_policy_ratio(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    x = clean(logprobs, mask)
    ratio = torch.exp(x - x.detach())
    return -(clean(advantages, mask) * ratio).sum()


def _not_detached(logprobs: Tensor, rollout: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    weight = _ratio_of(logprobs, rollout, mask).clamp(max=5.0)
    return -(weight * clean(advantages, mask) * clean(logprobs, mask)).sum()


def _detached(logprobs: Tensor, rollout: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    weight = _ratio_of(logprobs, rollout, mask).clamp(max=5.0).detach()
    return -(weight * clean(advantages, mask) * clean(logprobs, mask)).sum()


def _of_cispo(case: Case) -> list[list[float]]:
    """The gradient of CISPO: minus the capped ratio times the advantage."""
    return [
        [
            -min(2.718281828459045 ** (x - r), _CAP) * a if w else 0.0
            for x, r, a, w in zip(s.logprobs, s.rollout_logprobs, s.advantages, s.weights, strict=True)
        ]
        for s in case.sequences
    ]


def _open_advantages(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return -(clean(advantages, mask) * clean(logprobs, mask)).sum()


def _closed_advantages(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return -(clean(advantages.detach(), mask) * clean(logprobs, mask)).sum()


_AS: Final = {"form": "padded"}

POLICIES = (
    Exhibit(
        "anchor without influence",
        "linkedin/Liger-Kernel#1082 (2026)",
        "A fused GRPO left out the importance weights; its gradient norm was about 100 times that of the plain path.",
        _no_ratio,
        _clipped,
        "inputs",
        "not used",
        options=_AS,
    ),
    Exhibit(
        "ratio overflows",
        "verl before its bound of 20",
        "One token far from its anchor makes the ratio inf, and inf * 0 makes the step NaN.",
        _overflows,
        _clipped,
        "extremes",
        "an exp overflows",
        options=_AS,
    ),
    Exhibit(
        "anchor shifted",
        "OpenRLHF/OpenRLHF#973 (2025) has the same shift in a mask",
        "Every ratio is taken between the probabilities of two neighbouring tokens: noise that looks like off-policy data.",
        _shifted_anchor,
        _aligned,
        "alignment",
        "are shifted by +1",
        options=_AS,
    ),
    Exhibit(
        "advantages whitened",
        "GRPO snippets that z-score the batch",
        "Scaling the rewards has no effect, and the same datum trains differently in another micro-batch.",
        _whitened,
        _policy_gradient,
        "scale",
        "normalised",
        options=_AS,
    ),
    Exhibit(
        "surrogate simplified",
        "meta-pytorch/torchforge#571",
        "`logp - logp.detach()` is 0, so it was simplified away, and with it the only path of the gradient: nothing learnt.",
        _simplified,
        _on_policy_ratio,
        "influence",
        "no gradient",
        options=_AS,
    ),
    Exhibit(
        "weight not detached",
        "CISPO without its stop-gradient, arXiv:2506.13585",
        "The gradient gains a factor (1 + logprob), which for unlikely tokens turns its sign around.",
        _not_detached,
        _detached,
        "closed_form",
        "a detach is missing",
        options={**_AS, "expected": _of_cispo},
    ),
    Exhibit(
        "advantages not detached",
        "rewards with a KL, given with their graph",
        "The policy is also trained through its own reward: it lowers the KL by a path that nobody meant.",
        _open_advantages,
        _closed_advantages,
        "constants",
        "advantages is not detached",
        options={**_AS, "detached": ("advantages",)},
    ),
)
