"""The contract of a user's function: called on detached log-probs, checked in everything it returns."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LossTypeError, NonFiniteError, NotDifferentiableError
from .protocol import CustomLoss

__all__ = ["call_custom", "custom_cotangents", "custom_name"]

_logger = logging.getLogger(__name__)


def custom_cotangents(function: CustomLoss, loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Return dL/dlogprob of every leaf; zeros where the loss does not use one.

    Raises:
        NotDifferentiableError: it uses none.
    """
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    if all(g is None for g in found):
        raise NotDifferentiableError(_no_path(function))
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def call_custom(function: CustomLoss, data: Sequence[Any], leaves: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Call a user's function and hold it to its contract.

    Raises:
        LossTypeError: it did not return a scalar tensor and a mapping.
        NotDifferentiableError: the loss has no path to the log-probs.
        NonFiniteError: the loss is NaN or inf.
    """
    name = custom_name(function)
    returned = function(data, leaves)
    if not isinstance(returned, tuple) or len(returned) != 2:
        got = (
            f"{type(returned).__name__} of {len(returned)}" if isinstance(returned, tuple) else type(returned).__name__
        )
        raise LossTypeError(f"{name} must return (loss, metrics), a scalar tensor and a dict, got {got}")
    loss, metrics = returned
    if not isinstance(loss, Tensor):
        raise LossTypeError(
            f"{name} returned a {type(loss).__name__} as loss; return a tensor computed from the log-probs "
            "(.item() and float() cut the gradient)"
        )
    if loss.dim() != 0:
        raise LossTypeError(f"{name} returned a loss of shape {tuple(loss.shape)}; reduce it to a scalar (sum or mean)")
    if not isinstance(metrics, Mapping):
        raise LossTypeError(f"{name} returned {type(metrics).__name__} as metrics; return a dict of name to number")
    if not loss.requires_grad:
        raise NotDifferentiableError(_no_path(function))
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(f"{name} returned the loss {loss.item()}; its metrics: {dict(metrics)}")
    return loss, {str(key): _as_float(str(key), value) for key, value in metrics.items()}


def custom_name(function: object) -> str:
    """What to call a user's function in messages."""
    return str(getattr(function, "__name__", type(function).__name__))


def _no_path(function: object) -> str:
    return (
        f"the loss of {custom_name(function)} does not depend on any log-prob through differentiable operations, so every "
        "gradient would be zero; compute it from logprobs_list without .detach(), .item(), .data or torch.tensor(...)"
    )


def _as_float(name: str, value: object) -> float:
    """A metric must never cost a training step: what is no number reads NaN."""
    try:
        return float(value.detach()) if isinstance(value, Tensor) else float(value)  # type: ignore[arg-type]  # any object
    except (TypeError, ValueError, RuntimeError):
        _logger.warning("metric %r is no number but %s; reported as NaN", name, type(value).__name__)
        return math.nan
