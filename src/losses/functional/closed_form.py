"""Closed forms: the value and the slope of a formula in one pass, without autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor

__all__ = ["ClosedForm", "PairForm", "closed_form", "closed_form_of", "pair_form", "pair_form_of"]

ClosedForm = Callable[..., tuple[Tensor, Tensor]]
PairForm = Callable[..., tuple[Tensor, Tensor]]
_CLOSED_FORMS: Final[dict[Callable[..., Tensor], ClosedForm]] = {}
_PAIR_FORMS: Final[dict[Callable[..., Tensor], PairForm]] = {}


def closed_form(definition: Callable[..., Tensor]) -> Callable[[ClosedForm], ClosedForm]:
    """Return a decorator that makes a function the closed form of ``definition``.

    ``(x, *args) -> (value, slope)``: the definition's value, and its derivative with respect to the first argument,
    both of the shape of ``x``. They are fresh tensors that alias neither each other nor an input, so that the caller may
    overwrite them. A closed form works in place and records nothing: call it under `torch.no_grad`, or on tensors that
    need no gradient, and take a second derivative from the definition.

    Args:
        definition: a formula that is elementwise in its first argument.
    """

    def attach(function: ClosedForm) -> ClosedForm:
        _CLOSED_FORMS[definition] = function
        return function

    return attach


def closed_form_of(definition: Callable[..., Any]) -> ClosedForm | None:
    """Return the closed form of ``definition``, or None where it has none."""
    return _CLOSED_FORMS.get(definition)


def pair_form(definition: Callable[..., Tensor]) -> Callable[[PairForm], PairForm]:
    """Return a decorator that makes a function the closed form of a ``definition`` of pairs.

    ``(sides, *args) -> (value, slopes)``: both sides together, the chosen ones first, [P, 2]; the definition's value, [P], and
    its derivatives with respect to both, [P, 2], on the terms of `closed_form`.

    Args:
        definition: a formula that is elementwise in its first two arguments.
    """

    def attach(function: PairForm) -> PairForm:
        _PAIR_FORMS[definition] = function
        return function

    return attach


def pair_form_of(definition: Callable[..., Any]) -> PairForm | None:
    """Return the closed form of a ``definition`` of pairs, or None where it has none."""
    return _PAIR_FORMS.get(definition)
