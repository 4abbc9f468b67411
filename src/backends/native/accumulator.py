"""The gradients that have accumulated in ``parameter.grad`` since the last optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from ...errors import BackendError, NonFiniteError
from .dtensors import local_part

__all__ = ["Accumulator", "all_finite"]


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether every number in ``tensors`` is finite; float, any shapes, on one device. Reads it once."""
    tensors = [t for t in tensors if t.numel()]  # of nothing there is no largest number
    if not all(type(t) in (Tensor, nn.Parameter) and t.is_cpu for t in tensors):
        return bool(torch.isfinite(torch.nn.utils.get_total_norm(tensors, math.inf)))
    # On the CPU a sum takes a thirtieth of the time of a norm. One that overflows says nothing, so that each number is asked.
    total = torch.stack([t.sum().double() for t in tensors]).sum().item() if tensors else 0.0
    return math.isfinite(total) or all(bool(torch.isfinite(t).all()) for t in tensors)


@final
@dataclass
class Accumulator:
    """Adds gradients to those of earlier calls, each call's as a whole or not at all.

    Attributes:
        parameters: the trainable parameters by name.
        calls: that were added since the last step; 0 after a load.
    """

    parameters: Mapping[str, nn.Parameter]
    calls: int = 0
    _own: Mapping[str, tuple[Tensor, int]] = field(default_factory=dict)

    def require_own(self) -> None:
        """Check that the gradients are those that were added here.

        Raises:
            BackendError: another has taken some away, has put others in their place, or has changed them.
        """
        for name, p in self.parameters.items():
            own, version = self._own.get(name, (None, 0))
            if p.grad is not own or (own is not None and _version(own) != version):
                raise BackendError(
                    f"the gradient of {name} is not the one that has accumulated here: another backend on this model, or "
                    "zero_grad() or backward() outside of this backend, has changed it; call discard_gradients() and make "
                    "the calls since the last step again"
                )

    @contextmanager
    def adding(self, divide_by: Callable[[], float] = lambda: 1.0) -> Iterator[None]:
        """Let one operation write into fresh gradients, and add them only if it succeeds.

        Args:
            divide_by: asked when the operation has succeeded; the fresh gradients are divided by it.
        """
        before = {name: p.grad for name, p in self.parameters.items()}
        for p in self.parameters.values():
            p.grad = None
        try:
            yield
            divisor = divide_by()
            if divisor != 1.0:
                torch._foreach_div_([p.grad for p in self.parameters.values() if p.grad is not None], divisor)
            for name, p in self.parameters.items():  # into the fresh ones: the earlier ones are there should this fail
                old = before[name]
                if old is not None:
                    p.grad = old if p.grad is None else p.grad.add_(old)
            self._take_over()
            self.calls += 1
        except BaseException:
            for name, p in self.parameters.items():
                p.grad = before[name]
            raise

    @property
    def gradients(self) -> dict[str, Tensor]:
        """What has accumulated, by parameter name."""
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def require_added(self, blame: Callable[[], str]) -> None:
        """Check that an operation has reached a weight, and that its gradients are finite."""
        self.require_reached()
        self.require_finite(blame)

    def require_reached(self) -> None:
        """Check that an operation has reached a weight.

        Raises:
            BackendError: it has reached none.
        """
        if not self.gradients:
            raise BackendError(
                f"none of the {len(self.parameters)} weights that this backend trains was reached by the gradient: they have "
                "been frozen since, or their adapter is merged or switched off; undo that, or make another backend on the model"
            )

    def require_finite(self, blame: Callable[[], str]) -> None:
        """Check the gradients that are being added, or about to be stepped on.

        Raises:
            NonFiniteError: one is NaN or inf; names the first layer, and the datum that ``blame`` finds.
        """
        gradients = self.gradients
        if all_finite(gradients.values()):
            return
        for name, gradient in gradients.items():
            if not bool(torch.isfinite(gradient).all()):
                raise NonFiniteError(
                    f"the gradient of {name} is not finite; first caused by {blame()}; nothing has changed"
                )

    def clear(self) -> None:
        """Forget everything."""
        for p in self.parameters.values():
            p.grad = None
        self._own = {}
        self.calls = 0

    def restore(self, gradients: Mapping[str, Tensor]) -> None:
        """Take over saved gradients."""
        self.clear()
        for name, gradient in gradients.items():
            self.parameters[name].grad = gradient.to(self.parameters[name].device)
        self._take_over()

    def _take_over(self) -> None:
        self._own = {name: (gradient, _version(gradient)) for name, gradient in self.gradients.items()}


def _version(gradient: Tensor) -> int:
    """Return a number that every change of a gradient in place raises, such as autograd's when it adds another to it."""
    part = local_part(gradient)
    return 0 if part.is_inference() else part._version
