"""The output projection of a language model: what turns hidden states into logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Head"]


class Head(NamedTuple):
    """The output projection: ``logits = softcap * tanh((scale * h @ W^T + bias) / softcap)``.

    Attributes:
        weight: [V, H].
        bias: [V], or None.
        softcap: bound on the logits, or None.
        scale: factor on the product.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    @property
    def trainable(self) -> bool:
        """Whether weight or bias has a gradient."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
