"""The gradient window: what has accumulated since the last optimizer step, and by what it will be divided."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from ...errors import NonFiniteError
from ..normalization import Ledger

__all__ = ["Window"]


@final
@dataclass
class Window:
    """Gradients live in ``parameter.grad``; this is everything else.

    Attributes:
        parameters: the trainable parameters by name.
        ledger: the operations whose gradients were added.
        failures: gradient operations that failed and whose error nobody has read.
    """

    parameters: Mapping[str, nn.Parameter]
    ledger: Ledger = field(default_factory=Ledger)
    failures: list[BaseException] = field(default_factory=list)

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Let one operation write into fresh gradients, and add them only if it succeeds."""
        before = {name: p.grad for name, p in self.parameters.items()}
        for p in self.parameters.values():
            p.grad = None
        try:
            yield
        except BaseException:
            for name, p in self.parameters.items():
                p.grad = before[name]
            raise
        for name, p in self.parameters.items():
            old = before[name]
            if old is not None:
                p.grad = old if p.grad is None else old.add_(p.grad)

    def require_finite(self, blame: Callable[[], str]) -> None:
        """Check the gradients that are being added, or about to be stepped on.

        Raises:
            NonFiniteError: one is NaN or inf; names the first layer, and the datum that ``blame`` finds.
        """
        found = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if not found or bool(torch.isfinite(torch.nn.utils.get_total_norm(found.values(), math.inf))):
            return
        for name, gradient in found.items():
            if not bool(torch.isfinite(gradient).all()):
                raise NonFiniteError(
                    f"the gradient of {name} is not finite; first caused by {blame()}; nothing has changed"
                )

    def clear(self) -> None:
        """Forget everything."""
        for p in self.parameters.values():
            p.grad = None
        self.ledger, self.failures = Ledger(), []

    def restore(self, saved: Mapping[str, Any], gradients: Mapping[str, Tensor]) -> None:
        """Take over a saved window."""
        self.clear()
        self.ledger = Ledger.from_json(saved)
        for name, gradient in gradients.items():
            self.parameters[name].grad = gradient.to(self.parameters[name].device)
