"""Recipes: a loss and its normalisation together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from .base import Loss, Normalization
from .policy import GRPO
from .preference import DPO, KTO, ORPO
from .presets import looked_up
from .supervised import CrossEntropy

__all__ = ["Recipe", "recipe"]


class Recipe(NamedTuple):
    """A loss and the ``grad_accumulation_normalization`` of ``optim_step`` that belongs to it."""

    loss: Loss
    normalization: Normalization | None


_RECIPES: Final[dict[str, Callable[..., Recipe]]] = {
    "sft": lambda: Recipe(CrossEntropy("token_mean"), None),
    "grpo": lambda: Recipe(GRPO(aggregation="sum"), "num_loss_tokens"),
    "dpo": lambda: Recipe(DPO(), None),
    "kto": lambda: Recipe(KTO(), None),
    "orpo": lambda: Recipe(ORPO(), None),
}


def recipe(name: str) -> Recipe:
    """Return the loss and the normalisation mode of a training recipe.

    ====  ===========================  ===================
    name  loss                         normalisation
    ====  ===========================  ===================
    sft   token-mean NLL               None
    grpo  GRPO, raw token sum          ``num_loss_tokens``
    dpo   DPO, mean over pairs         None
    kto   KTO, mean over the answers   None
    orpo  ORPO, mean over pairs        None
    ====  ===========================  ===================

    Raises:
        ConfigError: no recipe has that name.
    """
    return looked_up("recipe", name, _RECIPES)()
