"""The head's passes in autograd: d logprob / d hidden kept, scores recomputed, or everything in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked import HeadGradients, HeadPass

__all__ = ["FrozenHead", "OnePassHead", "RecomputedHead"]


class FrozenHead(torch.autograd.Function):
    """Frozen head: ``d logprob / d hidden`` is kept, the backward multiplies by the cotangent."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_pass: HeadPass) -> tuple[Tensor, Tensor | None]:
        """Score and form ``d logprob / d hidden``."""
        ctx.set_materialize_grads(False)
        with _no_autocast(hidden):
            logprobs, entropies, gradient = head_pass.score(gradient=True)
        ctx.save_for_backward(gradient, *([hidden] if head_pass.entropy else []))
        ctx.dtype, ctx.head_pass = hidden.dtype, _without_hidden(head_pass)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, None]:
        """Multiply; only a gradient through the entropy needs the logits again."""
        of_logprob, *kept = ctx.saved_tensors
        gradient = None if cotangent is None else (cotangent * of_logprob).to(ctx.dtype)
        if of_entropy is not None:
            with _no_autocast(of_logprob):
                again = replace(ctx.head_pass, hidden=kept[0])
                more = again.recompute(None, of_entropy, (True, False, False)).hidden
            gradient = more if gradient is None else gradient + more
        return gradient, None


class RecomputedHead(torch.autograd.Function):
    """Trainable head, or K targets: the backward scores again, with the cotangent at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head_pass: HeadPass
    ) -> tuple[Tensor, Tensor | None]:
        """Score."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head_pass = _without_hidden(head_pass)
        with _no_autocast(hidden):
            return head_pass.score()[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor | None, of_entropy: Tensor | None) -> tuple[Any, ...]:
        """Score again and pull back."""
        hidden, weight, bias = ctx.saved_tensors
        if cotangent is None and of_entropy is None:
            return None, None, None, None
        with _no_autocast(hidden):
            again = replace(ctx.head_pass, hidden=hidden)
            gradients = again.recompute(cotangent, of_entropy, ctx.needs_input_grad[:3])
        return *_as_inputs(gradients, hidden, weight, bias), None


class OnePassHead(torch.autograd.Function):
    """Trainable head, cotangent given in the same pass: the forward does everything."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head_pass: HeadPass,
        cotangent: Callable[[Tensor, slice], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Score and pull back; return ``sum g logprob`` and the log-probs."""
        given: list[Tensor] = []

        def ask(logprobs: Tensor, at: slice) -> Tensor:
            given.append(cotangent(logprobs, at).detach())
            return given[-1]

        with _no_autocast(hidden):
            logprobs, gradients = head_pass.one_pass(ask, bias is not None)
        logprobs = logprobs[:, 0]
        ctx.save_for_backward(*_as_inputs(gradients, hidden, weight, bias))
        ctx.mark_non_differentiable(logprobs)
        total = (torch.cat(given).to(logprobs) * logprobs).sum() if given else logprobs.sum()
        return total, logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Any) -> tuple[Any, ...]:
        """Scale the gradients of the forward."""
        scaled = [
            gradient * scale.to(gradient.dtype) if gradient is not None and needed else None
            for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        return *scaled, None, None


def _no_autocast(like: Tensor) -> torch.autocast:
    """Switch autocast off: dtypes have been chosen already."""
    return torch.autocast(like.device.type, enabled=False)


def _without_hidden(head_pass: HeadPass) -> HeadPass:
    return replace(head_pass, hidden=head_pass.hidden.new_empty(0))


def _as_inputs(
    gradients: HeadGradients, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Give each gradient the dtype of its input."""
    pairs = ((gradients.hidden, hidden), (gradients.weight, weight), (gradients.bias, bias))
    return tuple(None if g is None or x is None else g.to(x.dtype) for g, x in pairs)
