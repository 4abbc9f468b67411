"""Models that let something through which they should not, to test that a backend notices."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from ...ops.head import Head
from .tiny import TinyLM

__all__ = ["FutureLeakLM", "PackingLeakLM", "RowLeakLM"]


@final
class PackingLeakLM(nn.Module):
    """Sees the sequence before it in a packed row: it ignores that positions restart."""

    def __init__(self, model: TinyLM) -> None:
        super().__init__()
        self.model = model

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Treat every row as one sequence."""
        order = torch.arange(tokens.shape[1], device=tokens.device).expand_as(positions)
        return self.model.hidden_states(tokens, order)

    def head(self) -> Head:
        """The wrapped model's."""
        return self.model.head()


@final
class RowLeakLM(nn.Module):
    """Mixes the rows of a batch, as a batch normalisation would."""

    def __init__(self, model: TinyLM) -> None:
        super().__init__()
        self.model = model

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Subtract half the mean over rows."""
        hidden = self.model.hidden_states(tokens, positions)
        return hidden - 0.5 * hidden.mean(0, keepdim=True)

    def head(self) -> Head:
        """The wrapped model's."""
        return self.model.head()


@final
class FutureLeakLM(nn.Module):
    """Sees the tokens that it is asked to predict."""

    def __init__(self, model: TinyLM) -> None:
        super().__init__()
        self.model = model

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Add the mean over the whole row."""
        hidden = self.model.hidden_states(tokens, positions)
        return hidden + hidden.mean(1, keepdim=True)

    def head(self) -> Head:
        """The wrapped model's."""
        return self.model.head()
