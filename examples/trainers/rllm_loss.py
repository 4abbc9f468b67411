"""A loss for rllm, by its documented signature: a value for each token, put together by the backend's own ``ctx.aggregate``.

``algorithm.loss_fn: pullback_grpo`` selects it on verl, Tinker and Fireworks alike. ``aggregate`` multiplies by the mask: the
values must be finite where nothing is trained: what is there is set to 0 before anything is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback.losses import functional as F


def pullback_grpo(ctx: Any) -> tuple[Tensor, dict[str, float]]:
    """Return the clipped surrogate; ``ctx`` is an ``rllm.LossContext``."""
    low = 1 - float(ctx.params.get("eps_clip", 0.2))
    high = 1 + float(ctx.params.get("eps_clip_high") or ctx.params.get("eps_clip", 0.2))
    mask = ctx.action_mask != 0
    current, old, advantages = (torch.where(mask, x, 0.0) for x in (ctx.logp_curr, ctx.logp_old, ctx.advantages))
    return ctx.aggregate(F.ppo_clip(current, old, advantages, low, high), ctx.action_mask), {}


def register() -> None:
    """Make it known to rllm; ``algorithm.loss_plugins`` imports the module that calls this."""
    import rllm

    rllm.register_loss("pullback_grpo")(pullback_grpo)
