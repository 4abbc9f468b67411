"""The gradient of a custom loss that was sent: computed where its failures can be told from those of the model's backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor

from ...errors import ConfigError

__all__ = ["MISTAKES", "differentiated"]

# What an operation raises when it is given the wrong thing; in a graph that was sent, all of it is the sender's mistake.
MISTAKES: Final = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)


def differentiated(name: str, loss: Tensor, logprobs: Sequence[Tensor]) -> Tensor:
    """Return a loss whose gradient has been computed already: running it backward cannot fail any more.

    Args:
        name: of the loss.
        loss: scalar; one that depends on no log-probs is returned as it is.
        logprobs: leaves, float [T] each.

    Raises:
        ConfigError: an operation cannot be run backward.
    """
    if not loss.requires_grad:
        return loss
    try:
        gradients = torch.autograd.grad(loss, logprobs, allow_unused=True)
    except MISTAKES as error:
        raise ConfigError(f"the gradient of {name} failed: {error}") from error
    used = [(own, gradient) for own, gradient in zip(logprobs, gradients, strict=True) if gradient is not None]
    if not used:
        return loss
    leaves, known = zip(*used, strict=True)
    return cast(Tensor, _Differentiated.apply(loss.detach(), known, *leaves))  # type: ignore[no-untyped-call]


class _Differentiated(torch.autograd.Function):
    """A number with a gradient that is given."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return None, None, *(slope.to(gradient.dtype) * gradient for gradient in ctx.saved_tensors)
