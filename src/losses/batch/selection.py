"""Where masks meet values: a value is kept where its weight is not 0, and is exactly 0 elsewhere, whatever it was."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

__all__ = ["as_weight", "finite", "readable", "select", "select_", "transformed", "wide"]

_PLAIN = (Tensor, torch.nn.Parameter)
_FEW: Final = 256  # so few numbers are added sooner in Python than by an operation


def transformed() -> bool:
    """Return whether a compiler or a transform of torch.func runs the code, instead of plain eager autograd."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def readable(tensor: Tensor) -> bool:
    """Return whether looking at a value is possible, and free: an eager tensor on the CPU."""
    batched = torch._C._functorch.is_legacy_batchedtensor  # what `is_grads_batched` passes to a backward
    return not transformed() and type(tensor) in _PLAIN and tensor.is_cpu and not batched(tensor)


def finite(numbers: Tensor) -> bool:
    """Return whether all of a few readable numbers are finite: then their sum is, short of an overflow."""
    if numbers.dim() == 1 and len(numbers) <= _FEW:
        return math.isfinite(sum(numbers.tolist()))
    return math.isfinite((numbers.sum() if numbers.dim() else numbers).item())


def wide(values: Tensor) -> Tensor:
    """Return ``values`` in fp32 or better: half precision is too coarse for sums and ratios."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def select(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return ``values`` where ``weights`` is not 0, else exactly 0 with zero gradient, even from NaN.

    Args:
        values: float, any shape.
        weights: the same shape and dtype, or bool; None keeps everything.
    """
    if weights is None:
        return values
    if weights.dtype == values.dtype and values.shape == weights.shape and readable(values):
        # The same selection as `where`, in one vectorised pass: `where` mispredicts a branch per element here.
        return torch.ops.aten.hardshrink_backward(values, weights, 0.0)  # type: ignore[no-any-return]
    return torch.where(weights != 0, values, torch.zeros((), dtype=values.dtype, device=values.device))


def select_(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return what `select` does, in the memory of ``values`` where that is possible; needs no gradient."""
    if weights is not None and weights.dtype == values.dtype and values.shape == weights.shape and readable(values):
        out: Tensor = torch.ops.aten.hardshrink_backward.grad_input(values, weights, 0.0, grad_input=values)
        return out
    return select(values, weights)


def as_weight(weights: Tensor | None, like: Tensor) -> Tensor:
    """Return weights in the dtype of ``like``; ones in its shape where there are none."""
    if weights is None:
        return torch.ones(like.shape, dtype=like.dtype, device=like.device)
    if weights.dtype == like.dtype:
        return weights
    # To convert bytes is five times as fast as to convert bool.
    bits = weights.dtype == torch.bool and readable(weights)
    return (weights.view(torch.uint8) if bits else weights).to(like.dtype)
