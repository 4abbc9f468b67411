"""The sum of a function of each token, its slope computed together with its value where there is a closed form.

What is not trained is selected away, never multiplied with 0. Compiled, or under a transform of torch.func, the sum is written
for the compiler or the transform to see through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import Function

from ..batch.selection import finite, readable, select, select_
from ..batch.sums import scaled, scaled_number, scaled_sum, scaled_total, times
from ..functional.closed_form import closed_form_of

__all__ = ["Definition", "token_sum", "token_values"]

Definition = Callable[..., Tensor]


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
            total, slope = _weighted(closed(x.detach(), *args), factors, mask)
            total, slope = scaled(total, coefficient), slope * coefficient
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
    return scaled_sum(values, coefficient)


def _weighted(pair: tuple[Tensor, Tensor], factors: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Multiply a value and its slope by the factors and select both; return the sum of the value, and the slope.

    They are overwritten where that is possible.
    """
    value, slope = pair
    for factor in factors:
        value, slope = value.mul_(factor), slope.mul_(factor)
    multiplied = any(factor is mask for factor in factors) and readable(value)
    total = value.sum() if multiplied else None
    if total is None or not finite(total):
        total = select_(value, mask).sum()
    # What a weight of 0 made of a finite number is 0 already.
    return total, slope if multiplied and finite(slope) else select_(slope, mask)


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
        total, slope = _weighted(closed(x, *args), factors, mask)
        ctx.save_for_backward(x, slope)
        ctx.rest = definition, args, factors, mask, coefficient
        return total if coefficient == 1.0 else scaled_total(total, coefficient, x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, slope) = gradients, ctx.saved_tensors
        if not torch.is_grad_enabled():
            *_, mask, coefficient = ctx.rest
            return times(slope, scaled_number(g, coefficient), mask), None, None, None, None, None
        # A second derivative is wanted: that of the definition itself.
        again = _plain(x, *ctx.rest)
        if not again.requires_grad:
            return torch.zeros_like(x), None, None, None, None, None
        return torch.autograd.grad(again, x, g, create_graph=True)[0], None, None, None, None, None


@final
class _Attach(Function):
    """A total, as a function of ``x`` whose derivative is ``slope``.

    An infinite cotangent gives NaN where nothing is trained: to select once more makes the compiler's kernels twice as slow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, total: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * gradients[0], None, None
