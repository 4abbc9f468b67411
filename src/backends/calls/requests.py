"""What is scored of a datum: its tokens, their targets, and which of them are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from ...datums.types import Datum

__all__ = ["Positions", "ScoreRequest", "scored"]

Positions = Literal["all", "trained"]


@final
@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """One sequence to score.

    Attributes:
        tokens: int64 [T].
        targets: int64 [T] or [T, K].
        needed: bool [T]; which positions are scored.
        temperature: divides the logits; that of the sampler, where the sequence was sampled at another than 1.
    """

    tokens: Tensor
    targets: Tensor
    needed: Tensor
    temperature: float = 1.0

    @property
    def length(self) -> int:
        """T."""
        return self.tokens.numel()

    @classmethod
    def of(cls, datum: Datum, positions: Positions = "all") -> ScoreRequest:
        """Say what of a datum must be scored; without ``target_tokens`` its own next tokens, T - 1 of them."""
        tokens, inputs = datum.model_input.tokens, datum.loss_fn_inputs
        if "target_tokens" in inputs:
            targets = inputs["target_tokens"].to_torch()
        else:
            tokens, targets = tokens[:-1], tokens[1:]
        needed = torch.ones(tokens.numel(), dtype=torch.bool)
        if positions == "trained" and "weights" in inputs:
            weights = inputs["weights"].to_torch()
            needed = (weights != 0) if weights.dim() == 1 else (weights != 0).any(-1)
        given = inputs.get("temperature")
        return cls(tokens, targets, needed, 1.0 if given is None else float(given.to_torch()))


def scored(datum: Datum) -> Datum:
    """Return the datum with the targets it is scored on: without ``target_tokens``, its own next tokens."""
    if "target_tokens" in datum.loss_fn_inputs:
        return datum
    tokens = datum.model_input.tokens
    return Datum(type(datum.model_input).from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
