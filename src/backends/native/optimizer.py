"""One AdamW step with the hyperparameters of the call."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..types import AdamParams

__all__ = ["adam_step", "new_optimizer"]


def new_optimizer(parameters: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; its hyperparameters come with each step."""
    return torch.optim.AdamW(list(parameters.values()), lr=0.0)


def adam_step(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter], params: AdamParams, divisor: float
) -> float:
    """Divide the gradients, clip them, step; the semantics are those of ``torch.optim.AdamW``.

    Returns:
        The gradient norm after division and before clipping.
    """
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    if divisor != 1.0:
        torch._foreach_div_(gradients, divisor)
    norm = torch.nn.utils.get_total_norm(gradients)
    if params.grad_clip_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(list(parameters.values()), params.grad_clip_norm, norm)
    for group in optimizer.param_groups:
        group |= {
            "lr": params.learning_rate,
            "betas": (params.beta1, params.beta2),
            "eps": params.eps,
            "weight_decay": params.weight_decay,
        }
    optimizer.step()
    return float(norm)
