"""What every backend does with the loss it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, LossTypeError
from ..losses.base import Loss
from ..losses.registry import get_loss
from .types import as_mapping

__all__ = ["as_loss"]


def as_loss(given: str | Loss, config: Mapping[str, Any] | None) -> Loss:
    """Return the loss that a name and its config, or an object, stands for.

    Raises:
        LossError: there is none, or its config does not apply.
    """
    if isinstance(given, str):
        return get_loss(given, as_mapping(config))
    if isinstance(given, Loss):
        if config:
            raise ConfigError(
                f"{given.name} was given as an object and carries its own hyperparameters; drop {dict(config)}"
            )
        return given
    raise LossTypeError(
        f"loss_fn must be a registered name or a Loss, got {type(given).__name__}; functions go to forward_backward_custom"
    )
