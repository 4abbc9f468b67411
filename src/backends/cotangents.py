"""A loss on log-probs that came from elsewhere: cotangents, and all that must be known of them until they are divided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..datums.types import Datum, TensorData
from ..losses.base import Counts, Loss, Part
from ..losses.metrics import wire_metrics
from .custom import call_custom, custom_cotangents
from .protocol import CustomLoss

__all__ = ["Cotangents", "scored", "target_cotangents", "with_cotangents"]


@final
@dataclass(frozen=True, eq=False)
class Cotangents:
    """One gradient operation whose cotangents are known and not yet divided.

    Attributes:
        name: of the loss or function.
        data: as it is scored, with ``target_tokens``.
        cotangents: one per datum.
        denominator, count: what they wait to be divided by.
        metrics: by wire name.
        fitting: the normalisation that the loss declares (``function``: unknown).
    """

    name: str
    data: Sequence[Datum]
    cotangents: Sequence[Tensor]
    denominator: str
    count: float
    metrics: Mapping[str, float]
    fitting: str | None

    @property
    def tokens(self) -> int:
        """With a non-zero cotangent."""
        return sum(int((c != 0).sum()) for c in self.cotangents)

    @property
    def sequences(self) -> int:
        """With a non-zero cotangent."""
        return sum(1 for c in self.cotangents if bool((c != 0).any()))


def scored(datum: Datum) -> Datum:
    """Return the datum with the targets it is scored on: without ``target_tokens``, its own next tokens."""
    if "target_tokens" in datum.loss_fn_inputs:
        return datum
    tokens = datum.model_input.tokens
    return Datum(type(datum.model_input).from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})


def target_cotangents(
    loss: Loss | CustomLoss, name: str, data: Sequence[Datum], logprobs: Sequence[Tensor], counts: Counts | None
) -> Cotangents:
    """Evaluate a loss on log-probs from elsewhere.

    Raises:
        LossError: the function breaks its contract, or a registered loss cannot be computed.
    """
    leaves = [x.detach().clone().requires_grad_() for x in logprobs]
    if isinstance(loss, Loss):
        output = loss.evaluate(loss.batch(data, leaves), counts)
        part = output.deferred() if counts is None else Part("loss", output.loss, "none", 1.0)
        found: list[Tensor] = list(torch.autograd.grad(part.numerator, leaves))
        metrics: Mapping[str, float] = wire_metrics(output.metrics)
        fitting: str | None = loss.normalization
    else:
        value, own = call_custom(loss, data, leaves)
        found = custom_cotangents(loss, value, leaves)
        part = Part("loss", value.detach(), "none", 1.0)
        metrics, fitting = {"loss:sum": float(value.detach()), **own}, "function"
    return Cotangents(name, [scored(d) for d in data], found, part.denominator, part.count, metrics, fitting)


def with_cotangents(held: Cotangents, divisor: float) -> list[Datum]:
    """Return datums whose cross-entropy has the held gradient: ``weights = -cotangent / divisor``."""
    return [
        Datum(
            datum.model_input,
            {
                "target_tokens": datum.loss_fn_inputs["target_tokens"],
                "weights": TensorData((-cotangent / divisor).float()),
            },
        )
        for datum, cotangent in zip(held.data, held.cotangents, strict=True)
    ]
