"""How the head's passes hang in autograd: the gradient formed at once, formed late, or known from the start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked import HeadPass, LateGradients

__all__ = ["KnownCotangent", "LateCotangent", "UnitGradient"]


class UnitGradient(torch.autograd.Function):
    """Frozen head: ``d logprob / d hidden`` is kept, the backward multiplies by the cotangent."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_pass: HeadPass) -> tuple[Tensor, Tensor | None]:
        """Score and form the unit gradient."""
        ctx.set_materialize_grads(False)
        with _plain(hidden):
            logprobs, entropies, unit = head_pass.score(unit=True)
        ctx.save_for_backward(unit, *([hidden] if head_pass.entropy else []))
        ctx.dtype, ctx.head_pass = hidden.dtype, _without_hidden(head_pass)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, None]:
        """Multiply; only a gradient through the entropy needs the logits again."""
        unit, *kept = ctx.saved_tensors
        gradient = None if cotangent is None else (cotangent * unit).to(ctx.dtype)
        if of_entropy is not None:
            with _plain(unit):
                late = replace(ctx.head_pass, hidden=kept[0]).late(None, of_entropy, (True, False, False)).hidden
            gradient = late if gradient is None else gradient + late
        return gradient, None


class LateCotangent(torch.autograd.Function):
    """Trainable head, or K targets: the backward scores again, with the cotangent at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head_pass: HeadPass
    ) -> tuple[Tensor, Tensor | None]:
        """Score."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head_pass = _without_hidden(head_pass)
        with _plain(hidden):
            return head_pass.score()[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor | None, of_entropy: Tensor | None) -> tuple[Any, ...]:
        """Score again and pull back."""
        hidden, weight, bias = ctx.saved_tensors
        if cotangent is None and of_entropy is None:
            return None, None, None, None
        with _plain(hidden):
            wanted = ctx.needs_input_grad[:3]
            found = replace(ctx.head_pass, hidden=hidden).late(cotangent, of_entropy, wanted)
        return *_as_inputs(found, hidden, weight, bias), None


class KnownCotangent(torch.autograd.Function):
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

        with _plain(hidden):
            logprobs, found = head_pass.known(ask, bias is not None)
        logprobs = logprobs[:, 0]
        ctx.save_for_backward(*_as_inputs(found, hidden, weight, bias))
        ctx.mark_non_differentiable(logprobs)
        total = (torch.cat(given).to(logprobs) * logprobs).sum() if given else logprobs.sum()
        return total, logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Any) -> tuple[Any, ...]:
        """Scale what the forward found."""
        found = [
            gradient * scale.to(gradient.dtype) if gradient is not None and wanted else None
            for gradient, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        return *found, None, None


def _plain(like: Tensor) -> torch.autocast:
    """Switch autocast off: dtypes have been chosen already."""
    return torch.autocast(like.device.type, enabled=False)


def _without_hidden(head_pass: HeadPass) -> HeadPass:
    return replace(head_pass, hidden=head_pass.hidden.new_empty(0))


def _as_inputs(found: LateGradients, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    pairs = ((found.hidden, hidden), (found.weight, weight), (found.bias, bias))
    return tuple(None if g is None or x is None else g.to(x.dtype) for g, x in pairs)
