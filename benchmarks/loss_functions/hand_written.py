"""The losses as people write them by hand, on padded tensors and a float mask, and the tensors to compare them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = [
    "Inputs",
    "MaskKind",
    "cross_entropy_mean",
    "cross_entropy_sum",
    "dpo",
    "grpo",
    "grpo_reverse",
    "orpo",
    "ppo",
]

MaskKind = Literal["contiguous", "random"]
BETA_KL, BETA_DPO, LAMBDA_ORPO = 0.04, 0.1, 0.1  # the defaults of the losses, too


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the losses are computed from: fp32, natural logarithms.

    Attributes:
        logprobs, rollout_logprobs, ref_logprobs: [B, T].
        advantages: [B].
        mask: [B, T]; 1 on trained tokens, 0 elsewhere. Every sequence has a trained token.
    """

    logprobs: Tensor
    rollout_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    mask: Tensor

    @classmethod
    def draw(cls, sequences: int, width: int, kind: MaskKind) -> Inputs:
        """Draw inputs; the same at every call."""
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        logprobs = -3.0 * torch.rand(sequences, width, generator=generator)
        rollout, ref = ((logprobs + spread * normal(sequences, width)).clamp(max=0.0) for spread in (0.05, 0.1))
        return cls(logprobs, rollout, ref, normal(sequences), _mask(sequences, width, kind, generator))


def _mask(sequences: int, width: int, kind: MaskKind, generator: torch.Generator) -> Tensor:
    """Contiguous: a prompt of random length at the left, padding at the right. Random: each token with probability 0.7."""
    if kind == "random":
        mask = (torch.rand(sequences, width, generator=generator) < 0.7).float()
        mask[:, width // 2] = 1.0
        return mask
    first = (torch.rand(sequences, generator=generator) * width / 2).long()
    rest = width - first
    length = (rest * (0.5 + 0.5 * torch.rand(sequences, generator=generator))).long().clamp(min=1)
    position = torch.arange(width)
    return ((position >= first[:, None]) & (position < (first + length)[:, None])).float()


def cross_entropy_mean(x: Tensor, given: Inputs) -> Tensor:
    """Mean negative log-likelihood of the trained tokens."""
    return -(x * given.mask).sum() / given.mask.sum()


def cross_entropy_sum(x: Tensor, given: Inputs) -> Tensor:
    """Sum of it."""
    return -(x * given.mask).sum()


def _clipped(ratio: Tensor, given: Inputs) -> Tensor:
    advantages = given.advantages[:, None]
    return -torch.min(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages)


def ppo(x: Tensor, given: Inputs) -> Tensor:
    """Clipped policy gradient, summed."""
    return (_clipped(torch.exp(x - given.rollout_logprobs), given) * given.mask).sum()


def grpo(x: Tensor, given: Inputs) -> Tensor:
    """Clipped policy gradient and k3, which is differentiated as it stands and not weighted by the ratio; token mean."""
    difference = given.ref_logprobs - x
    penalty = torch.exp(difference) - difference - 1
    values = _clipped(torch.exp(x - given.rollout_logprobs), given) + BETA_KL * penalty
    return (values * given.mask).sum() / given.mask.sum()


def grpo_reverse(x: Tensor, given: Inputs) -> Tensor:
    """The same with the gradient of the reverse KL, weighted by the ratio: the value of k3, the slope of k2."""
    ratio, difference = torch.exp(x - given.rollout_logprobs), given.ref_logprobs - x
    penalty = (torch.exp(difference) - difference - 1).detach() - difference.detach() * (x - x.detach())
    values = _clipped(ratio, given) + BETA_KL * ratio.detach() * penalty
    return (values * given.mask).sum() / given.mask.sum()


def dpo(x: Tensor, given: Inputs) -> Tensor:
    """DPO of neighbours; the even sequences are the chosen ones."""
    rewards = ((x - given.ref_logprobs) * given.mask).sum(1)
    return -logsigmoid(BETA_DPO * (rewards[0::2] - rewards[1::2])).mean()


def orpo(x: Tensor, given: Inputs) -> Tensor:
    """ORPO of neighbours, from the mean log-probs of each sequence."""
    means = (x * given.mask).sum(1) / given.mask.sum(1)
    chosen, rejected = means[0::2], means[1::2]
    log_odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return (-chosen - LAMBDA_ORPO * logsigmoid(log_odds)).mean()
