"""Policy surrogates: per-token losses of a probability ratio and an advantage."""

from __future__ import annotations

import torch
from torch import Tensor

from ...deprecation import renamed_keyword
from ..parts.clip import ClipRange

__all__ = ["clipped_surrogate"]


@renamed_keyword("band", "clip")
def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip: ClipRange | float | None) -> Tensor:
    r"""Return the clipped policy loss of each token, ``max(-r A, -clip(r, low, high) A)``; without a range ``-r A``.

    Its derivative with respect to the log-prob is ``-r A`` inside the range and on its edge, and 0 where clipped.

    Args:
        ratio: policy / anchor, differentiable, any shape.
        advantages: the same shape; detached here.
        clip: the range of ratios, an epsilon, or None for no clipping.

    Returns:
        One value per token, shape of ``ratio``.

    Source: PPO, arXiv:1707.06347, equation 7; asymmetric bounds: DAPO, arXiv:2503.14476, equation 10.
    """
    advantages = advantages.detach()
    unclipped = -ratio * advantages
    if clip is None:
        return unclipped
    limits = ClipRange.of(clip)
    clipped = -ratio.detach().clamp(limits.low, limits.high) * advantages
    return torch.where(limits.clips(ratio, advantages), clipped, unclipped)
