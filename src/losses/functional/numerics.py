"""Safe elementary functions: finite in value and gradient wherever a log-prob can be."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from ..batch.selection import readable

__all__ = [
    "EXPONENT_LIMIT",
    "bounded_exp",
    "bounded_expm1",
    "capped",
    "constant",
    "log1mexp",
    "surely_above",
    "surely_below",
]

EXPONENT_LIMIT: Final = 20.0


def bounded_exp(x: Tensor, limit: float = EXPONENT_LIMIT) -> Tensor:
    """Return ``exp(x)`` up to ``limit``, and its tangent beyond: ``exp(min(x, limit)) (1 + max(x - limit, 0))``.

    The slope stays at exp(limit) beyond the limit, where a clamp would silently make it 0 and a plain exp overflows
    (fp32: at 88.7, with NaN gradients).
    """
    if surely_below(x, limit):
        return x.exp()
    return capped(x, limit).exp() * (1.0 + (x - limit).relu())


def bounded_expm1(x: Tensor, limit: float = EXPONENT_LIMIT) -> Tensor:
    """Return ``exp(x) - 1`` without cancellation near 0, continued by its tangent beyond ``limit``."""
    if surely_below(x, limit):
        return x.expm1()
    return capped(x, limit).expm1() + math.exp(limit) * (x - limit).relu()


def log1mexp(x: Tensor) -> Tensor:
    """Return ``log(1 - exp(x))`` for x < 0, accurate at both ends.

    Two branches that meet at -log 2, each fed a safe input where the other one is used: a plain ``where`` has NaN
    gradients near 0.
    """
    near = x > -math.log(2.0)
    safe_near = torch.where(near, x, torch.full_like(x, -0.5))
    safe_far = torch.where(near, torch.full_like(x, -1.0), x)
    return torch.where(near, torch.log(-torch.expm1(safe_near)), torch.log1p(-torch.exp(safe_far)))


def capped(x: Tensor, limit: float) -> Tensor:
    """Return ``min(x, limit)``, whose slope at the limit is 1; that of a clamp is 0 there since torch 2.14, and was 1."""
    return torch.where(x > limit, limit, x)


def constant(x: Tensor | float) -> Tensor | float:
    """Return ``x`` as a constant: a tensor without its history, a number as it is."""
    return x.detach() if isinstance(x, Tensor) else x


def surely_below(x: Tensor, limit: float) -> bool:
    """Return whether ``x`` nowhere exceeds ``limit``, so that no tangent is needed, as far as looking is free."""
    return readable(x) and x.numel() > 0 and x.amax().item() <= limit


def surely_above(x: Tensor, limit: float) -> bool:
    """Return whether ``x`` is nowhere below ``limit``, as far as looking is free."""
    return readable(x) and x.numel() > 0 and x.amin().item() >= limit
