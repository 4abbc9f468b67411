"""Detached parts, held fixed: the numbers that a loss weights with stay what they were while its log-probs are moved."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, final
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...losses.evaluation import token_sum

__all__ = ["Detached", "DetachedPartsVary"]

_DETACHING: Final = (
    Tensor.detach,
    torch.detach,
    Tensor.data.__get__,  # type: ignore[attr-defined]
    Tensor.item,
    Tensor.tolist,
    Tensor.__float__,
)


class DetachedPartsVary(Exception):
    """The detached parts differ from one call to the next, so they cannot be held fixed."""


@final
class Detached(TorchFunctionMode):
    """Records what a function detaches in one call, and gives it back in later ones.

    So the differences of a value that was computed under `hold` are those of its gradient, though a weight, e.g. an
    importance ratio, is detached. What runs under `torch.no_grad` counts as detached too. The forward of an autograd function
    does not: its backward is what is to be proved.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Any] = []
        self._position: int | None = None
        self._inside = 0

    @property
    def parts(self) -> int:
        """How many parts were detached."""
        return len(self._kept)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Keep what is detached."""
        self._kept, self._position = [], None
        with self._watching():
            yield

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Give back what was kept, in order.

        Raises:
            DetachedPartsVary: something else is detached.
        """
        self._position = 0
        with self._watching():
            yield
        if self._position != len(self._kept):
            raise DetachedPartsVary

    @contextmanager
    def _watching(self) -> Iterator[None]:
        apply = inspect.getattr_static(torch.autograd.Function, "apply")  # Python's until torch 2.13, C's since

        def inside(cls: Any, *args: Any, **kwargs: Any) -> Any:
            self._inside += 1
            try:
                return apply.__get__(None, cls)(*args, **kwargs)
            finally:
                self._inside -= 1

        # The definitions of registered losses, instead of their closed forms, which are to be proved.
        definitions = mock.patch.object(token_sum, "closed_form_of", return_value=None)
        with definitions, mock.patch.object(torch.autograd.Function, "apply", classmethod(inside)), self:
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._inside or not (func in _DETACHING or _constant(out)):
            return out
        if self._position is None:
            self._kept.append(out.clone() if isinstance(out, Tensor) else out)
            return out
        if self._position >= len(self._kept):
            raise DetachedPartsVary
        kept = self._kept[self._position]
        self._position += 1
        if type(kept) is not type(out) or (isinstance(out, Tensor) and kept.shape != out.shape):
            raise DetachedPartsVary
        return kept


def _constant(out: Any) -> bool:
    return isinstance(out, Tensor) and out.is_floating_point() and not torch.is_grad_enabled()
