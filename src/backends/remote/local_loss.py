"""The loss that an SDK calls between its forward and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from ...datums.types import Datum
from ...losses.base import Counts, Loss
from ..cotangents import Cotangents, target_cotangents
from ..protocol import CustomLoss
from .capabilities import Capabilities

__all__ = ["LocalLoss"]


@final
class LocalLoss:
    """The function that the SDK calls: it never raises, for then the SDK would refuse all later operations.

    Attributes:
        error: why there is no gradient.
        held: the cotangents, not divided yet.
        sent: the cotangents as they go back, divided by the call's own count.
        logprobs: what the service's forward gave.
    """

    def __init__(
        self,
        loss: Loss | CustomLoss,
        name: str,
        data: Sequence[Datum],
        counts: Counts | None,
        capabilities: Capabilities,
    ) -> None:
        self._loss, self._name, self._data, self._counts = loss, name, data, counts
        self._capabilities = capabilities
        self.error: Exception | None = None
        self.held: Cotangents | None = None
        self.logprobs: list[Tensor] = []
        self.sent: list[Tensor] = []

    def __call__(self, _: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        cotangents = [torch.zeros_like(x) for x in logprobs]
        try:
            self.logprobs = [x.detach().clone() for x in logprobs]
            self.held = target_cotangents(self._loss, self._name, self._data, self.logprobs, self._counts)
            found = [c / (self.held.count or 1.0) for c in self.held.cotangents]
            self._capabilities.require_fits(found)
            self.sent = cotangents = found
        except Exception as error:
            self.error = error
        return torch.stack([(c * x).sum() for c, x in zip(cotangents, logprobs, strict=True)]).sum(), {}
