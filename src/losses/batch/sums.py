"""Weighted sums of log-probs: of each sequence, and of all tokens.

They select by the mask, never multiply with it. In plain eager autograd they keep no log-prob for the backward; compiled, or
under a transform of torch.func, they are written for the compiler or the transform to see through.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import Function

from .layout import Layout, accurate_sum
from .selection import finite, readable, select, select_, transformed

__all__ = ["row_cotangent", "row_sum", "scaled", "scaled_number", "scaled_sum", "scaled_total", "times", "weighted_sum"]


def row_sum(x: Tensor, minus: Tensor | None, mask: Tensor | None, scale: Tensor | None, layout: Layout) -> Tensor:
    """Return ``sum_t w_t (x_t - minus_t)`` of each row; float64 [B], differentiable in ``x``.

    Args:
        x: float32 or float64, the layout's shape.
        minus: the same, or None for 0; detached.
        mask: zeros where nothing is trained; None trains everything.
        scale: the weights, where they are more than a mask.
        layout: of the tokens.
    """
    if transformed():
        values = select(x if minus is None else x - minus, mask)
        return layout.row_sums(values if scale is None else values * select(scale, mask))
    if not torch.is_grad_enabled():
        return _summed(x, minus, mask, scale, layout.row_sums)
    result: Tensor = _RowSum.apply(x, minus, mask, scale, layout)  # type: ignore[no-untyped-call]
    return result


def weighted_sum(x: Tensor, mask: Tensor | None, scale: Tensor | None, coefficient: float) -> Tensor:
    """Return ``coefficient * sum_t w_t x_t`` of all tokens; 0-d, of the dtype of ``x`` and differentiable in it.

    The other arguments are those of `row_sum`.
    """
    if transformed():
        values = select(x, mask)
        return scaled_sum(values if scale is None else values * select(scale, mask), coefficient)
    result: Tensor = _WeightedSum.apply(x, mask, scale, coefficient)  # type: ignore[no-untyped-call]
    return result


def scaled_sum(values: Tensor, coefficient: float) -> Tensor:
    return scaled(values.sum(), coefficient)  # pairwise: an error of 1e-7 of the magnitudes in fp32


def scaled(number: Tensor, coefficient: float) -> Tensor:
    """Return ``number * coefficient``, without an operation where that is nothing to do."""
    return number if coefficient == 1.0 else number * coefficient


def scaled_total(total: Tensor, coefficient: float, dtype: torch.dtype) -> Tensor:
    """Return ``total * coefficient`` in a dtype, in one operation where looking at the total is free; it needs no gradient."""
    if readable(total):
        number = total.item() * coefficient
        if not abs(number) > torch.finfo(dtype).max:  # beyond it a number is refused, where a conversion makes infinity
            return torch.scalar_tensor(number, dtype=dtype, device=total.device)
    return (total * coefficient).to(dtype)


@final
class _WeightedSum(Function):
    """`weighted_sum`; its derivative is the weight, so no log-prob is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, scale: Tensor | None, coefficient: float) -> Tensor:
        ctx.save_for_backward(mask, scale)
        ctx.shape, ctx.coefficient = x.shape, coefficient
        return scaled_total(_summed(x, None, mask, scale, accurate_sum), coefficient, x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mask, scale = ctx.saved_tensors
        if mask is None:
            return (gradients[0] * ctx.coefficient).expand(ctx.shape), None, None, None
        g = scaled_number(gradients[0], ctx.coefficient)
        return times(mask if scale is None else scale, g, mask), None, None, None


@final
class _RowSum(Function):
    """`row_sum`; its derivative is the weight, so no log-prob is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        minus: Tensor | None,
        mask: Tensor | None,
        scale: Tensor | None,
        layout: Layout,
    ) -> Tensor:
        ctx.save_for_backward(mask, scale)
        ctx.layout, ctx.dtype = layout, x.dtype
        return _summed(x, minus, mask, scale, layout.row_sums)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mask, scale = ctx.saved_tensors
        layout: Layout = ctx.layout
        return row_cotangent(gradients[0], mask, scale, layout, ctx.dtype), None, None, None, None


def _summed(
    x: Tensor,
    minus: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return ``reduce(w (x - minus))``, where what has a weight of 0 is exactly 0, whatever it was."""
    weights = mask if scale is None else scale
    if weights is None:
        return reduce(x if minus is None else x - minus)
    if readable(x):
        summed = reduce(x * weights if minus is None else (x - minus).mul_(weights))
        if finite(summed):  # so is each product, and what a weight of 0 made of a finite number is 0
            return summed
    values = select(x, mask) if minus is None else select_(x - minus, mask)
    return reduce(values if scale is None else values.mul_(scale))


def row_cotangent(g: Tensor, mask: Tensor | None, scale: Tensor | None, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return ``w_t g`` of each token, [*layout], from one number ``g`` per row, [B]; see `row_sum`."""
    g = g.to(dtype)
    bounded = not torch.is_grad_enabled() and readable(g) and finite(g)
    per_token = layout.spread(g, len(layout.shape))
    if mask is None:
        return per_token.expand(layout.shape)
    product = per_token * (mask if scale is None else scale)
    return product if bounded else select(product, mask)


def times(slope: Tensor, g: Tensor | float, mask: Tensor | None) -> Tensor:
    """Return ``slope * g``, exactly 0 where nothing is trained, from an infinite ``g`` too."""
    product = slope * g
    return product if isinstance(g, float) and math.isfinite(g) else select(product, mask)


def scaled_number(g: Tensor, coefficient: float) -> Tensor | float:
    """Return ``g * coefficient``; as a number, which spares an operation, where looking at it is free."""
    if torch.is_grad_enabled() or not readable(g):
        return scaled(g, coefficient)
    return g.item() * coefficient
