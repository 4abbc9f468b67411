"""Cotangents that fp16 cannot hold are raised on their way through the model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Final, final

import torch
from torch import Tensor, nn

__all__ = ["GradientScale", "autocasts_to_fp16"]


_MOST: Final = 60  # powers of two; gradients are fp32, which holds the product


def autocasts_to_fp16(device: torch.device) -> bool:
    """Whether a model of fp32 weights computes in fp16 on this device now."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16


@final
class GradientScale:
    """A power of two that brings the cotangents of a call to about 1, where half precision would lose or overflow them.

    fp16 holds nothing below 6e-8: the gradient of a mean over a million tokens would vanish on its way through the
    model. Each batch of a call brings its largest cotangent to about 1; gradients of earlier batches follow if a later
    one needs a smaller factor. `Accumulator.adding` takes the factor out again, in fp32.

    Args:
        parameters: what is trained; their gradients are fp32.
        needed: whether the model computes in fp16, by its weights or under autocast.

    Attributes:
        value: the factor now.
    """

    def __init__(self, parameters: Collection[nn.Parameter], needed: bool) -> None:
        self.needed, self.value = needed, 1.0
        self._parameters = parameters
        self._chosen = False

    def choose(self, cotangents: Mapping[int, Tensor]) -> float:
        """Return the factor for these cotangents and all before them."""
        largest = max((float(c.abs().max()) for c in cotangents.values() if c.numel()), default=0.0)
        if not self.needed or not 0.0 < largest < math.inf:
            return self.value
        fitting = 2.0 ** min(max(math.floor(-math.log2(largest)), -_MOST), _MOST)
        if not self._chosen or fitting < self.value:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, fitting / self.value)
            self.value, self._chosen = fitting, True
        return self.value
