"""The two sums that every loss is made of: of a function of each token, and of log-probs within each sequence.

Both select by the mask, never multiply with it. In plain eager autograd they compute the slope together with the value;
compiled, or under a transform of torch.func, they are written for the compiler or the transform to see through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import Function

from ..batch.layout import Layout, accurate_dot
from ..batch.selection import readable, select, select_, transformed
from ..functional.closed_form import closed_form_of

__all__ = ["Definition", "row_sum", "token_sum", "token_values", "weighted_sum"]

Definition = Callable[..., Tensor]


def row_sum(
    x: Tensor, minus: Tensor | None, mask: Tensor | None, scale: Tensor | None, layout: Layout, finite: bool = False
) -> Tensor:
    """Return ``sum_t w_t (x_t - minus_t)`` of each row; float64 [B], differentiable in ``x``.

    Args:
        x: float32 or float64, the layout's shape.
        minus: the same, or None for 0; detached.
        mask: zeros where nothing is trained; None trains everything.
        scale: the weights, where they are more than a mask.
        layout: of the tokens.
        finite: ``x`` is known to hold finite numbers only: a product with a weight of 0 then selects.
    """
    if transformed():
        values = select(x if minus is None else x - minus, mask)
        return layout.row_sums(values if scale is None else values * select(scale, mask))
    result: Tensor = _RowSum.apply(x, minus, mask, scale, layout, finite)  # type: ignore[no-untyped-call]
    return result


def weighted_sum(
    x: Tensor, mask: Tensor | None, scale: Tensor | None, coefficient: float, finite: bool = False
) -> Tensor:
    """Return ``coefficient * sum_t w_t x_t`` of all tokens; 0-d, of the dtype of ``x`` and differentiable in it.

    The other arguments are those of `row_sum`.
    """
    if transformed():
        values = select(x, mask)
        return _total(values if scale is None else values * select(scale, mask), coefficient)
    result: Tensor = _WeightedSum.apply(x, mask, scale, coefficient, finite)  # type: ignore[no-untyped-call]
    return result


def token_sum(
    x: Tensor,
    definition: Definition,
    args: Sequence[Any],
    factors: Sequence[Tensor],
    mask: Tensor | None,
    coefficient: float = 1.0,
) -> Tensor:
    """Return ``coefficient * sum_t prod_i factor_it definition(x_t, *args_t)`` over what the mask keeps; 0-d.

    It has the dtype of ``x``.

    Args:
        x: float32 or float64, any shape.
        definition: a function of `pullback.losses.functional`, or any other, one value per token.
        args: its other arguments, constants of the differentiation; tensors broadcast to ``x``.
        factors: constants that each value is multiplied by; they broadcast to ``x``.
        mask: zeros where nothing is trained; None keeps everything.
        coefficient: of the whole sum.
    """
    closed = closed_form_of(definition)
    if closed is None or torch._C._are_functorch_transforms_active():
        return _plain(x, definition, args, factors, mask, coefficient)
    if torch.compiler.is_compiling():
        with torch.no_grad():
            value, slope = _weighed(closed(x.detach(), *args), factors, mask)
            total, slope = _total(value, coefficient), slope * coefficient
        attached: Tensor = _Attach.apply(x, total, slope)  # type: ignore[no-untyped-call]
        return attached
    result: Tensor = _TokenSum.apply(x, definition, args, factors, mask, coefficient)  # type: ignore[no-untyped-call]
    return result


def token_values(x: Tensor, definition: Definition, args: Sequence[Any], mask: Tensor | None) -> Tensor:
    """Return ``definition(x_t, *args_t)`` for each token, 0 where nothing is trained; differentiable."""
    safe = [select(a, mask) if isinstance(a, Tensor) and a.shape == x.shape else a for a in args]
    return select(definition(select(x, mask), *safe), mask)


def _plain(
    x: Tensor,
    definition: Definition,
    args: Sequence[Any],
    factors: Sequence[Tensor],
    mask: Tensor | None,
    coefficient: float,
) -> Tensor:
    values = token_values(x, definition, args, mask)
    for factor in factors:
        values = values * (select(factor, mask) if factor.shape == x.shape else factor)
    return _total(values, coefficient)


def _total(values: Tensor, coefficient: float) -> Tensor:
    total = values.sum()  # pairwise: an error of 1e-7 of the magnitudes in fp32
    return total if coefficient == 1.0 else total * coefficient


def _weighed(pair: tuple[Tensor, Tensor], factors: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Multiply a value and its slope by the factors and select both, in their own memory where that is possible."""
    value, slope = pair
    for factor in factors:
        value, slope = value.mul_(factor), slope.mul_(factor)
    return select_(value, mask), select_(slope, mask)


@final
class _TokenSum(Function):
    """`token_sum` from a closed form: keeps the slope for the backward, and ``x`` for a second derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        definition: Definition,
        args: Sequence[Any],
        factors: Sequence[Tensor],
        mask: Tensor | None,
        coefficient: float,
    ) -> Tensor:
        closed = closed_form_of(definition)
        assert closed is not None
        value, slope = _weighed(closed(x, *args), factors, mask)
        ctx.save_for_backward(x, slope)
        ctx.rest, ctx.coefficient = (definition, args, factors, mask, coefficient), coefficient
        return _total(value, coefficient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, slope) = gradients, ctx.saved_tensors
        if not torch.is_grad_enabled():
            return slope * _scaled(g, ctx.coefficient), None, None, None, None, None
        # A second derivative is wanted: that of the definition itself.
        total = _plain(x, *ctx.rest)
        if not total.requires_grad:
            return torch.zeros_like(x), None, None, None, None, None
        return torch.autograd.grad(total, x, g, create_graph=True)[0], None, None, None, None, None


@final
class _Attach(Function):
    """A total, as a function of ``x`` whose derivative is ``slope``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, total: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * gradients[0], None, None


@final
class _WeightedSum(Function):
    """`weighted_sum`; its derivative is the weight, so no log-prob is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, scale: Tensor | None, coefficient: float, finite: bool
    ) -> Tensor:
        ctx.save_for_backward(mask, scale)
        ctx.shape, ctx.coefficient = x.shape, coefficient
        weights = mask if scale is None else scale
        if weights is None:
            return _total(x, coefficient)
        return (accurate_dot(x if finite else select(x, mask), weights) * coefficient).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mask, scale = ctx.saved_tensors
        g = _scaled(gradients[0], ctx.coefficient)
        if mask is None or isinstance(g, Tensor) or not math.isfinite(g):
            return _weight_times(gradients[0] * ctx.coefficient, mask, scale).expand(ctx.shape), None, None, None, None
        return (mask if scale is None else scale) * g, None, None, None, None


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
        finite: bool,
    ) -> Tensor:
        ctx.save_for_backward(mask, scale)
        ctx.layout, ctx.dtype = layout, x.dtype
        if minus is None and finite and mask is not None:
            return layout.row_sums(x * (mask if scale is None else scale))
        # A fresh tensor, unless there is neither a mask nor something to subtract.
        values = select(x, mask) if minus is None else select_(x - minus, mask)
        return layout.row_sums(values if scale is None else values.mul_(scale))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mask, scale = ctx.saved_tensors
        layout: Layout = ctx.layout
        g = layout.spread(gradients[0].to(ctx.dtype), len(layout.shape))
        return _weight_times(g, mask, scale).expand(layout.shape), None, None, None, None, None


def _weight_times(g: Tensor, mask: Tensor | None, scale: Tensor | None) -> Tensor:
    """Return ``w g``, exactly 0 where nothing is trained; a mask that is no scale holds ones and zeros."""
    if mask is None:
        return g
    product = g * (mask if scale is None else scale)
    if _finite(g):
        return product  # a finite number times 0 is 0
    return select(product, mask)


def _finite(g: Tensor) -> bool:
    """Return whether a cotangent is known to be finite, from a look at it where that is free."""
    if torch.is_grad_enabled() or not readable(g):
        return False
    return math.isfinite((g if g.dim() == 0 else g.sum()).item())


def _scaled(g: Tensor, coefficient: float) -> Tensor | float:
    """Return ``g * coefficient``; as a number, which spares an operation, where looking at it is free."""
    if torch.is_grad_enabled() or not readable(g):
        return g if coefficient == 1.0 else g * coefficient
    return g.item() * coefficient
