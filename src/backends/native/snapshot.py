"""Copies of what operations of the native backend change, to bring it back as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from .checkpoints.checkpoint import TrainingState
from .optimizer import forget_casts

__all__ = ["Snapshot"]


@final
@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of an engine at one moment.

    Attributes:
        gradients: that had accumulated; they are set aside, not copied.
        weights, optimizer: copies, empty where no step will be made.
        weights_version: optimizer steps so far.
        half_stepped: a step had failed when it had changed some weights.
    """

    gradients: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    weights_version: int
    half_stepped: bool

    @classmethod
    def take(cls, state: TrainingState, weights: bool) -> Self:
        """Copy a state and clear its gradients."""
        gradients = dict(state.accumulator.gradients)
        state.accumulator.clear()
        trained = state.parameters if weights else {}
        moments = state.optimizer.to_tensors() if weights else {}
        return cls(
            gradients,
            {name: p.detach().clone() for name, p in trained.items()},
            {name: tensor.clone() for name, tensor in moments.items()},
            state.weights_version,
            state.optimizer.half_stepped,
        )

    @torch.no_grad()
    def restore_weights(self, state: TrainingState) -> None:
        """Bring weights, optimizer and the number of steps back."""
        for name, tensor in self.weights.items():
            state.parameters[name].copy_(tensor)
        forget_casts()
        state.optimizer.restore(self.optimizer)
        state.optimizer.half_stepped = self.half_stepped
        state.weights_version = self.weights_version

    def restore_gradients(self, state: TrainingState) -> None:
        """Bring the accumulated gradients back."""
        state.accumulator.restore(self.gradients)
