"""The loss that an SDK calls between its forward and its backward."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from ..calls.cotangents import Cotangents, evaluate_all
from ..calls.prepared import PreparedCall
from .capabilities import Capabilities

__all__ = ["LocalLoss"]


@final
class LocalLoss:
    """The function that the SDK calls: it never raises, for then the SDK would refuse all later operations.

    Attributes:
        error: why there is no gradient.
        cotangents: not divided yet.
        sent: the cotangents as they go back: divided by the call's own count, unless the service divides at the step.
        logprobs: what the service's forward gave.
    """

    def __init__(self, call: PreparedCall, capabilities: Capabilities) -> None:
        self._call, self._capabilities = call, capabilities
        self.error: Exception | None = None
        self.cotangents: Cotangents | None = None
        self.logprobs: list[Tensor] = []
        self.sent: list[Tensor] = []

    def __call__(self, _: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        going_back = [torch.zeros_like(x) for x in logprobs]
        try:
            self.logprobs = [x.detach().clone() for x in logprobs]
            self.cotangents = evaluate_all(self._call, self.logprobs)
            count = 1.0 if self._capabilities.takes_divisor else self.cotangents.count or 1.0
            divided = [c / count for c in self.cotangents.by_datum.values()]
            self._capabilities.require_fits(divided)
            self.sent = going_back = divided
        except Exception as error:
            self.error = error
        return torch.stack([(c * x).sum() for c, x in zip(going_back, logprobs, strict=True)]).sum(), {}
