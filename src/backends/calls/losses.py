"""The loss of a call: by its registered name or as an object, what it is called, and the inputs that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ...datums.types import Datum
from ...errors import ConfigError, LossTypeError, UnknownLossError
from ...losses.base import Loss
from ...losses.recipes import recipe
from ...losses.registry import get_loss
from ..types import as_mapping
from .units import by_group

__all__ = ["as_loss", "loss_name", "missing_inputs", "needed_inputs"]


def needed_inputs(loss: Loss) -> list[str]:
    """Return the inputs without which a call makes no sense; a mean over groups needs to know the groups of its datums."""
    needed = ["target_tokens", *loss.required_inputs]
    return [*needed, "group_id"] if by_group(loss) and "group_id" not in needed else needed


def as_loss(given: str | Loss, config: Mapping[str, Any] | None) -> Loss:
    """Return the loss that a name and its config, or an object, stands for.

    Raises:
        LossError: there is none, or its config does not apply.
    """
    if isinstance(given, str):
        try:
            return get_loss(given, as_mapping(config))
        except UnknownLossError as error:
            with suppress(ConfigError):  # there is no such recipe, either
                recipe(given)
                raise UnknownLossError(f"{given!r} is a recipe: loss, normalization = recipe({given!r})") from error
            raise
    if isinstance(given, Loss):
        if config:
            raise ConfigError(f"{given.name} is an object and carries its own hyperparameters; drop {dict(config)}")
        return given
    if isinstance(given, type) and issubclass(given, Loss):
        raise LossTypeError(f"loss_fn is the class {given.__name__}: give an object of it, {given.__name__}(...)")
    raise LossTypeError(
        f"loss_fn must be a registered name or a Loss, got {type(given).__name__}; functions go to forward_backward_custom"
    )


def missing_inputs(loss: Loss, data: Sequence[Datum]) -> list[str]:
    """Return the inputs that a loss requires and some datum lacks."""
    inputs = [getattr(datum, "loss_fn_inputs", loss.required_inputs) for datum in data]
    return [key for key in loss.required_inputs if any(key not in each for each in inputs)]


def loss_name(loss: object) -> str:
    """What to call a loss, its name or a user's function in messages."""
    if isinstance(loss, str):
        return loss
    return loss.name if isinstance(loss, Loss) else str(getattr(loss, "__name__", type(loss).__name__))
