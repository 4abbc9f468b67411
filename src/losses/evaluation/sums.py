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

from ..batch.layout import Layout, accurate_sum
from ..batch.selection import finite, readable, select, select_, transformed
from ..functional.closed_form import closed_form_of

__all__ = ["Definition", "row_cotangent", "row_sum", "scaled", "token_sum", "token_values", "weighted_sum"]

Definition = Callable[..., Tensor]


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
        return _total(values if scale is None else values * select(scale, mask), coefficient)
    result: Tensor = _WeightedSum.apply(x, mask, scale, coefficient)  # type: ignore[no-untyped-call]
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
    safe = [select(a, mask) if isinstance(a, Tensor) else a for a in args]
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
        values = values * select(factor, mask)
    return _total(values, coefficient)


def _total(values: Tensor, coefficient: float) -> Tensor:
    return scaled(values.sum(), coefficient)  # pairwise: an error of 1e-7 of the magnitudes in fp32


def scaled(number: Tensor, coefficient: float) -> Tensor:
    """Return ``number * coefficient``, without an operation where that is nothing to do."""
    return number if coefficient == 1.0 else number * coefficient


def _weighed(pair: tuple[Tensor, Tensor], factors: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Multiply a value and its slope by the factors and select both, in their own memory where that is possible."""
    value, slope = pair
    for factor in factors:
        value, slope = value.mul_(factor), slope.mul_(factor)
    weighed = any(factor is mask for factor in factors)

    def selected(values: Tensor) -> Tensor:
        if weighed and readable(values) and finite(values):  # what a weight of 0 made of a finite number is 0
            return values
        return select_(values, mask)

    return selected(value), selected(slope)


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
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, scale: Tensor | None, coefficient: float) -> Tensor:
        ctx.save_for_backward(mask, scale)
        ctx.shape, ctx.coefficient = x.shape, coefficient
        return (_summed(x, None, mask, scale, accurate_sum) * coefficient).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mask, scale = ctx.saved_tensors
        g = _scaled(gradients[0], ctx.coefficient)
        if mask is None or isinstance(g, Tensor) or not math.isfinite(g):
            g = gradients[0] * ctx.coefficient
            return _weight_times(g, mask, scale, bounded=False).expand(ctx.shape), None, None, None
        return (mask if scale is None else scale) * g, None, None, None


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
        total = reduce(x * weights if minus is None else (x - minus).mul_(weights))
        if finite(total):  # so is each product, and what a weight of 0 made of a finite number is 0
            return total
    values = select(x, mask) if minus is None else select_(x - minus, mask)
    return reduce(values if scale is None else values.mul_(scale))


def row_cotangent(g: Tensor, mask: Tensor | None, scale: Tensor | None, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return ``w_t g`` of each token, [*layout], from one number ``g`` per row, [B]; see `row_sum`."""
    g = g.to(dtype)
    bounded = not torch.is_grad_enabled() and readable(g) and finite(g)
    per_token = _weight_times(layout.spread(g, len(layout.shape)), mask, scale, bounded=bounded)
    return per_token.expand(layout.shape)


def _weight_times(g: Tensor, mask: Tensor | None, scale: Tensor | None, *, bounded: bool) -> Tensor:
    """Return ``w g``, exactly 0 where nothing is trained.

    Args:
        g: a cotangent that broadcasts to the mask.
        mask, scale: as of `row_sum`; a mask that is no scale holds ones and zeros.
        bounded: ``g`` is known to be finite, so that its product with 0 is 0.
    """
    if mask is None:
        return g
    product = g * (mask if scale is None else scale)
    return product if bounded else select(product, mask)


def _scaled(g: Tensor, coefficient: float) -> Tensor | float:
    """Return ``g * coefficient``; as a number, which spares an operation, where looking at it is free."""
    if torch.is_grad_enabled() or not readable(g):
        return scaled(g, coefficient)
    return g.item() * coefficient
