"""Models with a deliberate leak between tokens or sequences, to test that a backend notices."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from ...ops.head import Head
from .tiny import TinyLM

__all__ = ["FutureLeakLM", "PackingLeakLM", "RowLeakLM"]


class _LeakyLM(nn.Module):
    """Wraps a model and keeps its head."""

    def __init__(self, model: TinyLM) -> None:
        super().__init__()
        self.model = model

    def head(self) -> Head:
        """Return the head of the wrapped model."""
        return self.model.head()


@final
class PackingLeakLM(_LeakyLM):
    """Attends to earlier sequences of a packed row: it ignores that positions restart."""

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Treat every row as one sequence."""
        order = torch.arange(tokens.shape[1], device=tokens.device).expand_as(positions)
        return self.model.hidden_states(tokens, order)


@final
class RowLeakLM(_LeakyLM):
    """Mixes the rows of a batch, as batch normalisation would."""

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Subtract half the mean over rows."""
        hidden = self.model.hidden_states(tokens, positions)
        return hidden - 0.5 * hidden.mean(0, keepdim=True)


@final
class FutureLeakLM(_LeakyLM):
    """Sees the tokens that it is asked to predict."""

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Add the mean over the whole row."""
        hidden = self.model.hidden_states(tokens, positions)
        return hidden + hidden.mean(1, keepdim=True)
