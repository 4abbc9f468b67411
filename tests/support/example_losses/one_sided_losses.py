"""Sound losses that act on one side only: on one sign of the advantage, outside a band, inside a hinge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ONE_SIDED"]


def clean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0.0)


def topr(logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """TOPR (arXiv:2503.14286): only what is bad is weighted, by a ratio of at most 1."""
    ratio = torch.exp(clean(logprobs - rollout_logprobs, mask).detach().clamp(-20.0, 0.0))
    good = clean(advantages, mask)
    weight = torch.where(good > 0, 1.0, ratio)
    return -(weight * good * clean(logprobs, mask)).sum() / mask.sum().clamp(min=1)


def icepop(
    logprobs: Tensor, old_logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """IcePop: PPO without the tokens of which trainer and sampler disagree; inside the band the sampler has no effect."""
    mismatch = torch.exp(clean(old_logprobs - rollout_logprobs, mask).clamp(-20, 20))
    ratio, good = torch.exp(clean(logprobs - old_logprobs, mask).clamp(-20, 20)), clean(advantages, mask)
    gains = torch.min(ratio * good, ratio.clamp(0.8, 1.2) * good)
    return -clean(gains, mask & (mismatch > 0.5) & (mismatch < 5.0)).sum() / mask.sum().clamp(min=1)


def hinge_of_rows(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """A hinge on pairs of rows, [P]; at ordinary margins its gradient is constant."""
    rewards = 0.1 * clean(logprobs - ref_logprobs, mask).sum(-1)
    return torch.relu(1.0 - (rewards[0::2] - rewards[1::2]))


def with_rewards(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """DPO as trainers return it: a loss and two detached rewards for each pair."""
    chosen = 0.1 * (policy_chosen_logps - reference_chosen_logps)
    rejected = 0.1 * (policy_rejected_logps - reference_rejected_logps)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


ONE_SIDED: Final[dict[str, tuple[Callable[..., Any], dict[str, Any]]]] = {
    "topr": (topr, {}),
    "icepop": (icepop, {}),
    "hinge of rows": (hinge_of_rows, {}),
    "dpo with rewards": (with_rewards, {}),
}
