"""What every backend does with the loss and the data it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..datums.types import Datum
from ..datums.validation import validate
from ..errors import ConfigError, LossTypeError
from ..losses.base import Loss
from ..losses.registry import get_loss
from .types import as_mapping

__all__ = ["as_loss", "check_data"]


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


def check_data(
    data: Sequence[Datum], loss: Loss | None, *, vocab_size: int | None = None, max_length: int | None = None
) -> None:
    """Check the data of one call for a loss; None: for a function, which says nothing of the inputs it reads.

    Raises:
        InvalidDatumsError: lists all problems of all datums.
    """
    validate(
        data,
        required=() if loss is None else ("target_tokens", *loss.required_inputs),
        optional=() if loss is None else loss.optional_inputs,
        vocab_size=vocab_size,
        max_length=max_length,
        known_keys=loss is not None,
        pairs=loss is not None and loss.gradient_kind == "pair",
    )
